"""The entry: compare a candidate with its base, and say whether it may replace it.

::

    items, texts, odd inputs -> token ids -> base runs, is kept and dropped -> candidate runs
      -> grades, flips, divergence, layers -> verdict -> Comparison
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluate.loading import first_line, load_tokenizer, open_subject
from halfbyte.judge.answers import Answer, Respondent
from halfbyte.judge.builtin_tasks import ITEMS_PER_TASK, builtin_tasks
from halfbyte.judge.checks import PythonCheck
from halfbyte.judge.comparison import Comparison, Cost, Example, Generation, NoiseFloor
from halfbyte.judge.edge_cases import (
    EdgeCase,
    EdgeOutcome,
    build_edge_cases,
    edge_flips,
    first_difference,
    judge_edge,
    summarize_kinds,
)
from halfbyte.judge.fidelity import TextFidelity, compare_candidate, predict_base, summarize
from halfbyte.judge.interview import Interview, is_right
from halfbyte.judge.layers import LayerErrors, keep_base_layers, measure_layers
from halfbyte.judge.local_model import LocalModel, unpack_reference_linears
from halfbyte.judge.meter import MemoryMeter, release_memory
from halfbyte.judge.model_cache import ModelCache, default_cache, digest_model
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
from halfbyte.judge.statistics import count_flips
from halfbyte.judge.tasks import Item
from halfbyte.judge.verdict import Evidence, Margins, SliceResult, decide, measure_slice
from halfbyte.plan.shapes import read_shapes
from halfbyte.quantize.provenance import installed_versions, machine_facts

EXAMPLES_SHOWN = 20
LONGEST_EDGE = 8192
"""Tokens of the longest odd input, even where the model takes more: time grows with its square."""

MEMORY_SAMPLE_SECONDS = 0.05

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and (done, in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """What is compared and how."""

    margins: Margins = field(default_factory=Margins)
    builtin_items: int = ITEMS_PER_TASK
    """Of each built-in task; only where no task files are given, or asked for beside them."""
    edge_cases: bool = True
    longest_edge: int = LONGEST_EDGE
    window: int = 256
    """Tokens per window of running text."""
    windows: int | None = 20
    """Of each kind of text; None: all."""
    batch_size: int = 8
    """Questions that run together."""
    noise_batch_size: int = 3
    """The same in the base's second run."""
    noise_items: int = 40
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "noise_batch_size", "longest_edge"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.noise_batch_size == self.batch_size:
            object.__setattr__(self, "noise_batch_size", self.batch_size + 1)


@dataclass(slots=True, kw_only=True)
class _Work:
    """What both models are asked."""

    questions: list[Question]
    passages: list[Passage]
    edges: list[EdgeCase]
    tokenizer: Any
    notes: list[str]
    dtypes: dict[str, str] = field(default_factory=dict)
    """What each model computed in."""
    unpacked: set[str] = field(default_factory=set)
    """Models whose weights were unpacked to run them."""


@dataclass(slots=True, kw_only=True)
class _Side:
    """One model: where it is, and what it answered."""

    name: str
    cache: ModelCache
    answers: dict[str, Answer] = field(default_factory=dict)
    edge_answers: list[Answer] = field(default_factory=list)
    edge_finite: list[bool] = field(default_factory=list)
    edge_kl: list[float | None] = field(default_factory=list)
    cost: Cost | None = None

    @property
    def is_local(self) -> bool:
        return not is_address(self.name)


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
        ConfigError: A setting, or models that do not share a tokenizer.
        ModelError: A model cannot be loaded or reached.
    """
    config = config or CompareConfig()
    tell = progress or (lambda what, done, total: None)
    root = Path(cache) if cache is not None else default_cache()
    sides = [
        _Side(name=str(name), cache=_open_cache(root, str(name), config, fresh=fresh))
        for name, fresh in ((base, is_address(str(base)) and not resume), (candidate, not resume))
    ]
    if sides[0].cache.folder == sides[1].cache.folder:
        # A model against itself: what it answers now must not be what it answered before.
        sides[1].cache = ModelCache(root, sides[1].cache.folder.name + "-again", fresh=not resume)
    work = _prepare(sides, items, documents, config)
    functions = functions or {}
    compared: tuple[Any, LayerErrors | None] = (None, None)
    for side, against in ((sides[0], None), (sides[1], sides[0])):
        release_memory()
        with MemoryMeter().watch(MEMORY_SAMPLE_SECONDS) as seen:
            compared = _run_side(side, work, config, tell, against=against)
        _with_memory(side, work, config, max(seen()))
    return _conclude(sides, work, config, functions, compared)


def _open_cache(root: Path, name: str, config: CompareConfig, *, fresh: bool) -> ModelCache:
    if is_address(name):
        return ModelCache(root, f"served-{digest(name)}", fresh=fresh)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        open_subject(folder)  # raises with the reason
    device = config.device if config.device != "auto" else _auto_device()
    key = f"{digest_model(folder)[:32]}-{config.dtype}-{device.partition(':')[0]}"
    return ModelCache(root, key, fresh=fresh)


def _auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _prepare(
    sides: list[_Side],
    items: Sequence[Item] | None,
    documents: Mapping[str, Iterable[str]] | None,
    config: CompareConfig,
) -> _Work:
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
            + (f"; {skipped} items with choices were left out." if skipped else ".")
        )
    questions = [make_question(tokenizer, item) for item in items]
    passages: list[Passage] = []
    if len(local) == 2:
        texts = builtin_documents() if documents is None else documents
        passages = make_passages(tokenizer, texts, window=config.window, limit=config.windows)
    edges: list[EdgeCase] = []
    if config.edge_cases:
        longest = _longest(local, config, notes) if len(local) == 2 else None
        has_chat = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
        edges = build_edge_cases(tokenizer, longest, chat=has_chat)
    if not questions and not passages and not edges:
        raise ConfigError("There is nothing to compare on: no items, no text, no odd inputs.")
    return _Work(
        questions=questions, passages=passages, edges=edges, tokenizer=tokenizer, notes=notes
    )


def _check_tokenizers(tokenizer: Any, candidate: _Side, items: Sequence[Item]) -> None:
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


def _longest(local: list[_Side], config: CompareConfig, notes: list[str]) -> int | None:
    from transformers import AutoConfig

    limits = []
    for side in local:
        try:
            values = AutoConfig.from_pretrained(side.name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"Cannot read the config of '{side.name}': {first_line(error)}"
            ) from error
        limit = getattr(values.get_text_config(), "max_position_embeddings", None)
        limits += [limit] if isinstance(limit, int) and limit > 0 else []
    context = min(limits, default=config.longest_edge)
    if context > config.longest_edge:
        notes.append(
            f"The longest odd input has {config.longest_edge} tokens, not the {context} that the "
            "model takes; --longest changes that."
        )
    return min(context, config.longest_edge)


def _open_model(side: _Side, config: CompareConfig, work: _Work) -> Respondent:
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
    side: _Side,
    work: _Work,
    config: CompareConfig,
    tell: Progress,
    *,
    against: _Side | None,
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
        keep_base_layers(load_local, side.cache, work.passages)
    elif work.passages and against is not None:
        compared = compare_candidate(
            load_local, side.cache, against.cache, work.passages, told("text")
        )
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


def _with_memory(side: _Side, work: _Work, config: CompareConfig, peak: int) -> None:
    """Put the memory of a model's run, and what was planned for it, into its cost."""
    assert side.cost is not None
    if not side.is_local or not side.cost.tokens:
        return
    shapes = read_shapes(side.name)
    asked = max((len(q.ids) + q.item.max_new_tokens for q in work.questions), default=0)
    read = max((len(p.ids) for p in work.passages), default=0)
    odd = max((len(e.question.ids) for e in work.edges), default=0)
    batch = config.batch_size * asked >= max(read, odd)
    planned = plan_for(
        shapes,
        config.batch_size if batch else 1,
        asked if batch else max(read, odd),
        1,
        work.dtypes.get(side.name, "float32"),
        "cpu" if _auto_device() == "cpu" else config.device,
        unpacked=side.name in work.unpacked,
    )
    side.cost = replace(
        side.cost,
        weight_bytes=sum(p.stat().st_size for p in Path(side.name).glob("*.safetensors")),
        peak_memory_bytes=peak,
        planned_bytes=planned.total,
    )


def _conclude(
    sides: list[_Side],
    work: _Work,
    config: CompareConfig,
    functions: Mapping[str, PythonCheck],
    compared: tuple[Any, LayerErrors | None],
) -> Comparison:
    base, candidate = sides
    passages, layers = compared
    text: TextFidelity | None = None
    if passages is not None:
        text = summarize(
            work.passages,
            passages,
            confidence=config.margins.confidence,
            base=base.cache,
            tokenizer=work.tokenizer,
        )
    grades = _grade(work.questions, sides, functions)
    overall, slices = _slice(work.questions, grades, config.margins)
    outcomes = _judge_edges(work.edges, base, candidate, text)
    edges = None
    if outcomes:
        flips = edge_flips(outcomes)
        clean = sum(not [f for f in o.base_finds if f != "far"] for o in outcomes)
        edges = measure_slice("odd inputs", flips, clean, config.margins)
    noise = _noise_floor(work.questions, base, grades[0], functions, config, text)
    bad = sum(
        base.answers[q.key].finite and not candidate.answers[q.key].finite for q in work.questions
    ) + sum("not numbers" in o.new_finds for o in outcomes)
    evidence = Evidence(
        overall=overall, slices=slices, edges=edges, text=text, layers=layers, not_numbers=bad
    )
    verdict, evidence = decide(evidence, config.margins)
    return Comparison(
        base=base.name,
        candidate=candidate.name,
        verdict=verdict,
        margins=config.margins,
        overall=evidence.overall,
        slices=evidence.slices,
        text=text,
        generation=_generation(work.questions, base, candidate),
        edge_kinds=summarize_kinds(outcomes),
        edge_outcomes=tuple(outcomes),
        edges=evidence.edges,
        layers=layers,
        noise=noise,
        examples=_examples(work.questions, base, candidate, grades),
        costs=tuple(side.cost for side in sides if side.cost is not None),
        notes=tuple(work.notes),
        settings={
            "window": config.window,
            "windows": config.windows,
            "batch_size": config.batch_size,
            "dtype": config.dtype,
            "device": config.device,
            "seed": config.seed,
        },
        versions=installed_versions(),
        machine=machine_facts(),
    )


def _grade(
    questions: list[Question], sides: list[_Side], functions: Mapping[str, PythonCheck]
) -> list[list[bool]]:
    return [[is_right(q, side.answers[q.key], functions) for q in questions] for side in sides]


def _slice(
    questions: list[Question], grades: list[list[bool]], margins: Margins
) -> tuple[SliceResult | None, tuple[SliceResult, ...]]:
    """Divide the items by every key of their slices."""
    if not questions:
        return None, ()

    def measure(name: str, rows: list[int]) -> SliceResult:
        base, candidate = ([side[row] for row in rows] for side in grades)
        flips = count_flips(base, candidate, [questions[row].item.document for row in rows])
        return measure_slice(name, flips, sum(base), margins)

    every = list(range(len(questions)))
    groups: dict[tuple[str, str], list[int]] = {}
    for row, question in enumerate(questions):
        for key, value in question.item.slices.items():
            groups.setdefault((key, value), []).append(row)
    slices = [measure(f"{key} {value}", rows) for (key, value), rows in sorted(groups.items())]
    # One slice of everything says the same as all items together.
    slices = [s for s in slices if s.flips.num_items < len(questions)]
    return measure("all items", every), tuple(slices)


def _judge_edges(
    cases: list[EdgeCase], base: _Side, candidate: _Side, text: TextFidelity | None
) -> list[EdgeOutcome]:
    outcomes = []
    for row, case in enumerate(cases):
        known = bool(candidate.edge_kl)
        outcomes.append(
            judge_edge(
                case,
                base.edge_answers[row],
                candidate.edge_answers[row],
                kl_nats=candidate.edge_kl[row] if known else None,
                usual_kl_nats=None if text is None else text.kl_nats,
                base_finite=base.edge_finite[row] if base.edge_finite else True,
                candidate_finite=candidate.edge_finite[row] if candidate.edge_finite else True,
            )
        )
    return outcomes


def _generation(questions: list[Question], base: _Side, candidate: _Side) -> Generation | None:
    pairs = [
        (base.answers[q.key], candidate.answers[q.key]) for q in questions if not q.item.choices
    ]
    if not pairs:
        return None
    places = [first_difference(a.ids, b.ids) for a, b in pairs if a.ids and b.ids]
    differing = [place for place in places if place is not None]
    return Generation(
        num_items=len(pairs),
        identical=sum(a.text == b.text for a, b in pairs),
        median_first_difference=median(differing) if differing else None,
    )


def _noise_floor(
    questions: list[Question],
    base: _Side,
    grades: list[bool],
    functions: Mapping[str, PythonCheck],
    config: CompareConfig,
    text: TextFidelity | None,
) -> NoiseFloor | None:
    rows = [row for row, q in enumerate(questions) if f"again {q.key}" in base.cache.answers]
    if not rows:
        return None
    again = [Answer.from_dict(base.cache.answers.get(f"again {questions[r].key}")) for r in rows]
    right = [is_right(questions[r], a, functions) for r, a in zip(rows, again, strict=True)]
    written = [
        (a, base.answers[questions[r].key])
        for r, a in zip(rows, again, strict=True)
        if not questions[r].item.choices
    ]
    return NoiseFloor(
        num_items=len(rows),
        identical_texts=sum(a.text == b.text for a, b in written) + len(rows) - len(written),
        flips=count_flips([grades[row] for row in rows], right),
        batch_size=config.noise_batch_size,
        kl_nats=None if text is None else text.noise_kl_nats,
        kl_largest=None if text is None else text.noise_kl_largest,
    )


def _examples(
    questions: list[Question], base: _Side, candidate: _Side, grades: list[list[bool]]
) -> tuple[Example, ...]:
    """Show harmful flips first, then beneficial ones, then other differences."""
    kinds: dict[str, list[Example]] = {"harmful": [], "beneficial": [], "same": []}
    for question, ours, theirs in zip(questions, *grades, strict=True):
        a, b = base.answers[question.key], candidate.answers[question.key]
        kind = "same" if ours == theirs else "harmful" if ours else "beneficial"
        texts = [_shown(question, answer) for answer in (a, b)]
        if kind == "same" and texts[0] == texts[1]:
            continue
        kinds[kind].append(
            Example(
                name=question.item.name,
                kind=kind,
                prompt=question.item.shown_prompt,
                expected=_expected(question.item),
                base_text=texts[0],
                candidate_text=texts[1],
                first_difference=first_difference(a.ids, b.ids) if a.ids and b.ids else None,
            )
        )
    return tuple([*kinds["harmful"], *kinds["beneficial"], *kinds["same"]][:EXAMPLES_SHOWN])


def _shown(question: Question, answer: Answer) -> str:
    if not question.item.choices:
        return answer.text
    best = max(range(len(answer.choice_nats)), key=lambda i: answer.choice_nats[i])
    return question.item.choices[best]


def _expected(item: Item) -> str:
    if item.choices:
        return item.choices[item.right_choice]
    assert item.check is not None
    value = item.check.value
    return str(value) if item.check.kind == "equals" else f"{item.check.kind}: {value}"
