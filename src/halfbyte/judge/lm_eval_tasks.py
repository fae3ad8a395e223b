"""Converts lm-eval tasks to items, with lm-eval's own prompts, few-shot examples and choices.

Nothing is downloaded: a task's data must be local (YAML with ``dataset_path: json`` and
``data_files``) or in the datasets cache. Multiple-choice tasks become items with choices, and
``generate_until`` tasks with ``exact_match`` items with a check. Other task types and metrics, and
tasks that filter answers, are rejected: the comparison needs answers that are right or wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError, require_extra
from halfbyte.judge.checks import Check
from halfbyte.judge.tasks import MAX_NEW_TOKENS, Item

KINDS = ("multiple_choice", "generate_until")


def read_lm_eval(names: Sequence[str], *, limit: int | None) -> list[Item]:
    """Read lm-eval tasks.

    Args:
        names: Task names of lm-eval, or YAML files.
        limit: Maximum number of documents of each task; None: all.

    Returns:
        The items, in the order of the tasks and their documents.

    Raises:
        ConfigError: There is no such task, its data is not local, or its type is not supported.
    """
    # Must be set before lm_eval is imported.
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    with require_extra("lm_eval", "evaluate", "Reading lm-eval tasks"):
        from lm_eval.tasks import TaskManager, get_task_dict
    items: list[Item] = []
    for name in names:
        path = Path(name)
        local = path.is_file()
        manager = TaskManager(include_path=str(path.parent) if local else None)
        try:
            loaded = get_task_dict([path.stem if local else name], manager)
        except Exception as error:
            raise ConfigError(
                f"lm-eval cannot load the task '{name}': {error}. Its data must be local "
                "(dataset_path: json with data_files) or in the datasets cache."
            ) from error
        for task_name, task in _flatten(loaded):
            items += _task_items(task_name, task, limit)
    return items


def _flatten(tasks: Any) -> list[tuple[str, Any]]:
    """Return the tasks of nested groups."""
    found: list[tuple[str, Any]] = []
    for name, task in tasks.items():
        found += _flatten(task) if isinstance(task, dict) else [(str(name), task)]
    return found


def _task_items(name: str, task: Any, limit: int | None) -> list[Item]:
    kind = task.OUTPUT_TYPE
    if kind not in KINDS:
        raise ConfigError(
            f"Cannot compare on the lm-eval task '{name}': its type is {kind}; supported are "
            f"{' and '.join(KINDS)}."
        )
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    return [
        _choice_item(name, task, number, instances)
        if kind == "multiple_choice"
        else _generated_item(name, task, number, instances[0])
        for number, instances in sorted(by_document.items())
    ]


def _choice_item(name: str, task: Any, number: int, instances: list[Any]) -> Item:
    instances = sorted(instances, key=lambda instance: instance.idx)
    # With acc_mutual_info every choice occurs a second time without its question.
    pairs = [instance.args for instance in instances if instance.args[0]]
    contexts = {context for context, _ in pairs}
    target = task.doc_to_target(instances[0].doc)
    choices = tuple(choice for _, choice in pairs)
    if isinstance(target, str):
        delimited = [choice.strip() for choice in choices]
        target = delimited.index(target.strip()) if target.strip() in delimited else None
    if len(contexts) != 1 or not isinstance(target, int) or len(set(choices)) < len(choices):
        raise ConfigError(
            f"Cannot compare on the lm-eval task '{name}': document {number} is not a single "
            "prompt with different choices."
        )
    return Item(
        name=f"{name}:{number}",
        prompt=contexts.pop(),
        choices=choices,
        right_choice=target,
        slices={"task": name},
    )


def _generated_item(name: str, task: Any, number: int, instance: Any) -> Item:
    context, settings = instance.args
    metrics = task.config.metric_list or ()
    names = [m if isinstance(m, str) else m.__name__ for m in (e["metric"] for e in metrics)]
    if "exact_match" not in names:
        raise ConfigError(
            f"Cannot compare on the lm-eval task '{name}': its metrics are {names}; for generated "
            "answers only exact_match is supported. Write it as JSONL with a check instead."
        )
    filters = [f["function"] for entry in task.config.filter_list or () for f in entry["filter"]]
    changing = [name for name in filters if name != "take_first"]
    changing += ["regexes_to_ignore" for entry in metrics if entry.get("regexes_to_ignore")]
    if changing:
        raise ConfigError(
            f"Cannot compare on the lm-eval task '{name}': it filters answers before it compares "
            f"them ({', '.join(sorted(set(changing)))}), which is not supported. Write it as JSONL "
            "with a regex or python check instead."
        )
    stop = settings.get("until") or ()
    target = task.doc_to_target(instance.doc)
    return Item(
        name=f"{name}:{number}",
        prompt=context,
        check=Check(kind="equals", value=target if isinstance(target, list) else str(target)),
        max_new_tokens=int(settings.get("max_gen_toks") or MAX_NEW_TOKENS),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        slices={"task": name},
    )
