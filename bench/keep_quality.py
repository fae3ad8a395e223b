"""Join output of measure_quality.py from several machines into one result.

    python bench/keep_quality.py quality-3-bits cpu.json gpu.json --commit 3db08fc

The quality of a tool does not depend on the machine, up to rounding; its time and memory do. So
each row names its machine, and files with different settings are refused. A joined result may be
joined again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure_quality import COLUMNS, HALFBYTE_CASES, PEER_CASES
from record import Provenance, save_result

PLACE = "; on "
"""Separates, in a note, the settings of a run from its machine."""
RAGGED = "; group 128 with a ragged last group"
"""In the notes of runs that have such groups."""
JOINED = ". Quality and cost"
"""Follows the settings in the note of a joined result."""


def main() -> None:
    """Join the files and save the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of the result")
    parser.add_argument(
        "runs", type=Path, nargs="*", help="output files; rows of later files take precedence"
    )
    parser.add_argument("--commit", required=True, help="commit that the last run measured")
    parser.add_argument(
        "--older", nargs="*", type=Path, default=(), help="runs of an earlier halfbyte"
    )
    parser.add_argument(
        "--as", dest="older_as", default="", help="suffix of the names of their rows"
    )
    parser.add_argument(
        "--without", nargs="*", default=(), help="leave out rows with these words in their names"
    )
    options = parser.parse_args()
    paths = [*options.older, *options.runs]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for run in runs[: len(options.older)]:
        for row in run["rows"]:
            if row[0] in HALFBYTE_CASES:
                row[0] += options.older_as
    settings = find_settings(runs)
    rows, sources = join_rows(list(zip(paths, runs, strict=True)))
    names = [name for name in rows if not any(words in name for words in options.without)]
    names.sort(key=rank_case)
    last = runs[-1]
    save_result(
        options.name,
        columns=["tool", *COLUMNS, "on"],
        rows=[rows[name] for name in names],
        note=(
            settings
            + (RAGGED if "group 128" in str(names) else "")
            + f"{JOINED} were measured on the machine named in each row, some of several at a time "
            "on a GPU, so that seconds compare only roughly; ± is the standard error over windows"
            + (
                "; AutoRound with its default of 200 iterations"
                if "AutoRound" in str(names)
                else ""
            )
        ),
        data={"rows": {name: source for name, source in sources.items() if name in names}},
        provenance=Provenance(
            date=last["date"],
            commit=options.commit,
            command="python bench/measure_quality.py",
            machine=last["machine"],
            versions=last["versions"],
        ),
    )


def find_settings(runs: Sequence[dict[str, Any]]) -> str:
    """Return the settings that all runs share, as their notes state them.

    Args:
        runs: Results of measure_quality.py or of this script.

    Returns:
        The part of the note before the machine.

    Raises:
        SystemExit: The settings differ.
    """
    settings = {
        run["note"].partition(JOINED)[0].partition(PLACE)[0].replace(RAGGED, "") for run in runs
    }
    if len(settings) > 1:
        raise SystemExit(
            "Cannot join runs that differ in their settings:\n" + "\n".join(sorted(settings))
        )
    return settings.pop()


def join_rows(
    runs: Sequence[tuple[Path, dict[str, Any]]],
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Join the rows of runs by name; later rows take precedence.

    Args:
        runs: File and content of each, in order.

    Returns:
        Rows and their sources, by name.

    Raises:
        SystemExit: A run has other columns.
    """
    rows: dict[str, list[Any]] = {}
    sources: dict[str, Any] = {}
    for path, run in runs:
        if run["columns"][: len(COLUMNS) + 1] != ["tool", *COLUMNS]:
            raise SystemExit(
                f"Cannot join {path}: its columns are {run['columns']}, not {['tool', *COLUMNS]}."
            )
        if JOINED in run["note"]:
            rows |= {row[0]: row for row in run["rows"]}
            sources |= run["data"]["rows"]
            continue
        for row in run["rows"]:
            rows[row[0]] = [*row, name_device(run)]
            sources[row[0]] = {
                "of": {key: run[key] for key in ("date", "commit", "command", "machine")},
                "result": run["data"].get("results", {}).get(row[0]),
                "kept from": run["data"].get("kept from", "the script's file"),
            }
    return rows, sources


def rank_case(name: str) -> int:
    """Return the rank of the longest case name that a row's name starts with."""
    cases = [(-1, ""), *enumerate([*HALFBYTE_CASES, *PEER_CASES])]
    return max((len(case), rank) for rank, case in cases if name.startswith(case))[1]


def name_device(run: dict[str, Any]) -> str:
    """Name the device that a run computed on."""
    device = run["note"].partition(PLACE)[2].partition(",")[0]
    return str(run["machine"].get("gpu", "GPU")) if device == "cuda" else "CPU"


if __name__ == "__main__":
    main()
