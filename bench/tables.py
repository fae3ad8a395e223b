"""Write the tables of README and docs from bench/results/, so that no number is typed by hand.

    python bench/tables.py            write them
    python bench/tables.py --check    fail if any differs (part of make check)

A page shows the result ``bench/results/NAME.json`` between two lines::

    <!-- bench NAME -->
    <!-- end bench -->

or an excerpt of it, rows being named by their first cell, without the result's note::

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
    """Write or check the tables of every page."""
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
        print(f"Tables differ from bench/results in {names}. Run: make docs", file=sys.stderr)
        return 1
    return 0


def fill(text: str, results: Path) -> str:
    """Put the results into a page's blocks; a block without a result says so."""

    def replace(block: re.Match[str]) -> str:
        path = results / f"{block['name']}.json"
        if not path.exists():
            body = f"Not measured yet: `bench/measure_{block['name'].replace('-', '_')}.py`.\n"
        else:
            result = json.loads(path.read_text(encoding="utf-8"))
            if block["columns"] or block["rows"]:
                result = excerpt(result, block["columns"], block["rows"])
            body = write_table(result)
        return f"{block[1]}{body}{block['end']}"

    return BLOCK.sub(replace, text)


def excerpt(result: dict[str, Any], columns: str | None, rows: str | None) -> dict[str, Any]:
    """Keep the named columns and rows of a result, in the order in which they are named."""
    wanted = columns.split(" | ") if columns else result["columns"]
    indices = [result["columns"].index(name) for name in wanted]
    by_name = {row[0]: row for row in result["rows"]}
    kept = [by_name[name] for name in rows.split(" | ")] if rows else result["rows"]
    return {
        **result,
        "columns": wanted,
        "rows": [[row[index] for index in indices] for row in kept],
        "note": "Excerpt of a result",
    }


def write_table(result: dict[str, Any]) -> str:
    """Write one result as a table, with what it was measured on below."""
    lines = ["| " + " | ".join(result["columns"]) + " |", "|" + "---|" * len(result["columns"])]
    lines += ["| " + " | ".join(map(show, row)) + " |" for row in result["rows"]]
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    made = f"`{result['command']}` at {result['commit']}, {result['date']}; {machine}"
    return (
        "\n".join(lines) + f"\n\n{result['note']} ({made}, torch {result['versions']['torch']})\n"
    )


def show(value: str | float) -> str:
    """Write a cell: numbers with four digits at the most, large ones whole."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
