"""Writes a comparison as one HTML file without scripts or network access.

The page supports light and dark mode, narrow screens and printing.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib import resources

from halfbyte.judge.charts import histogram_chart, interval_chart, layer_chart, line_chart
from halfbyte.judge.comparison import Comparison, Example
from halfbyte.judge.edge_cases import ISSUES, EdgeOutcome
from halfbyte.judge.fidelity import HISTOGRAM_EDGES, TextFidelity
from halfbyte.judge.html_parts import (
    inline,
    last_part,
    make_table,
    mark_differences,
    remark,
    shorten,
    side_by_side,
    visible,
)
from halfbyte.judge.statistics import Interval
from halfbyte.judge.verdict import SliceResult, format_percent, format_points
from halfbyte.units import format_bytes, format_seconds

MAX_SUSPECTS = 12
WORST_LINEARS = 8


def write_html(comparison: Comparison) -> str:
    """Write a comparison as a complete page.

    Args:
        comparison: The result.

    Returns:
        HTML.
    """
    sections = [
        ("evidence", "Requirements", _claims(comparison)),
        ("tasks", "Tasks", _tasks(comparison)),
        ("text", "Running text", _text(comparison)),
        ("layers", "Error by layer", _layers(comparison)),
        ("examples", "Different answers", _examples(comparison)),
        ("edges", "Edge cases", _edges(comparison)),
        ("cost", "Memory and speed", _cost(comparison)),
        ("run", "Settings and environment", _run(comparison)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    body = "".join(f'<h2 id="{key}">{title}</h2>{text}' for key, title, text in shown)
    style = resources.files("halfbyte.judge").joinpath("report.css").read_text(encoding="utf-8")
    verdict = comparison.verdict
    outcome = verdict.outcome.value
    candidate, base = escape(comparison.candidate), escape(comparison.base)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{outcome}: {candidate}</title><style>{style}</style></head><body><main>"
        f"<h1>May {candidate} replace {base}?</h1>"
        f'<div class="verdict {outcome}"><div class="word">{outcome.capitalize()}</div>'
        f"<p>{escape(verdict.sentence)}</p></div>"
        f"<nav>{links}</nav>{body}</main></body></html>\n"
    )


def _claims(comparison: Comparison) -> str:
    rows = []
    for claim in comparison.verdict.claims:
        advice = f'<br><span class="soft">{escape(claim.advice)}</span>' if claim.advice else ""
        word = f'<span class="{claim.outcome.value}">{claim.outcome.value}</span>'
        rows.append([escape(claim.name), word, escape(claim.found) + advice])
    margins = comparison.margins
    note = (
        f"A candidate that truly loses more than a margin passes with a probability of at most "
        f"{100 * margins.alpha:g}%; one that is within all margins fails with a probability of at "
        f"most {100 * margins.alpha:g}%. Ranges in brackets are {100 * margins.confidence:g}% "
        "confidence intervals."
    )
    return make_table(["requirement", "outcome", "evidence"], rows, kind="prose") + remark(note)


def _tasks(comparison: Comparison) -> str:
    overall = comparison.overall
    if overall is None:
        return ""
    flips = overall.flips
    base_right = round(overall.base_accuracy * flips.num_items)
    both_right = base_right - flips.harmful
    both_wrong = flips.num_items - both_right - flips.harmful - flips.beneficial
    grid = make_table(
        ["", "candidate right", "candidate wrong"],
        [
            ["base right", f"{both_right:,}", f"{flips.harmful:,} (harmful flips)"],
            ["base wrong", f"{flips.beneficial:,} (beneficial flips)", f"{both_wrong:,}"],
        ],
    )
    slices = [overall, *comparison.slices]
    margins = [comparison.margins.accuracy, *[comparison.margins.slices] * len(comparison.slices)]
    table = make_table(
        [
            "slice",
            "items",
            "base",
            "candidate",
            "difference",
            "harmful / beneficial flips",
            "McNemar p",
            "harm p",
        ],
        [_slice_row(one) for one in slices],
        numbers=range(1, 8),
    )
    text = (
        "The dashed line is the margin. An interval entirely to its right shows that the loss is "
        "smaller than the margin, one entirely to its left that it is larger. McNemar p is the "
        "exact p-value for any difference; harm p is the p-value for a loss beyond the margin, "
        "adjusted for all tests (Holm)."
    )
    return grid + interval_chart(slices, margins) + table + remark(text) + _generation(comparison)


def _slice_row(one: SliceResult) -> list[str]:
    harm = "not tested" if one.harm_p is None else f"{one.harm_p:.2g}"
    return [
        escape(one.name),
        f"{one.flips.num_items:,}",
        format_percent(one.base_accuracy),
        format_percent(one.candidate_accuracy),
        f"{format_points(one.flips.difference)} {_format_interval(one.interval)}",
        f"{one.flips.harmful} / {one.flips.beneficial}",
        f"{one.mcnemar_p:.2g}",
        harm,
    ]


def _format_interval(interval: Interval) -> str:
    return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _generation(comparison: Comparison) -> str:
    parts = []
    generation, noise = comparison.generation, comparison.noise
    if generation is not None:
        text = (
            f"{generation.identical} of {generation.num_items} generated answers are identical in "
            "both models"
        )
        median = generation.median_first_difference
        if median is not None:
            text += f"; the others differ after a median of {median:g} tokens"
        parts.append(f"<p>{text}.</p>")
    if noise is not None:
        parts.append(
            f"<p>Noise floor: when the base repeats {noise.num_items} answers in batches of "
            f"{noise.batch_size}, {noise.identical_texts} are identical, and "
            f"{noise.flips.harmful + noise.flips.beneficial} flip between right and wrong.</p>"
        )
    return "".join(parts)


def _text(comparison: Comparison) -> str:
    text = comparison.text
    if text is None:
        return ""
    note = (
        f"{text.num_tokens:,} tokens of {text.num_documents} documents; confidence intervals are "
        "over documents. The KL divergence is shown as a warning sign and does not affect the "
        "verdict."
    )
    return (
        _fidelity_table(text)
        + remark(note)
        + "<h3>KL divergence per token</h3>"
        + histogram_chart(text.kl_histogram, HISTOGRAM_EDGES)
        + "<h3>By kind of text</h3>"
        + _kinds_table(text)
        + "<h3>Tokens with the largest divergence</h3>"
        + _worst_table(text)
    )


def _fidelity_table(text: TextFidelity) -> str:
    rows = [
        ["KL(base || candidate), nats per token", _value(text.kl_nats, text.kl_interval, 4)],
        ["top-1 agreement", _share(text.top1_agreement, text.top1_interval)],
        ["perplexity of the base", f"{text.base_perplexity:.3f}"],
        ["perplexity of the candidate", f"{text.candidate_perplexity:.3f}"],
        [
            "perplexity, candidate / base",
            _value(text.perplexity_ratio, text.perplexity_ratio_interval, 4),
        ],
    ]
    rows += [
        ["KL, maximum" if name == "100" else f"KL, {name}th percentile", f"{value:.3g}"]
        for name, value in text.kl_percentiles.items()
    ]
    if text.noise_kl_nats is not None and text.noise_kl_largest is not None:
        rows.append(
            [
                "noise floor: KL of the base against itself in another batch, mean and maximum",
                f"{text.noise_kl_nats:.1e}, {text.noise_kl_largest:.1e}",
            ]
        )
    return make_table(["", "value"], rows, numbers=[1])


def _kinds_table(text: TextFidelity) -> str:
    return make_table(
        ["kind", "tokens", "documents", "KL", "top-1 agreement", "perplexity"],
        [
            [
                escape(k.kind),
                f"{k.num_tokens:,}",
                str(k.num_documents),
                f"{k.kl_nats:.4f}",
                format_percent(k.top1_agreement),
                f"{k.base_perplexity:.2f} → {k.candidate_perplexity:.2f}",
            ]
            for k in text.by_kind
        ],
        numbers=range(1, 6),
    )


def _worst_table(text: TextFidelity) -> str:
    return make_table(
        ["KL", "preceding text", "next token", "base", "candidate"],
        [
            [f"{w.kl_nats:.2f}", *(inline(t) for t in (w.before, w.actual, w.base, w.candidate))]
            for w in text.worst
        ],
        numbers=range(1),
    )


def _value(value: float, interval: Interval | None, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    if interval is None:
        return shown
    return f"{shown} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _share(value: float, interval: Interval | None) -> str:
    if interval is None:
        return format_percent(value)
    return (
        f"{format_percent(value)} [{format_percent(interval.low)}, {format_percent(interval.high)}]"
    )


def _layers(comparison: Comparison) -> str:
    layers = comparison.layers
    if layers is None or not layers.linears:
        return ""
    worst = sorted(layers.linears, key=lambda linear: (not linear.suspect, -linear.error))
    shown = worst[: max(WORST_LINEARS, min(len(layers.suspects), MAX_SUSPECTS))]
    table = make_table(
        ["linear", "error", "gain", "outlier"],
        [
            [escape(one.name), f"{one.error:.4f}", f"{one.gain:.4f}", escape(one.suspect) or "no"]
            for one in shown
        ],
        numbers=(1, 2),
    )
    text = (
        "Each linear of the candidate runs on the inputs of the base's own linear. The error is "
        "the relative distance of its outputs; darker means larger. Outlined linears are outliers "
        "among the same linears of other blocks. The gain is the scale at which the base's outputs "
        "appear in the candidate's; without a scaling error it is close to 1."
    )
    return (
        layer_chart(layers)
        + remark(text)
        + "<h3>Largest errors</h3>"
        + table
        + "<h3>Relative distance of the hidden states after each block (errors add up)</h3>"
        + line_chart(layers.block_errors)
    )


def _examples(comparison: Comparison) -> str:
    return "".join(_example(example) for example in comparison.examples)


def _example(example: Example) -> str:
    words = {"harmful": "harmful flip", "beneficial": "beneficial flip", "same": "no flip"}
    base, candidate = mark_differences(shorten(example.base_text), shorten(example.candidate_text))
    index = example.first_difference
    position = "" if index is None else f"; first different token: number {index + 1}"
    return (
        f"<h3>{escape(example.name)} <span class='soft'>{words[example.kind]}{position}</span></h3>"
        f"<pre><bdi>{escape(visible(last_part(example.prompt)))}</bdi></pre>"
        f'<p class="soft">expected: <bdi>{escape(visible(shorten(example.expected)))}</bdi></p>'
        f"{side_by_side(base, candidate)}"
    )


def _edges(comparison: Comparison) -> str:
    if not comparison.edge_kinds:
        return ""
    rows = []
    for kind in comparison.edge_kinds:
        rows.append(
            [
                escape(kind.kind),
                str(kind.num_cases),
                _issues(kind.base_finds),
                _issues(kind.candidate_finds),
                str(kind.new),
                str(kind.mended),
                "" if kind.kl_nats is None else f"{kind.kl_nats:.3f}",
            ]
        )
    table = make_table(
        ["kind", "cases", "issues, base", "issues, candidate", "new", "fixed", "KL"],
        rows,
        numbers=(1, 4, 5, 6),
    )
    new = [outcome for outcome in comparison.edge_outcomes if outcome.new_finds]
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in ISSUES.items())
    return (
        table
        + remark(
            "new: cases with an issue that only the candidate has. fixed: cases with an issue that "
            f"only the base has. Issues: {meanings}."
        )
        + ("<h3>New issues</h3>" if new else "")
        + "".join(_edge(outcome) for outcome in new)
    )


def _issues(counts: Mapping[str, int]) -> str:
    return escape(", ".join(f"{name} {count}" for name, count in counts.items())) or "none"


def _edge(outcome: EdgeOutcome) -> str:
    base, candidate = mark_differences(shorten(outcome.base_text), shorten(outcome.candidate_text))
    title = f"{escape(outcome.kind)}: {escape(', '.join(outcome.new_finds))}"
    prompt = escape(visible(shorten(outcome.prompt)))
    return (
        f"<details><summary>{title}</summary><pre><bdi>{prompt}</bdi></pre>"
        f"{side_by_side(base, candidate)}</details>"
    )


def _cost(comparison: Comparison) -> str:
    rows = []
    for cost in comparison.costs:
        rate = f"{cost.tokens / cost.seconds:,.0f}" if cost.tokens and cost.seconds > 0 else "–"
        rows.append(
            [
                escape(cost.name),
                _bytes(cost.weight_bytes),
                _bytes(cost.planned_bytes),
                _bytes(cost.peak_memory_bytes),
                format_seconds(cost.seconds),
                rate,
                str(cost.reused),
            ]
        )
    heads = ["model", "weight files", "planned", "peak", "time", "tokens/s", "cached"]
    text = (
        "planned: planned memory of the run's largest batch or longest text, program included. "
        "peak: measured peak memory of the run. tokens/s: tokens of prompts and texts divided by "
        "the whole time, generation included. cached: answers that were taken from the cache. To "
        "measure a given peak load, use halfbyte profile."
    )
    return make_table(heads, rows, numbers=range(1, 7)) + remark(text)


def _bytes(size: int | None) -> str:
    return "–" if size is None else format_bytes(size)


def _run(comparison: Comparison) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in comparison.notes)
    groups = (comparison.settings, comparison.versions, comparison.machine)
    lines = [", ".join(f"{k} {v}" for k, v in group.items()) for group in groups if group]
    return notes + "".join(remark(line) for line in lines)
