"""Entry point of the comparison: decides whether a candidate may replace its base.

::

    items, texts, edge cases -> token ids -> run the base, cache, unload -> run the candidate
      -> grades, flips, divergence, errors by layer -> verdict -> Comparison
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.identity import digest_files
from halfbyte.errors import ConfigError, first_line
from halfbyte.evaluate.loading import check_folder, load_tokenizer, open_subject
from halfbyte.judge.answers import Answer, Respondent
from halfbyte.judge.builtin_tasks import builtin_tasks
from halfbyte.judge.checks import PythonCheck
from halfbyte.judge.comparison import Comparison, Cost
from halfbyte.judge.conclusion import conclude
from halfbyte.judge.edge_cases import EdgeCase, build_edge_cases
from halfbyte.judge.fidelity import PassageComparison, compare_candidate, predict_base
from halfbyte.judge.interview import Interview, is_correct
from halfbyte.judge.layers import LayerErrors, measure_layers, save_base_layers
from halfbyte.judge.local_model import LocalModel, unpack_reference_linears
from halfbyte.judge.memory_meter import MemoryMeter
from halfbyte.judge.model_cache import ModelCache, subject_key
from halfbyte.judge.profile import plan_for
from halfbyte.judge.progress import Progress, StepProgress
from halfbyte.judge.questions import (
    Passage,
    Question,
    builtin_documents,
    digest,
    make_passages,
    make_question,
)
from halfbyte.judge.remote_model import RemoteModel, is_address
from halfbyte.judge.setup import CompareConfig, Side, Workload
from halfbyte.judge.tasks import Item, name_documents
from halfbyte.machine.cache import cache_folder
from halfbyte.machine.devices import resolve_device
from halfbyte.machine.memory import release_memory
from halfbyte.model.context_length import max_context_length
from halfbyte.plan.shapes import read_shapes

MEMORY_SAMPLE_SECONDS = 0.05


def compare(
    base: str | Path,
    candidate: str | Path,
    *,
    items: Sequence[Item] | None = None,
    documents: Mapping[str, Iterable[str]] | None = None,
    functions: Mapping[str, PythonCheck] | None = None,
    config: CompareConfig | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Decide whether a candidate may replace its base, by paired statistics over their answers.

    Both models get the same token ids, one model in memory at a time. The base's answers are cached
    on disk under a digest of the model, so the next candidate does not run the base again.

    Args:
        base: Folder of the base, or an OpenAI-compatible address up to ``/v1`` (text only).
        candidate: Folder or address of the model to judge.
        items: Questions with expected answers; None: the built-in tasks.
        documents: Running text by kind; None: the held-out text that ships with halfbyte; an empty
            mapping: no running text.
        functions: Python functions that checks refer to by name.
        config: Margins and sizes.
        cache: Folder of the cache; None: the user's cache folder.
        resume: Reuse the candidate's answers of an interrupted comparison.
        progress: Called with the stage and with (done, total) within it.

    Returns:
        The verdict and the evidence.

    Raises:
        ConfigError: An invalid setting, models with different tokenizers, an item or text that they
            cannot take, or a check that cannot grade an answer.
        ModelError: A model cannot be loaded or reached.
    """
    config = config or CompareConfig()
    report = progress or (lambda stage, done, total: None)
    root = Path(cache) if cache is not None else cache_folder() / "judge"
    sides = [
        _open_side(root, str(name), config, fresh=fresh)
        for name, fresh in ((base, is_address(str(base)) and not resume), (candidate, not resume))
    ]
    if sides[0].cache.folder == sides[1].cache.folder:
        # A model against itself needs a second cache, or its answers would be compared with
        # themselves.
        sides[1].cache = ModelCache(root, sides[1].cache.folder.name + "-again", fresh=not resume)
    functions = functions or {}
    work = _prepare(sides, items, documents, functions, config)
    passages: list[PassageComparison] | None = None
    layers: LayerErrors | None = None
    device = resolve_device(config.device)
    for side, base_side in ((sides[0], None), (sides[1], sides[0])):
        release_memory(device)
        with MemoryMeter(device).watch(MEMORY_SAMPLE_SECONDS) as sizes:
            passages, layers = _run_side(side, work, config, report, base=base_side)
        _add_memory(side, work, config, max(sizes()))
    return conclude(sides, work, config, functions, passages, layers)


def _open_side(root: Path, name: str, config: CompareConfig, *, fresh: bool) -> Side:
    if is_address(name):
        cache = ModelCache(root, f"served-{digest(name)}", fresh=fresh)
        return Side(name=name, cache=cache, files={})
    check_folder(Path(name))
    files = digest_files(Path(name))
    key = subject_key(files, config.dtype, resolve_device(config.device))
    return Side(name=name, cache=ModelCache(root, key, fresh=fresh), files=files)


def _prepare(
    sides: list[Side],
    items: Sequence[Item] | None,
    documents: Mapping[str, Iterable[str]] | None,
    functions: Mapping[str, PythonCheck],
    config: CompareConfig,
) -> Workload:
    """Tokenize everything with the base's tokenizer, and check it before a model is loaded."""
    notes: list[str] = []
    local = [side for side in sides if side.is_local]
    both_local = len(local) == 2
    tokenizer = load_tokenizer(Path(local[0].name)) if local else None
    if local and tokenizer is None:
        raise ConfigError(
            f"Cannot compare '{local[0].name}': the folder has no tokenizer. Copy the tokenizer "
            "files of the original model into it."
        )
    if items is None:
        items = builtin_tasks(config.builtin_items, seed=config.seed)
    if not both_local:
        skipped = sum(bool(item.choices) for item in items)
        items = [item for item in items if not item.choices]
        notes.append(
            "At least one model is behind a server: only generated text is compared, no "
            "log-likelihoods" + (f"; items with choices, left out: {skipped}." if skipped else ".")
        )
    questions = [make_question(tokenizer, item) for item in name_documents(items)]
    for question in questions:
        if question.item.check is not None:
            # Finds a check that cannot grade every text now, not after hours of answers.
            is_correct(question, Answer(), functions)
    passages: list[Passage] = []
    if both_local:
        texts = builtin_documents() if documents is None else documents
        passages = make_passages(tokenizer, texts, window=config.window, limit=config.windows)
        _check_tokenizers(tokenizer, local[1], items, passages)
    context = _find_context(local)
    _check_lengths(questions, passages, context)
    edges: list[EdgeCase] = []
    if config.edge_cases:
        longest = _longest_edge(context, config, notes) if both_local else None
        has_chat = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
        edges = build_edge_cases(tokenizer, longest, chat=has_chat)
    if not questions and not passages and not edges:
        raise ConfigError(
            "There is nothing to compare on: no items, no running text and no edge cases. Give at "
            "least one of them."
        )
    return Workload(
        questions=questions, passages=passages, edges=edges, tokenizer=tokenizer, notes=notes
    )


def _check_tokenizers(
    tokenizer: Any, candidate: Side, items: Sequence[Item], passages: Sequence[Passage]
) -> None:
    """Reject a candidate to which the base's token ids mean something else."""
    other = load_tokenizer(Path(candidate.name))
    if other is None:
        return
    for item in items[:: max(1, len(items) // 50)]:
        if make_question(other, item).ids != make_question(tokenizer, item).ids:
            raise ConfigError(
                f"The tokenizers of base and candidate encode item '{item.name}' differently. "
                "Compare a model with its own quantized version, with the same tokenizer files."
            )
    for token in sorted({token for passage in passages for token in passage.ids}):
        names = [one.convert_ids_to_tokens(token) for one in (tokenizer, other)]
        if names[0] != names[1]:
            raise ConfigError(
                f"The tokenizers of base and candidate differ: token {token} is {names[0]!r} in "
                f"one and {names[1]!r} in the other. Compare a model with its own quantized "
                "version, with the same tokenizer files."
            )


def _find_context(local: list[Side]) -> int | None:
    """Return the shortest context length of the models; None if none of them has a limit."""
    from transformers import AutoConfig

    limits = []
    for side in local:
        try:
            values = AutoConfig.from_pretrained(side.name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"Cannot read the config of '{side.name}': {first_line(error)}."
            ) from error
        limit = max_context_length(values.get_text_config())
        limits += [] if limit is None else [limit]
    return min(limits, default=None)


def _check_lengths(
    questions: Sequence[Question], passages: Sequence[Passage], context: int | None
) -> None:
    """Reject items and windows beyond the models' context length."""
    if context is None:
        return
    for question in questions:
        item = question.item
        answer = max(map(len, question.choices)) if item.choices else item.max_new_tokens
        if len(question.ids) + answer > context:
            raise ConfigError(
                f"Item '{item.name}' needs {len(question.ids)} tokens for its prompt and {answer} "
                f"for its answer; the models take {context} together. Shorten the prompt or lower "
                "max_new_tokens."
            )
    longest = max((len(p.ids) for p in passages), default=0)
    if longest > context:
        raise ConfigError(
            f"A window of running text has {longest} tokens; the models take {context}. Use window "
            f"{context} or less."
        )


def _longest_edge(context: int | None, config: CompareConfig, notes: list[str]) -> int:
    """Return the length of the longest edge case in tokens; notes where it is cut."""
    context = config.longest_edge if context is None else context
    if context > config.longest_edge:
        notes.append(
            f"The longest edge case has {config.longest_edge} tokens, not the {context} that the "
            "model takes; --longest changes that."
        )
    return min(context, config.longest_edge)


def _open_model(side: Side, config: CompareConfig, work: Workload) -> Respondent:
    if not side.is_local:
        return RemoteModel.open(side.name)
    subject = open_subject(
        Path(side.name), tokenizer=work.tokenizer, dtype=config.dtype, device=config.device
    )
    note = unpack_reference_linears(subject.model)
    if note is not None:
        work.notes.append(f"{side.name}: {note}")
        work.unpacked.add(side.name)
    work.dtypes[side.name] = subject.dtype_name
    return LocalModel(subject)


def _run_side(
    side: Side,
    work: Workload,
    config: CompareConfig,
    report: Progress,
    *,
    base: Side | None,
) -> tuple[list[PassageComparison] | None, LayerErrors | None]:
    """Run one model over the whole workload, then unload it.

    Without ``base`` the side is the base itself: its predictions are saved instead of compared.
    """
    role = "base" if base is None else "candidate"

    @functools.cache
    def load() -> Respondent:
        report(f"{role}: loading", 0, 1)
        return _open_model(side, config, work)

    def load_local() -> LocalModel:
        model = load()
        assert isinstance(model, LocalModel)
        return model

    def stage(name: str) -> StepProgress:
        return lambda done, total: report(f"{role}: {name}", done, total)

    interview = Interview(load, side.cache.answers)
    start = time.monotonic()
    side.answers = interview.ask(work.questions, config.batch_size, stage("tasks"))
    side.edge_answers = interview.ask_edges(
        work.edges, config.batch_size, config.seed, stage("edge cases")
    )
    passages, layers = None, None
    if work.passages:
        passages, layers = _run_text(side, base, work, load_local, stage)
    if side.is_local:
        predicted = interview.predict_edges(
            work.edges,
            side.cache,
            None if base is None else base.cache,
            stage("predictions of edge cases"),
        )
        side.edge_finite = [finite for finite, _ in predicted]
        side.edge_kl = [kl for _, kl in predicted]
    if base is None:
        interview.repeat(
            work.questions, config.noise_items, config.noise_batch_size, stage("noise floor")
        )
    has_predicted = side.is_local and load.cache_info().currsize
    side.cost = Cost(
        name=side.name,
        seconds=time.monotonic() - start,
        tokens=interview.tokens + (load_local().predicted_tokens if has_predicted else 0),
        reused=interview.reused,
    )
    load.cache_clear()
    for used in (side, *([] if base is None else [base])):
        used.cache.release_head()
    return passages, layers


def _run_text(
    side: Side,
    base: Side | None,
    work: Workload,
    load: Callable[[], LocalModel],
    stage: Callable[[str], StepProgress],
) -> tuple[list[PassageComparison] | None, LayerErrors | None]:
    """Run one model over the running text, and its linears over a part of it."""

    def load_for_layers() -> LocalModel:
        model = load()
        stage("layers")(0, 1)
        return model

    text_progress, failure = stage("running text"), "Errors by layer were not measured"
    if base is None:
        predict_base(load, side.cache, work.passages, text_progress)
        with _optional(work, failure):
            save_base_layers(load_for_layers, side.cache, work.passages)
        return None, None
    passages = compare_candidate(load, side.cache, base.cache, work.passages, text_progress)
    layers = None
    with _optional(work, failure):
        layers = measure_layers(load_for_layers(), base.cache, work.passages)
    return passages, layers


@contextmanager
def _optional(work: Workload, failure: str) -> Iterator[None]:
    """Turn an error in a step that the verdict does not need into a note."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it is noted, and hours of answers are not lost
        work.notes.append(f"{failure}: {first_line(error)}.")


def _add_memory(side: Side, work: Workload, config: CompareConfig, peak: int) -> None:
    """Add a run's measured and planned memory to its cost."""
    assert side.cost is not None
    if not side.is_local or not side.cost.tokens:
        return
    side.cost = replace(
        side.cost,
        weight_bytes=sum(p.stat().st_size for p in Path(side.name).glob("*.safetensors")),
        peak_memory_bytes=peak,
    )
    with _optional(work, f"The memory of {side.name} was not planned"):
        side.cost = replace(side.cost, planned_bytes=_planned_bytes(side, work, config))


def _planned_bytes(side: Side, work: Workload, config: CompareConfig) -> int:
    """Return the planned memory of a run's largest batch or longest text."""
    question = max((len(q.ids) + q.item.max_new_tokens for q in work.questions), default=0)
    passage = max((len(p.ids) for p in work.passages), default=0)
    edge = max((len(e.question.ids) for e in work.edges), default=0)
    is_batch = config.batch_size * question >= max(passage, edge)
    return plan_for(
        read_shapes(side.name),
        config.batch_size if is_batch else 1,
        question if is_batch else max(passage, edge),
        1,
        work.dtypes.get(side.name, "float32"),
        resolve_device(config.device).type,
        unpacked=side.name in work.unpacked,
    ).total
