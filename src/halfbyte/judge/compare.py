"""The entry: compare a candidate with its base, and say whether it may replace it.

::

    items, texts, odd inputs -> token ids -> base runs, is kept and dropped -> candidate runs
      -> grades, flips, divergence, layers -> verdict -> Comparison
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
from halfbyte.judge.edge_cases import (
    EdgeCase,
    build_edge_cases,
)
from halfbyte.judge.fidelity import compare_candidate, predict_base
from halfbyte.judge.interview import Interview, is_right
from halfbyte.judge.layers import LayerErrors, keep_base_layers, measure_layers
from halfbyte.judge.local_model import LocalModel, unpack_reference_linears
from halfbyte.judge.memory_meter import MemoryMeter
from halfbyte.judge.model_cache import ModelCache, subject_key
from halfbyte.judge.profile import plan_for
from halfbyte.judge.questions import (
    Passage,
    Question,
    builtin_documents,
    digest,
    make_passages,
    make_question,
)
from halfbyte.judge.remote_model import RemoteModel, is_address
from halfbyte.judge.setup import CompareConfig, Side, Work
from halfbyte.judge.tasks import Item, name_documents
from halfbyte.machine.cache import cache_folder
from halfbyte.machine.devices import resolve_device
from halfbyte.machine.memory import release_memory
from halfbyte.model.context_length import max_context_length
from halfbyte.plan.shapes import read_shapes

MEMORY_SAMPLE_SECONDS = 0.05

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and (done, in all)."""


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
    """Say whether a candidate may replace its base, with statistics over paired answers.

    Both get the same token ids. One model is in memory at a time: the base's answers are kept on
    disk by its digest, and the next candidate finds them there.

    Args:
        base: Folder of the base, or an OpenAI-compatible address up to ``/v1`` (text only).
        candidate: Folder or address of the model to judge.
        items: Questions with answers; None: the built-in tasks.
        documents: Running text by kind; None: the held-out text that ships with halfbyte; an empty
            mapping: none.
        functions: Python functions that checks name.
        config: Margins and sizes.
        cache: Folder for what is kept; None: the user's cache.
        resume: Use what an interrupted comparison left of the candidate's answers.
        progress: Told what is being done.

    Returns:
        The verdict and the evidence.

    Raises:
        ConfigError: A setting, models that do not share a tokenizer, an item or a text that they
            cannot take, or a check that cannot take an answer.
        ModelError: A model cannot be loaded or reached.
    """
    config = config or CompareConfig()
    tell = progress or (lambda what, done, total: None)
    root = Path(cache) if cache is not None else cache_folder() / "judge"
    sides = [
        _open_side(root, str(name), config, fresh=fresh)
        for name, fresh in ((base, is_address(str(base)) and not resume), (candidate, not resume))
    ]
    if sides[0].cache.folder == sides[1].cache.folder:
        # A model against itself: what it answers now must not be what it answered before.
        sides[1].cache = ModelCache(root, sides[1].cache.folder.name + "-again", fresh=not resume)
    functions = functions or {}
    work = _prepare(sides, items, documents, functions, config)
    compared: tuple[Any, LayerErrors | None] = (None, None)
    device = resolve_device(config.device)
    for side, against in ((sides[0], None), (sides[1], sides[0])):
        release_memory(device)
        with MemoryMeter(device).watch(MEMORY_SAMPLE_SECONDS) as seen:
            compared = _run_side(side, work, config, tell, against=against)
        _with_memory(side, work, config, max(seen()))
    return conclude(sides, work, config, functions, *compared)


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
) -> Work:
    """Turn everything into token ids, by the base's tokenizer."""
    notes: list[str] = []
    local = [side for side in sides if side.is_local]
    tokenizer = load_tokenizer(Path(local[0].name)) if local else None
    if local and tokenizer is None:
        raise ConfigError(f"'{local[0].name}' has no tokenizer. Copy the original model's into it.")
    if items is None:
        items = builtin_tasks(config.builtin_items, seed=config.seed)
    if len(local) == 2:
        _check_tokenizers(tokenizer, local[1], items)
    else:
        skipped = sum(bool(item.choices) for item in items)
        items = [item for item in items if not item.choices]
        notes.append(
            "One of the two is served: only what it writes is compared, no likelihoods"
            + (f"; items with choices, left out: {skipped}." if skipped else ".")
        )
    questions = [make_question(tokenizer, item) for item in name_documents(items)]
    for question in questions:
        if question.item.check is not None:
            # A check that cannot take every answer is found before hours of answers.
            is_right(question, Answer(), functions)
    passages: list[Passage] = []
    if len(local) == 2:
        texts = builtin_documents() if documents is None else documents
        passages = make_passages(tokenizer, texts, window=config.window, limit=config.windows)
    context = _context(local)
    _check_lengths(questions, passages, context)
    edges: list[EdgeCase] = []
    if config.edge_cases:
        longest = _longest(context, config, notes) if len(local) == 2 else None
        has_chat = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
        edges = build_edge_cases(tokenizer, longest, chat=has_chat)
    if not questions and not passages and not edges:
        raise ConfigError("There is nothing to compare on: no items, no text, no odd inputs.")
    return Work(
        questions=questions, passages=passages, edges=edges, tokenizer=tokenizer, notes=notes
    )


def _check_tokenizers(tokenizer: Any, candidate: Side, items: Sequence[Item]) -> None:
    theirs = load_tokenizer(Path(candidate.name))
    if theirs is None:
        return
    for item in items[:: max(1, len(items) // 50)]:
        ours = make_question(tokenizer, item)
        if make_question(theirs, item).ids != ours.ids:
            raise ConfigError(
                f"The tokenizers of base and candidate read item '{item.name}' differently. "
                "Compare a model with its own quantized version, with the same tokenizer files."
            )


def _context(local: list[Side]) -> int | None:
    """Give the most tokens that all models' positions allow; None where nothing limits them."""
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
    """Refuse what the models' positions do not reach."""
    if context is None:
        return
    for question in questions:
        item = question.item
        behind = max(map(len, question.choices)) if item.choices else item.max_new_tokens
        if len(question.ids) + behind > context:
            raise ConfigError(
                f"Item '{item.name}' takes {len(question.ids)} tokens and {behind} for its answer; "
                f"the models take {context} in all. Shorten it, or lower its max_new_tokens."
            )
    longest = max((len(p.ids) for p in passages), default=0)
    if longest > context:
        raise ConfigError(
            f"A window of running text has {longest} tokens; the models take {context}. Use window "
            f"{context} or less."
        )


def _longest(context: int | None, config: CompareConfig, notes: list[str]) -> int:
    """Give the tokens of the longest odd input."""
    context = config.longest_edge if context is None else context
    if context > config.longest_edge:
        notes.append(
            f"The longest odd input has {config.longest_edge} tokens, not the {context} that the "
            "model takes; --longest changes that."
        )
    return min(context, config.longest_edge)


def _open_model(side: Side, config: CompareConfig, work: Work) -> Respondent:
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
    work: Work,
    config: CompareConfig,
    tell: Progress,
    *,
    against: Side | None,
) -> tuple[Any, LayerErrors | None]:
    """Let one model answer everything, then drop it."""
    role = "base" if against is None else "candidate"

    @functools.cache
    def load() -> Respondent:
        tell(f"{role}: loading", 0, 1)
        return _open_model(side, config, work)

    def load_local() -> LocalModel:
        model = load()
        assert isinstance(model, LocalModel)
        return model

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: tell(f"{role}: {what}", done, total)

    interview = Interview(load, side.cache.answers)
    start = time.monotonic()
    side.answers = interview.ask(work.questions, config.batch_size, told("tasks"))
    side.edge_answers = interview.ask_edges(
        work.edges, config.batch_size, config.seed, told("odd inputs")
    )
    compared, layers = None, None
    if work.passages and against is None:
        predict_base(load_local, side.cache, work.passages, told("text"))
        with _aside(work, "Errors by layer were not measured"):
            keep_base_layers(load_local, side.cache, work.passages)
    elif work.passages and against is not None:
        compared = compare_candidate(
            load_local, side.cache, against.cache, work.passages, told("text")
        )
        with _aside(work, "Errors by layer were not measured"):
            layers = measure_layers(load_local(), against.cache, work.passages)
    if side.is_local:
        predicted = interview.predict_edges(
            work.edges, side.cache, None if against is None else against.cache
        )
        side.edge_finite = [finite for finite, _ in predicted]
        side.edge_kl = [kl for _, kl in predicted]
    if against is None:
        interview.repeat(work.questions, config.noise_items, config.noise_batch_size)
    side.cost = Cost(
        name=side.name,
        seconds=time.monotonic() - start,
        tokens=interview.tokens,
        reused=interview.reused,
    )
    load.cache_clear()
    for one in (side, *([] if against is None else [against])):
        one.cache.drop_head()
    return compared, layers


@contextmanager
def _aside(work: Work, what: str) -> Iterator[None]:
    """Let something that the verdict can do without fail with a note."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it is noted, and hours of answers are not lost
        work.notes.append(f"{what}: {first_line(error)}.")


def _with_memory(side: Side, work: Work, config: CompareConfig, peak: int) -> None:
    """Put the memory of a model's run, and what was planned for it, into its cost."""
    assert side.cost is not None
    if not side.is_local or not side.cost.tokens:
        return
    side.cost = replace(
        side.cost,
        weight_bytes=sum(p.stat().st_size for p in Path(side.name).glob("*.safetensors")),
        peak_memory_bytes=peak,
    )
    with _aside(work, f"The memory of {side.name} was not planned"):
        side.cost = replace(side.cost, planned_bytes=_planned_bytes(side, work, config))


def _planned_bytes(side: Side, work: Work, config: CompareConfig) -> int:
    """Say what the plan gives for the largest batch, or the longest text, of a run."""
    asked = max((len(q.ids) + q.item.max_new_tokens for q in work.questions), default=0)
    read = max((len(p.ids) for p in work.passages), default=0)
    odd = max((len(e.question.ids) for e in work.edges), default=0)
    batch = config.batch_size * asked >= max(read, odd)
    return plan_for(
        read_shapes(side.name),
        config.batch_size if batch else 1,
        asked if batch else max(read, odd),
        1,
        work.dtypes.get(side.name, "float32"),
        resolve_device(config.device).type,
        unpacked=side.name in work.unpacked,
    ).total
