"""Join what measure_quality.py wrote on several machines into one result.

    python bench/keep_quality.py quality-3-bits cpu.json gpu.json --commit 3db08fc

The quality of a tool does not depend on the machine, up to rounding; what it takes does. So each
row says where it was made, and files of other settings are refused. A result that this made takes
part as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measure_quality import COLUMNS, HALFBYTE_CASES, PEER_CASES
from record import Elsewhere, save_result

PLACE = "; on "
"""In a note, what comes before it are the settings of a run; after it, where it was made."""
RAGGED = "; group 128 with a ragged last group"
"""In a note; said of what was made where there are such groups."""
JOINED = ". Quality and cost"
"""Stands there instead in the note of what this made."""


def main() -> None:
    """Join the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the result")
    parser.add_argument("runs", type=Path, nargs="*", help="a later one's rows take precedence")
    parser.add_argument("--commit", required=True, help="that was measured, of the last run")
    parser.add_argument(
        "--older", nargs="*", type=Path, default=(), help="runs of an earlier halfbyte"
    )
    parser.add_argument("--as", dest="older_as", default="", help="what its rows are called")
    parser.add_argument(
        "--without", nargs="*", default=(), help="leave rows with these words in their name out"
    )
    options = parser.parse_args()
    paths = [*options.older, *options.runs]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for run in runs[: len(options.older)]:
        for row in run["rows"]:
            if row[0] in HALFBYTE_CASES:
                row[0] += options.older_as
    settings = {
        run["note"].partition(JOINED)[0].partition(PLACE)[0].replace(RAGGED, "") for run in runs
    }
    if len(settings) > 1:
        raise SystemExit("These runs differ in their settings:\n" + "\n".join(sorted(settings)))
    rows: dict[str, list[Any]] = {}
    kept: dict[str, Any] = {}
    for path, run in zip(paths, runs, strict=True):
        if run["columns"][: len(COLUMNS) + 1] != ["tool", *COLUMNS]:
            raise SystemExit(f"{path} has columns {run['columns']}, not {COLUMNS}.")
        if JOINED in run["note"]:
            rows |= {row[0]: row for row in run["rows"]}
            kept |= run["data"]["rows"]
            continue
        for row in run["rows"]:
            rows[row[0]] = [*row, name_place(run)]
            kept[row[0]] = {
                "of": {key: run[key] for key in ("date", "commit", "command", "machine")},
                "result": run["data"].get("results", {}).get(row[0]),
                "kept from": run["data"].get("kept from", "the script's file"),
            }
    left_out = [name for name in rows if any(words in name for words in options.without)]
    rows, kept = ({n: v for n, v in d.items() if n not in left_out} for d in (rows, kept))
    last = runs[-1]
    known = [*HALFBYTE_CASES, *PEER_CASES]

    def place(name: str) -> int:
        """Give the rank of the longest case that the name begins with."""
        return max(
            (len(case), rank)
            for rank, case in [(-1, ""), *enumerate(known)]
            if name.startswith(case)
        )[1]

    order = sorted(rows, key=place)
    save_result(
        options.name,
        columns=["tool", *COLUMNS, "on"],
        rows=[rows[name] for name in order],
        note=(
            settings.pop()
            + (RAGGED if "group 128" in str(order) else "")
            + f"{JOINED} were measured on the machine named in each row, some of several at a time "
            "on a GPU, so that seconds compare only roughly; ± is the standard error over windows"
            + (
                "; AutoRound with its default of 200 iterations"
                if "AutoRound" in str(order)
                else ""
            )
        ),
        data={"rows": kept},
        elsewhere=Elsewhere(
            date=last["date"],
            commit=options.commit,
            command="python bench/measure_quality.py",
            machine=last["machine"],
            versions=last["versions"],
        ),
    )


def name_place(run: dict[str, Any]) -> str:
    """Name what a run computed on."""
    device = run["note"].partition(PLACE)[2].partition(",")[0]
    return str(run["machine"].get("gpu", "GPU")) if device == "cuda" else "CPU"


if __name__ == "__main__":
    main()
