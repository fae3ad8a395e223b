"""Building blocks of the HTML report: tables, remarks, two texts with their differences marked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from html import escape

MAX_TEXT_CHARS = 1200
"""Characters shown of an answer."""
MAX_PROMPT_CHARS = 400


def side_by_side(base: str, candidate: str) -> str:
    """Show two texts, given as HTML, side by side."""
    return (
        f'<div class="pair"><div><h4>base</h4><pre><bdi>{base}</bdi></pre></div>'
        f"<div><h4>candidate</h4><pre><bdi>{candidate}</bdi></pre></div></div>"
    )


def mark_differences(left: str, right: str) -> tuple[str, str]:
    """Mark the words that differ between two texts.

    Args:
        left: One text.
        right: The other.

    Returns:
        Both texts as HTML, with differing words in ``<mark>``.
    """
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", visible(text)) for text in (left, right))
    sides: tuple[list[str], list[str]] = ([], [])
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for tag, a_low, a_high, b_low, b_high in matcher.get_opcodes():
        for side, words in zip(sides, (a[a_low:a_high], b[b_low:b_high]), strict=True):
            text = escape("".join(words))
            side.append(text if tag == "equal" or not text else f"<mark>{text}</mark>")
    return "".join(sides[0]), "".join(sides[1])


def visible(text: str) -> str:
    """Replace control characters by their Unicode symbols, except newline and tab."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\u2421" if c == "\x7f" else c
        for c in text
    )


def shorten(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + " […]"


def last_part(text: str) -> str:
    """Return the end of a prompt, where the question is; examples come before it."""
    return text if len(text) <= MAX_PROMPT_CHARS else "[…] " + text[-MAX_PROMPT_CHARS:]


def inline(text: str) -> str:
    """Show a text on one line."""
    return f"<bdi>{escape(visible(text).replace(chr(10), '↵'))}</bdi>"


def remark(text: str) -> str:
    """Show an explanatory remark."""
    return f'<p class="soft">{escape(text)}</p>'


def make_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] | range = (),
    kind: str = "",
) -> str:
    """Build a table; on a narrow screen each row becomes a card.

    Args:
        heads: Column titles, as text.
        rows: Cells, as HTML.
        numbers: Indices of the columns that hold numbers.
        kind: Additional CSS class.

    Returns:
        HTML.
    """

    def cell(tag: str, column: int, text: str) -> str:
        style = ' class="number"' if column in numbers else ""
        name = f' data-name="{escape(heads[column])}"' if tag == "td" else ""
        return f"<{tag}{style}{name}>{text}</{tag}>"

    head = "".join(cell("th", i, escape(text)) for i, text in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="cards {kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
