"""Keep a measurement: numbers, and everything needed to take it again, as JSON in bench/results/.

A script that measures is named ``measure_<claim>.py``, stands beside this file and ends in one
call of :func:`save_result`. ``tables.py`` writes the results into the README and the docs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from halfbyte.machine.facts import installed_versions, machine_facts

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Where and of what a measurement was taken that is only kept here."""

    date: str
    commit: str
    command: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]


def save_result(
    claim: str,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | int | float]],
    note: str,
    data: dict[str, Any],
    elsewhere: Elsewhere | None = None,
) -> Path:
    """Write one result.

    Args:
        claim: Names the file, and the block in the pages that shows it.
        columns: Head of the table.
        rows: The table; numbers are shown with four digits.
        note: What a reader must know beside the table: text, setting, what it flatters.
        data: Everything measured, with medians and spreads, for other uses than the table.
        elsewhere: Facts of a run that was not here and now.

    Returns:
        The file.
    """
    facts = elsewhere or Elsewhere(
        date=datetime.now(UTC).date().isoformat(),
        commit=_commit(),
        command=" ".join(["python", *_own_name(sys.argv)]),
        machine=machine_facts(),
        versions=installed_versions(),
    )
    result = {
        "claim": claim,
        **asdict(facts),
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "note": note,
        "data": data,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{claim}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _own_name(argv: Sequence[str]) -> list[str]:
    """Give the command without the folders of this machine."""
    names = [Path(word).name if os.sep in word else word for word in argv[1:]]
    return [f"bench/{Path(argv[0]).name}", *names]


def _commit() -> str:
    """Give the commit that was measured, with a plus where the tree differs from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "../src"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")
