"""Writes a comparison as Markdown for pull requests and as JUnit XML for CI."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from halfbyte.judge.comparison import Comparison
from halfbyte.judge.verdict import Claim, Outcome, format_percent, format_points
from halfbyte.units import format_bytes

MARKS = {Outcome.PASS: "✅", Outcome.FAIL: "❌", Outcome.INCONCLUSIVE: "❔"}
MAX_EXAMPLES = 5
INVALID_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_markdown(comparison: Comparison) -> str:
    """Write a comparison as Markdown.

    Args:
        comparison: The result.

    Returns:
        Headings, tables and a collapsed list of examples.
    """
    verdict = comparison.verdict
    lines = [
        f"### {MARKS[verdict.outcome]} {verdict.outcome.capitalize()}: "
        f"`{comparison.candidate}` compared with `{comparison.base}`",
        "",
        verdict.sentence,
        "",
        "| requirement | outcome | evidence |",
        "|---|---|---|",
    ]
    for claim in verdict.claims:
        evidence = f"{claim.found}. {claim.advice}" if claim.advice else claim.found
        lines.append(f"| {_cell(claim.name)} | {MARKS[claim.outcome]} | {_cell(evidence, 1000)} |")
    lines += [*_slice_lines(comparison), *_text_lines(comparison), *_edge_lines(comparison)]
    lines += _example_lines(comparison)
    for cost in comparison.costs:
        if cost.weight_bytes is not None:
            lines += ["", f"`{cost.name}`: {format_bytes(cost.weight_bytes)} of weights."]
    lines += ["", *(f"Note: {note}" for note in comparison.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _slice_lines(comparison: Comparison) -> list[str]:
    if comparison.overall is None:
        return []
    lines = [
        "",
        "| slice | items | base | candidate | difference | harmful / beneficial flips | harm p |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in (comparison.overall, *comparison.slices):
        interval = f"[{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}]"
        harm = "–" if one.harm_p is None else f"{one.harm_p:.2g}"
        cells = [
            _cell(one.name),
            str(one.flips.num_items),
            format_percent(one.base_accuracy),
            format_percent(one.candidate_accuracy),
            f"{format_points(one.flips.difference)} {interval}",
            f"{one.flips.harmful} / {one.flips.beneficial}",
            harm,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _text_lines(comparison: Comparison) -> list[str]:
    text = comparison.text
    if text is None:
        return []
    return [
        "",
        f"Running text, {text.num_tokens:,} tokens of {text.num_documents} documents: KL "
        f"{text.kl_nats:.4f} nats, top-1 agreement {format_percent(text.top1_agreement)}, "
        f"perplexity {text.base_perplexity:.2f} → {text.candidate_perplexity:.2f}.",
    ]


def _edge_lines(comparison: Comparison) -> list[str]:
    changed = [kind for kind in comparison.edge_kinds if kind.new or kind.mended]
    if not comparison.edge_kinds:
        return []
    if not changed:
        return ["", "Edge cases: no issue that only one of the models has."]
    lines = ["", "| edge cases | cases | new issues | fixed |", "|---|---:|---:|---:|"]
    lines += [f"| {k.kind} | {k.num_cases} | {k.new} | {k.mended} |" for k in changed]
    return lines


def _example_lines(comparison: Comparison) -> list[str]:
    harmful = [e for e in comparison.examples if e.kind == "harmful"][:MAX_EXAMPLES]
    if not harmful:
        return []
    lines = ["", "<details><summary>Harmful flips</summary>", ""]
    lines += ["| item | expected | base | candidate |", "|---|---|---|---|"]
    lines += [
        f"| {_cell(e.name)} | {_cell(e.expected)} | {_cell(e.base_text)} "
        f"| {_cell(e.candidate_text)} |"
        for e in harmful
    ]
    return [*lines, "", "</details>"]


def _cell(text: str, max_chars: int = 300) -> str:
    short = text if len(text) <= max_chars else text[:max_chars] + " …"
    return " ".join(short.split()).replace("|", "\\|").replace("<", "&lt;")


def write_junit(comparison: Comparison) -> str:
    """Write the claims as JUnit test cases: a fail is a failure, an inconclusive claim is skipped.

    Args:
        comparison: The result.

    Returns:
        XML.
    """
    claims = comparison.verdict.claims
    failed = sum(claim.outcome is Outcome.FAIL for claim in claims)
    skipped = sum(claim.outcome is Outcome.INCONCLUSIVE for claim in claims)
    name = _xml_text(f"{comparison.candidate} compared with {comparison.base}")
    counts = {"tests": len(claims), "failures": failed, "errors": 0, "skipped": skipped}
    suite = ElementTree.Element(
        "testsuite", {"name": name, **{key: str(value) for key, value in counts.items()}}
    )
    for claim in claims:
        _add_case(suite, claim)
    ElementTree.SubElement(suite, "system-out").text = _xml_text(comparison.verdict.sentence)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _add_case(suite: ElementTree.Element, claim: Claim) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", {"classname": "halfbyte.compare", "name": _xml_text(claim.name)}
    )
    message = _xml_text(f"{claim.found}. {claim.advice}".strip())
    if claim.outcome is Outcome.FAIL:
        ElementTree.SubElement(case, "failure", {"message": message}).text = message
    elif claim.outcome is Outcome.INCONCLUSIVE:
        ElementTree.SubElement(case, "skipped", {"message": message})
    else:
        ElementTree.SubElement(case, "system-out").text = message


def _xml_text(text: str) -> str:
    """Replace characters that XML does not allow, such as control characters."""
    return INVALID_XML.sub("\ufffd", text)
