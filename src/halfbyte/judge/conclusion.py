"""Computes the result from both models' answers: grades, flips by slice, examples, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from halfbyte.judge.answers import Answer
from halfbyte.judge.checks import PythonCheck
from halfbyte.judge.comparison import Comparison, Example, Generation, NoiseFloor, WrittenItem
from halfbyte.judge.edge_cases import (
    EdgeCase,
    EdgeOutcome,
    edge_flips,
    first_difference,
    judge_edge,
    summarize_kinds,
)
from halfbyte.judge.fidelity import PassageComparison, TextFidelity, summarize
from halfbyte.judge.interview import is_correct, repeat_prefix
from halfbyte.judge.layers import LayerErrors
from halfbyte.judge.questions import Question
from halfbyte.judge.setup import CompareConfig, Side, Workload
from halfbyte.judge.statistics import count_flips
from halfbyte.judge.tasks import Item
from halfbyte.judge.verdict import Evidence, Margins, SliceResult, decide, measure_slice
from halfbyte.machine.facts import installed_versions, machine_facts

MAX_EXAMPLES = 20


def conclude(
    sides: Sequence[Side],
    work: Workload,
    config: CompareConfig,
    functions: Mapping[str, PythonCheck],
    passages: Sequence[PassageComparison] | None,
    layers: LayerErrors | None,
) -> Comparison:
    """Grade and compare the answers, and reach a verdict.

    Args:
        sides: The base and the candidate, with their answers.
        work: Questions, passages and edge cases.
        config: Margins and sizes.
        functions: Python functions that checks refer to by name.
        passages: Comparison on running text; None if there was none.
        layers: Errors by layer; None if they were not measured.

    Returns:
        The result.
    """
    base, candidate = sides
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
        clean = sum(not o.base_finds for o in outcomes)
        edges = measure_slice("edge cases without an issue", flips, clean, config.margins)
    noise = _noise_floor(work.questions, base, grades[0], functions, config, text)
    num_nonfinite = sum(
        base.answers[q.key].finite and not candidate.answers[q.key].finite for q in work.questions
    ) + sum("not numbers" in o.new_finds for o in outcomes)
    evidence = Evidence(
        overall=overall,
        slices=slices,
        edges=edges,
        text=text,
        layers=layers,
        num_nonfinite=num_nonfinite,
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
        notes=tuple(dict.fromkeys(work.notes)),
        settings={
            "window": config.window,
            "windows": config.windows,
            "batch_size": config.batch_size,
            "dtype": config.dtype,
            "device": config.device,
            "seed": config.seed,
        },
        items=_written_items(work.questions, candidate, grades),
        base_files=base.files,
        candidate_files=candidate.files,
        versions=installed_versions(),
        machine=machine_facts(),
    )


def _grade(
    questions: list[Question], sides: Sequence[Side], functions: Mapping[str, PythonCheck]
) -> list[list[bool]]:
    return [[is_correct(q, side.answers[q.key], functions) for q in questions] for side in sides]


def _slice(
    questions: list[Question], grades: list[list[bool]], margins: Margins
) -> tuple[SliceResult | None, tuple[SliceResult, ...]]:
    """Measure all items together and each slice of them."""
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
    # A slice of all items would repeat the overall result.
    slices = [s for s in slices if s.flips.num_items < len(questions)]
    return measure("all items", every), tuple(slices)


def _judge_edges(
    cases: list[EdgeCase], base: Side, candidate: Side, text: TextFidelity | None
) -> list[EdgeOutcome]:
    outcomes = []
    for row, case in enumerate(cases):
        outcomes.append(
            judge_edge(
                case,
                base.edge_answers[row],
                candidate.edge_answers[row],
                kl_nats=candidate.edge_kl[row] if candidate.edge_kl else None,
                usual_kl_nats=None if text is None else text.kl_nats,
                base_finite=base.edge_finite[row] if base.edge_finite else True,
                candidate_finite=candidate.edge_finite[row] if candidate.edge_finite else True,
            )
        )
    return outcomes


def _generation(questions: list[Question], base: Side, candidate: Side) -> Generation | None:
    pairs = [
        (base.answers[q.key], candidate.answers[q.key]) for q in questions if not q.item.choices
    ]
    if not pairs:
        return None
    indices = [first_difference(a.ids, b.ids) for a, b in pairs if a.ids and b.ids]
    differing = [index for index in indices if index is not None]
    return Generation(
        num_items=len(pairs),
        identical=sum(a.text == b.text for a, b in pairs),
        median_first_difference=median(differing) if differing else None,
    )


def _noise_floor(
    questions: list[Question],
    base: Side,
    grades: list[bool],
    functions: Mapping[str, PythonCheck],
    config: CompareConfig,
    text: TextFidelity | None,
) -> NoiseFloor | None:
    cached, prefix = base.cache.answers, repeat_prefix(config.noise_batch_size)
    rows = [row for row, q in enumerate(questions) if prefix + q.key in cached]
    if not rows:
        return None
    again = [Answer.from_dict(cached.get(prefix + questions[r].key)) for r in rows]
    correct = [is_correct(questions[r], a, functions) for r, a in zip(rows, again, strict=True)]
    written = [
        (a, base.answers[questions[r].key])
        for r, a in zip(rows, again, strict=True)
        if not questions[r].item.choices
    ]
    return NoiseFloor(
        num_items=len(rows),
        identical_texts=sum(a.text == b.text for a, b in written) + len(rows) - len(written),
        flips=count_flips([grades[row] for row in rows], correct),
        batch_size=config.noise_batch_size,
        kl_nats=None if text is None else text.noise_kl_nats,
        kl_largest=None if text is None else text.noise_kl_largest,
    )


def _examples(
    questions: list[Question], base: Side, candidate: Side, grades: list[list[bool]]
) -> tuple[Example, ...]:
    """Return examples of harmful flips, then of beneficial ones, then of other differences."""
    kinds: dict[str, list[Example]] = {"harmful": [], "beneficial": [], "same": []}
    for question, base_right, candidate_right in zip(questions, *grades, strict=True):
        a, b = base.answers[question.key], candidate.answers[question.key]
        if base_right == candidate_right:
            kind = "same"
        else:
            kind = "harmful" if base_right else "beneficial"
        texts = [_answer_text(question, answer) for answer in (a, b)]
        if kind == "same" and texts[0] == texts[1]:
            continue
        kinds[kind].append(
            Example(
                name=question.item.name,
                kind=kind,
                prompt=question.item.shown_prompt,
                expected=_expected_text(question.item),
                base_text=texts[0],
                candidate_text=texts[1],
                first_difference=first_difference(a.ids, b.ids) if a.ids and b.ids else None,
            )
        )
    return tuple([*kinds["harmful"], *kinds["beneficial"], *kinds["same"]][:MAX_EXAMPLES])


def _written_items(
    questions: list[Question], candidate: Side, grades: list[list[bool]]
) -> tuple[WrittenItem, ...]:
    """Collect the candidate's confidence in each generated answer."""
    found = []
    for question, base_right, candidate_right in zip(questions, *grades, strict=True):
        if question.item.choices:
            continue
        answer = candidate.answers[question.key]
        found.append(
            WrittenItem(
                name=question.item.name,
                document=question.item.document,
                base_right=base_right,
                candidate_right=candidate_right,
                candidate_text=answer.text,
                candidate_logprobs=answer.logprobs,
                candidate_entropies=answer.entropies,
            )
        )
    return tuple(found)


def _answer_text(question: Question, answer: Answer) -> str:
    if not question.item.choices:
        return answer.text
    best = max(range(len(answer.choice_nats)), key=lambda i: answer.choice_nats[i])
    return question.item.choices[best]


def _expected_text(item: Item) -> str:
    if item.choices:
        return item.choices[item.right_choice]
    assert item.check is not None
    value = item.check.value
    return str(value) if item.check.kind == "equals" else f"{item.check.kind}: {value}"
