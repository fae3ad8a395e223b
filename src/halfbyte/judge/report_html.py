"""A comparison as one HTML file: no script, no network, light and dark, for phone and paper."""

from __future__ import annotations

from html import escape
from importlib import resources

from halfbyte.judge.charts import histogram_chart, interval_chart, layer_chart, line_chart
from halfbyte.judge.comparison import Comparison, Example
from halfbyte.judge.edge_cases import FINDS, EdgeOutcome
from halfbyte.judge.fidelity import HISTOGRAM_EDGES
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
from halfbyte.judge.verdict import SliceResult, percent, points
from halfbyte.units import format_bytes, format_seconds

SUSPECTS_SHOWN = 12
WORST_LINEARS = 8


def write_html(comparison: Comparison) -> str:
    """Write a comparison as a page of its own.

    Args:
        comparison: The result.

    Returns:
        HTML.
    """
    sections = [
        ("evidence", "What must hold", _claims(comparison)),
        ("tasks", "Tasks", _tasks(comparison)),
        ("text", "Running text", _text(comparison)),
        ("layers", "Error by layer", _layers(comparison)),
        ("examples", "Where the answers part", _examples(comparison)),
        ("edges", "Odd inputs", _edges(comparison)),
        ("cost", "Memory and speed", _cost(comparison)),
        ("run", "How this was measured", _run(comparison)),
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
        f"A candidate that truly loses more than a margin passes with a chance of "
        f"{100 * margins.alpha:g}% at most; one that keeps all margins fails with a chance of "
        f"{100 * margins.alpha:g}% at most. Intervals are {100 * margins.confidence:g}% intervals."
    )
    return make_table(["what must hold", "", "found"], rows, kind="prose") + remark(note)


def _tasks(comparison: Comparison) -> str:
    overall = comparison.overall
    if overall is None:
        return ""
    flips = overall.flips
    base_right = round(overall.base_accuracy * flips.num_items)
    both = base_right - flips.harmful
    neither = flips.num_items - both - flips.harmful - flips.beneficial
    grid = make_table(
        ["", "candidate right", "candidate wrong"],
        [
            ["base right", f"{both:,}", f"{flips.harmful:,} (harmful flips)"],
            ["base wrong", f"{flips.beneficial:,} (beneficial flips)", f"{neither:,}"],
        ],
    )
    slices = [overall, *comparison.slices]
    margins = [comparison.margins.accuracy, *[comparison.margins.slices] * len(comparison.slices)]
    table = make_table(
        ["slice", "items", "base", "candidate", "difference", "flips − / +", "McNemar p", "harm p"],
        [_slice_row(one) for one in slices],
        numbers=range(1, 8),
    )
    text = (
        "The dashed line is the margin: an interval wholly to its right shows that the loss is "
        "smaller, one wholly to its left that it is larger. McNemar p is exact and tests any "
        "difference; harm p tests a loss beyond the margin, adjusted for all tests (Holm)."
    )
    return grid + interval_chart(slices, margins) + table + remark(text) + _generation(comparison)


def _slice_row(one: SliceResult) -> list[str]:
    harm = "not tested" if one.harm_p is None else f"{one.harm_p:.2g}"
    return [
        escape(one.name),
        f"{one.flips.num_items:,}",
        percent(one.base_accuracy),
        percent(one.candidate_accuracy),
        f"{points(one.flips.difference)} {_between(one.interval)}",
        f"{one.flips.harmful} / {one.flips.beneficial}",
        f"{one.mcnemar_p:.2g}",
        harm,
    ]


def _between(interval: Interval) -> str:
    return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _generation(comparison: Comparison) -> str:
    parts = []
    made, noise = comparison.generation, comparison.noise
    if made is not None:
        text = (
            f"{made.identical} of {made.num_items} written answers are the same, letter by letter"
        )
        if made.median_first_difference is not None:
            text += f"; the others part after {made.median_first_difference:g} tokens in the median"
        parts.append(f"<p>{text}.</p>")
    if noise is not None:
        parts.append(
            f"<p>Noise floor: the base asked again in batches of {noise.batch_size} gives "
            f"{noise.identical_texts} of {noise.num_items} answers as before, with "
            f"{noise.flips.harmful + noise.flips.beneficial} flips.</p>"
        )
    return "".join(parts)


def _text(comparison: Comparison) -> str:
    text = comparison.text
    if text is None:
        return ""
    rows = [
        ["KL(base || candidate), nats per token", _value(text.kl_nats, text.kl_interval, 4)],
        ["same first choice", _share(text.top1_agreement, text.top1_interval)],
        ["perplexity of the base", f"{text.base_perplexity:.3f}"],
        ["perplexity of the candidate", f"{text.candidate_perplexity:.3f}"],
        ["candidate / base", _value(text.perplexity_ratio, text.perplexity_ratio_interval, 4)],
    ]
    rows += [
        ["KL, largest" if name == "100" else f"KL, {name}% of tokens are below", f"{value:.3g}"]
        for name, value in text.kl_percentiles.items()
    ]
    if text.noise_kl_nats is not None and text.noise_kl_largest is not None:
        rows.append(
            [
                "noise floor: KL of the base against itself in another batch, mean and largest",
                f"{text.noise_kl_nats:.1e}, {text.noise_kl_largest:.1e}",
            ]
        )
    kinds = make_table(
        ["kind", "tokens", "documents", "KL", "same first choice", "perplexity"],
        [
            [
                escape(k.kind),
                f"{k.num_tokens:,}",
                str(k.num_documents),
                f"{k.kl_nats:.4f}",
                percent(k.top1_agreement),
                f"{k.base_perplexity:.2f} → {k.candidate_perplexity:.2f}",
            ]
            for k in text.by_kind
        ],
        numbers=range(1, 6),
    )
    worst = make_table(
        ["KL", "text before", "goes on", "base", "candidate"],
        [
            [f"{w.kl_nats:.2f}", *(inline(t) for t in (w.before, w.actual, w.base, w.candidate))]
            for w in text.worst
        ],
        numbers=range(1),
    )
    note = (
        f"{text.num_tokens:,} tokens of {text.num_documents} documents; intervals are over "
        "documents. The divergence is an alarm, not part of the verdict."
    )
    return (
        make_table(["", "value"], rows, numbers=[1])
        + remark(note)
        + "<h3>Divergence of single tokens</h3>"
        + histogram_chart(text.kl_histogram, HISTOGRAM_EDGES)
        + "<h3>By kind of text</h3>"
        + kinds
        + "<h3>Worst tokens</h3>"
        + worst
    )


def _value(value: float, interval: Interval | None, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    if interval is None:
        return shown
    return f"{shown} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _share(value: float, interval: Interval | None) -> str:
    if interval is None:
        return percent(value)
    return f"{percent(value)} [{percent(interval.low)}, {percent(interval.high)}]"


def _layers(comparison: Comparison) -> str:
    layers = comparison.layers
    if layers is None or not layers.linears:
        return ""
    worst = sorted(layers.linears, key=lambda linear: (not linear.suspect, -linear.error))
    shown = worst[: max(WORST_LINEARS, min(len(layers.suspects), SUSPECTS_SHOWN))]
    table = make_table(
        ["linear", "error", "gain", "stands out"],
        [
            [escape(one.name), f"{one.error:.4f}", f"{one.gain:.4f}", escape(one.suspect) or "no"]
            for one in shown
        ],
        numbers=(1, 2),
    )
    text = (
        "Each linear of the candidate on the base's own inputs: the relative distance of its "
        "outputs, darker is more; framed are those that stand out from their peers in other "
        "blocks. The gain is the size at which the base's outputs are found in the candidate's."
    )
    return (
        layer_chart(layers)
        + remark(text)
        + "<h3>Largest errors</h3>"
        + table
        + "<h3>Distance of the hidden states, all errors before included</h3>"
        + line_chart(layers.block_errors)
    )


def _examples(comparison: Comparison) -> str:
    return "".join(_example(example) for example in comparison.examples)


def _example(example: Example) -> str:
    words = {"harmful": "harmful flip", "beneficial": "beneficial flip", "same": "no flip"}
    base, candidate = mark_differences(shorten(example.base_text), shorten(example.candidate_text))
    where = example.first_difference
    place = "" if where is None else f"; first other token: number {where + 1}"
    return (
        f"<h3>{escape(example.name)} <span class='soft'>{words[example.kind]}{place}</span></h3>"
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
                _finds(kind.base_finds),
                _finds(kind.candidate_finds),
                str(kind.new),
                str(kind.mended),
                "" if kind.kl_nats is None else f"{kind.kl_nats:.3f}",
            ]
        )
    table = make_table(
        ["kind", "inputs", "finds, base", "finds, candidate", "new", "mended", "KL"],
        rows,
        numbers=(1, 4, 5, 6),
    )
    new = [outcome for outcome in comparison.edge_outcomes if outcome.new_finds]
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in FINDS.items())
    return (
        table
        + remark(f"new: inputs with a find that only the candidate has. {meanings}.")
        + ("<h3>New finds</h3>" if new else "")
        + "".join(_edge(outcome) for outcome in new)
    )


def _finds(finds: object) -> str:
    assert isinstance(finds, dict)
    return escape(", ".join(f"{name} {count}" for name, count in finds.items())) or "none"


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
    heads = ["model", "weight files", "planned", "measured", "time", "tokens/s", "reused"]
    text = (
        "planned: what the plan says for the largest batch, or longest text, of this run, program "
        "included. measured: the largest size of this process during it. "
        "tokens/s: prompt tokens over the whole time, writing included. reused: answers that were "
        "in the cache. For a stated peak load: halfbyte profile."
    )
    return make_table(heads, rows, numbers=range(1, 7)) + remark(text)


def _bytes(size: int | None) -> str:
    return "–" if size is None else format_bytes(size)


def _run(comparison: Comparison) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in comparison.notes)
    groups = (comparison.settings, comparison.versions, comparison.machine)
    lines = [", ".join(f"{k} {v}" for k, v in group.items()) for group in groups if group]
    return notes + "".join(remark(line) for line in lines)
