"""Generate the tables of README and docs from bench/results/: no number is typed by hand.

    python bench/tables.py            write the tables
    python bench/tables.py --check    fail if a page is out of date (part of make check)

A page shows the result ``bench/results/NAME.json`` between two lines::

    <!-- bench NAME -->
    <!-- end bench -->

or an excerpt of it, without the note; rows are named by their first cell::

    <!-- bench NAME; columns: tool | KL, nats; rows: ours | theirs -->
    <!-- end bench -->
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(
    r"(<!-- bench (?P<name>[\w-]+)"
    r"(?:; columns: (?P<columns>[^;\n]+))?(?:; rows: (?P<rows>[^;\n]+))? -->\n)"
    r".*?(?P<end><!-- end bench -->)",
    re.DOTALL,
)


def main() -> int:
    """Write or check the tables of all pages."""
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        filled = fill(text, RESULTS)
        if filled == text:
            continue
        stale.append(page.relative_to(ROOT))
        if "--check" not in sys.argv[1:]:
            page.write_text(filled, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        names = ", ".join(map(str, stale))
        print(f"Tables in {names} differ from bench/results. Run: make docs", file=sys.stderr)
        return 1
    return 0


def fill(text: str, results: Path) -> str:
    """Fill a page's blocks with their results; a block without a result says so."""

    def replace(block: re.Match[str]) -> str:
        path = results / f"{block['name']}.json"
        if not path.exists():
            body = f"Not measured yet: `bench/measure_{block['name'].replace('-', '_')}.py`.\n"
        else:
            result = json.loads(path.read_text(encoding="utf-8"))
            if block["columns"] or block["rows"]:
                result = excerpt(result, block["columns"], block["rows"])
            body = format_table(result)
        return f"{block[1]}{body}{block['end']}"

    return BLOCK.sub(replace, text)


def excerpt(result: dict[str, Any], columns: str | None, rows: str | None) -> dict[str, Any]:
    """Select columns and rows of a result by name, in the given order."""
    names = columns.split(" | ") if columns else result["columns"]
    indices = [result["columns"].index(name) for name in names]
    by_name = {row[0]: row for row in result["rows"]}
    selected = [by_name[name] for name in rows.split(" | ")] if rows else result["rows"]
    return {
        **result,
        "columns": names,
        "rows": [[row[index] for index in indices] for row in selected],
        "note": "Excerpt of a result",
    }


def format_table(result: dict[str, Any]) -> str:
    """Format a result as a Markdown table, followed by its note and provenance."""
    lines = ["| " + " | ".join(result["columns"]) + " |", "|" + "---|" * len(result["columns"])]
    lines += ["| " + " | ".join(map(format_cell, row)) + " |" for row in result["rows"]]
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    source = f"`{result['command']}` at {result['commit']}, {result['date']}; {machine}"
    return (
        "\n".join(lines) + f"\n\n{result['note']} ({source}, torch {result['versions']['torch']})\n"
    )


def format_cell(value: str | float) -> str:
    """Format a cell: four significant digits at most, large numbers as integers."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
