"""What a report's pages are put together of: tables, remarks, pairs of texts with what differs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from html import escape

LONGEST_TEXT = 1200
"""Characters of a prompt or an answer that are shown."""
LONGEST_PROMPT = 400


def side_by_side(base: str, candidate: str) -> str:
    """Put two texts, as HTML, side by side."""
    return (
        f'<div class="pair"><div><h4>base</h4><pre><bdi>{base}</bdi></pre></div>'
        f"<div><h4>candidate</h4><pre><bdi>{candidate}</bdi></pre></div></div>"
    )


def mark_differences(left: str, right: str) -> tuple[str, str]:
    """Mark the words in which two texts differ.

    Args:
        left: One text.
        right: The other.

    Returns:
        Both as HTML, differing words in ``<mark>``.
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
    """Show control characters by their symbols; line ends and tabs stay."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\u2421" if c == "\x7f" else c
        for c in text
    )


def shorten(text: str) -> str:
    """Give the beginning of a text."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " […]"


def last_part(text: str) -> str:
    """Give the end of a prompt: what is asked stands there, examples before it."""
    return text if len(text) <= LONGEST_PROMPT else "[…] " + text[-LONGEST_PROMPT:]


def inline(text: str) -> str:
    """Show a text within a line."""
    return f"<bdi>{escape(visible(text).replace(chr(10), '↵'))}</bdi>"


def remark(text: str) -> str:
    """Write a remark."""
    return f'<p class="soft">{escape(text)}</p>'


def make_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] | range = (),
    kind: str = "",
) -> str:
    """Write a table; on a phone each row becomes a card.

    Args:
        heads: Titles of the columns, as text.
        rows: Cells, as HTML.
        numbers: Columns that are set as numbers.
        kind: A further class of the style sheet.

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
