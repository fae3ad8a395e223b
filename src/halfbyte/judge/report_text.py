"""A comparison as Markdown for pull requests, and as JUnit XML for CI."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from halfbyte.judge.comparison import Comparison
from halfbyte.judge.verdict import Claim, Outcome, percent, points
from halfbyte.units import format_bytes

MARKS = {Outcome.PASS: "✅", Outcome.FAIL: "❌", Outcome.INCONCLUSIVE: "❔"}
EXAMPLES_SHOWN = 5
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_markdown(comparison: Comparison) -> str:
    """Write a comparison as Markdown.

    Args:
        comparison: The result.

    Returns:
        Headings, tables and a folded list of examples.
    """
    verdict = comparison.verdict
    lines = [
        f"### {MARKS[verdict.outcome]} {verdict.outcome.capitalize()}: "
        f"`{comparison.candidate}` in place of `{comparison.base}`",
        "",
        verdict.sentence,
        "",
        "| what must hold | | found |",
        "|---|---|---|",
    ]
    for claim in verdict.claims:
        found = claim.found + (f" ({claim.advice})" if claim.advice else "")
        lines.append(f"| {_cell(claim.name)} | {MARKS[claim.outcome]} | {_cell(found)} |")
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
        "| slice | items | base | candidate | difference | flips − / + | harm p |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in (comparison.overall, *comparison.slices):
        interval = f"[{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}]"
        harm = "–" if one.harm_p is None else f"{one.harm_p:.2g}"
        lines.append(
            f"| {_cell(one.name)} | {one.flips.num_items} | {percent(one.base_accuracy)} "
            f"| {percent(one.candidate_accuracy)} | {points(one.flips.difference)} {interval} "
            f"| {one.flips.harmful} / {one.flips.beneficial} | {harm} |"
        )
    return lines


def _text_lines(comparison: Comparison) -> list[str]:
    text = comparison.text
    if text is None:
        return []
    return [
        "",
        f"Running text, {text.num_tokens:,} tokens of {text.num_documents} documents: KL "
        f"{text.kl_nats:.4f} nats, same first choice {percent(text.top1_agreement)}, perplexity "
        f"{text.base_perplexity:.2f} → {text.candidate_perplexity:.2f}.",
    ]


def _edge_lines(comparison: Comparison) -> list[str]:
    told = [kind for kind in comparison.edge_kinds if kind.new or kind.mended]
    if not comparison.edge_kinds:
        return []
    if not told:
        return ["", "Odd inputs: no find that only one of both has."]
    lines = ["", "| odd inputs | inputs | new finds | mended |", "|---|---:|---:|---:|"]
    lines += [f"| {k.kind} | {k.num_cases} | {k.new} | {k.mended} |" for k in told]
    return lines


def _example_lines(comparison: Comparison) -> list[str]:
    harmful = [e for e in comparison.examples if e.kind == "harmful"][:EXAMPLES_SHOWN]
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


def _cell(text: str) -> str:
    short = text if len(text) <= 300 else text[:300] + " …"
    return " ".join(short.split()).replace("|", "\\|").replace("<", "&lt;")


def write_junit(comparison: Comparison) -> str:
    """Write the claims as JUnit test cases: fail is a failure, inconclusive is skipped.

    Args:
        comparison: The result.

    Returns:
        XML.
    """
    claims = comparison.verdict.claims
    failed = sum(claim.outcome is Outcome.FAIL for claim in claims)
    open_ones = sum(claim.outcome is Outcome.INCONCLUSIVE for claim in claims)
    name = _xml_text(f"{comparison.candidate} in place of {comparison.base}")
    counts = {"tests": len(claims), "failures": failed, "errors": 0, "skipped": open_ones}
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
    """Leave out what no XML may hold, such as control characters."""
    return NOT_XML.sub("\ufffd", text)
