"""Save a measurement, with everything needed to repeat it, as JSON in bench/results/.

A measuring script is named ``measure_<claim>.py``, lies beside this file and ends in one call of
:func:`save_result`. ``tables.py`` writes the results into the README and the docs.
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
class Provenance:
    """When, where and of which code a measurement was taken."""

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
    provenance: Provenance | None = None,
) -> Path:
    """Write one result to ``bench/results/``.

    Args:
        claim: Name of the file, and of the block in the pages that shows it.
        columns: Names of the columns.
        rows: Cells; numbers are shown with four digits.
        note: What a reader must know to judge the table: data, settings, known bias.
        data: All measured values, with medians and spreads, for uses other than the table.
        provenance: Of a run on another machine; None: of this process.

    Returns:
        Path of the file.
    """
    provenance = provenance or Provenance(
        date=datetime.now(UTC).date().isoformat(),
        commit=_commit(),
        command=" ".join(["python", *_strip_folders(sys.argv)]),
        machine=machine_facts(),
        versions=installed_versions(),
    )
    result = {
        "claim": claim,
        **asdict(provenance),
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "note": note,
        "data": data,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{claim}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _strip_folders(argv: Sequence[str]) -> list[str]:
    """Return the command line without the folders of this machine."""
    names = [Path(word).name if os.sep in word else word for word in argv[1:]]
    return [f"bench/{Path(argv[0]).name}", *names]


def _commit() -> str:
    """Return the checked-out commit, with a plus if ``src`` has uncommitted changes."""
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
