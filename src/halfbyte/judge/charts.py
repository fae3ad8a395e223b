"""Charts as inline SVG, colored by the page's style sheet to follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from halfbyte.judge.layers import LayerErrors
from halfbyte.judge.verdict import SliceResult

WIDTH = 640
LABEL_WIDTH = 190
ROW_HEIGHT = 24


def interval_chart(slices: Sequence[SliceResult], margins: Sequence[float]) -> str:
    """Draw the difference in accuracy of each slice with its interval, and the margins.

    Args:
        slices: One row each, from top to bottom.
        margins: Allowed loss of each slice.

    Returns:
        An SVG element.
    """
    reach = max([abs(v) for s in slices for v in (s.interval.low, s.interval.high)] + list(margins))
    reach = min(1.0, max(0.05, reach * 1.08))

    def x(value: float) -> float:
        return LABEL_WIDTH + (WIDTH - LABEL_WIDTH - 10) * (value + reach) / (2 * reach)

    height = ROW_HEIGHT * len(slices) + 30
    parts = [f'<line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - 24}"/>']
    for row, (one, margin) in enumerate(zip(slices, margins, strict=True)):
        y = ROW_HEIGHT * row + ROW_HEIGHT / 2
        low, high = max(one.interval.low, -reach), min(one.interval.high, reach)
        parts += [
            f'<text x="0" y="{y + 4:.1f}">{escape(_short(one.name))}</text>',
            f'<line class="margin" x1="{x(-margin):.1f}" x2="{x(-margin):.1f}" '
            f'y1="{y - ROW_HEIGHT / 2:.1f}" y2="{y + ROW_HEIGHT / 2:.1f}"/>',
            f'<line class="line" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>',
            f'<circle class="bar" cx="{x(one.flips.difference):.1f}" cy="{y}" r="4"/>',
        ]
    for value in (-reach, 0.0, reach):
        anchor = "middle" if value == 0 else "start" if value < 0 else "end"
        parts.append(
            f'<text class="soft" x="{x(value):.1f}" y="{height - 6}" text-anchor="{anchor}">'
            f"{100 * value:+.0f} points</text>"
        )
    return _svg(height, parts, "difference in accuracy by slice, with intervals and margins")


def histogram_chart(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Draw a histogram of the divergence per token.

    Args:
        counts: Tokens per bin, one more than edges.
        edges: Bin edges in nats, ascending.

    Returns:
        An SVG element.
    """
    names = [f"below {edges[0]:g}"]
    names += [f"{a:g} to {b:g}" for a, b in pairwise(edges)]
    names.append(f"above {edges[-1]:g}")
    total, largest = max(1, sum(counts)), max(1, *counts)
    parts = []
    for row, (name, count) in enumerate(zip(names, counts, strict=True)):
        y = ROW_HEIGHT * row
        width = (WIDTH - LABEL_WIDTH - 110) * count / largest
        parts += [
            f'<text x="0" y="{y + 16}">{name} nats</text>',
            f'<rect class="bar" x="{LABEL_WIDTH}" y="{y + 4}" width="{width:.1f}" '
            f'height="{ROW_HEIGHT - 8}"/>',
            f'<text class="soft" x="{LABEL_WIDTH + width + 6:.1f}" y="{y + 16}">{count:,} '
            f"({100 * count / total:.1f}%)</text>",
        ]
    return _svg(ROW_HEIGHT * len(counts), parts, "tokens by divergence from the base")


def layer_chart(layers: LayerErrors) -> str:
    """Draw the error of every linear, one row per kind and one column per block.

    Args:
        layers: The measured errors.

    Returns:
        An SVG element; suspects are outlined.
    """
    kinds = list(dict.fromkeys(linear.kind for linear in layers.linears))
    blocks = sorted({linear.block for linear in layers.linears})
    if not blocks:
        return ""
    size = (WIDTH - LABEL_WIDTH - 10) / len(blocks)
    errors = [linear.error for linear in layers.linears if math.isfinite(linear.error)]
    low, high = (min(errors), max(errors)) if errors else (0.0, 1.0)
    parts = []
    for row, kind in enumerate(kinds):
        parts.append(f'<text x="0" y="{ROW_HEIGHT * row + 16}">{escape(_short(kind))}</text>')
    for linear in layers.linears:
        x = LABEL_WIDTH + size * blocks.index(linear.block)
        y = ROW_HEIGHT * kinds.index(linear.kind)
        share = (linear.error - low) / (high - low) if high > low else 0.0
        shade = 0.08 + 0.92 * (share if math.isfinite(share) else 1.0)
        position = (
            f'x="{x:.1f}" y="{y + 2}" width="{max(size - 1, 1):.1f}" height="{ROW_HEIGHT - 4}"'
        )
        title = f"<title>{escape(linear.name)}: {linear.error:.4f}</title>"
        parts.append(f'<rect class="cell" {position} fill-opacity="{shade:.3f}">{title}</rect>')
        if linear.suspect:
            parts.append(f'<rect class="suspect" {position}/>')
    y = ROW_HEIGHT * len(kinds) + 14
    parts += [
        f'<text class="soft" x="{LABEL_WIDTH}" y="{y}">block {blocks[0]}</text>',
        f'<text class="soft" x="{WIDTH - 10}" y="{y}" text-anchor="end">block {blocks[-1]}</text>',
    ]
    return _svg(y + 8, parts, "error of every linear by kind and block")


def line_chart(values: Sequence[float]) -> str:
    """Draw one value per block as a line.

    Args:
        values: One per block.

    Returns:
        An SVG element.
    """
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    top, height = max([*finite, 1e-9]), 120
    step = (WIDTH - LABEL_WIDTH - 10) / max(1, len(finite) - 1)
    points = " ".join(
        f"{LABEL_WIDTH + step * i:.1f},{6 + (height - 30) * (1 - v / top):.1f}"
        for i, v in enumerate(finite)
    )
    parts = [
        f'<text x="0" y="16">largest {top:.3g}</text>',
        f'<line class="axis" x1="{LABEL_WIDTH}" x2="{WIDTH - 10}" y1="{height - 24}" '
        f'y2="{height - 24}"/>',
        f'<polyline class="line" points="{points}"/>',
        f'<text class="soft" x="{LABEL_WIDTH}" y="{height - 8}">block 0</text>',
        f'<text class="soft" x="{WIDTH - 10}" y="{height - 8}" text-anchor="end">'
        f"block {len(finite) - 1}</text>",
    ]
    return _svg(height, parts, "relative distance of the hidden states after each block")


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    body = "".join(parts)
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">{body}</svg></div>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 27 else name[:26] + "…"
