"""The verb `check`: which programs can load a checkpoint, and why the others cannot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.checkpoint.consumers import CONSUMERS

if TYPE_CHECKING:
    from halfbyte.checkpoint.check import CheckReport

HELP = "report which programs can load a quantized checkpoint, and why others cannot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options and positionals."""
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder of the checkpoint")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also check every byte against checksums.json",
    )
    names = [consumer.name for consumer in CONSUMERS]
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        choices=names,
        metavar="NAME",
        help="exit with 1 unless program NAME can load it on one device; repeatable. "
        f"One of: {', '.join(names)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check, print the report, and return the exit code.

    Args:
        args: From the parser.

    Returns:
        0, or 1 if a required program cannot load the checkpoint.
    """
    from halfbyte.checkpoint.check import check_consumers
    from halfbyte.checkpoint.read import open_checkpoint
    from halfbyte.cli.output import print_json

    checkpoint = open_checkpoint(args.folder)
    verified = checkpoint.verify() if args.verify else None
    report = check_consumers(checkpoint)
    if args.json:
        print_json({**report.to_dict(), "verified_tensors": verified})
    else:
        _print_report(report, verified)
    refused = {
        v.consumer for v in report.verdicts if not v.loads and v.tensor_parallel in (None, 1)
    }
    return 1 if refused & set(args.require) else 0


def _print_report(report: CheckReport, verified: int | None) -> None:
    from rich.table import Table

    from halfbyte.cli.output import console

    schemes = "; ".join(f"{count} x {name}" for name, count in report.schemes.items())
    console.print(f"{report.folder}: {report.num_linears} quantized linears ({schemes})")
    if verified is not None:
        console.print(f"{verified} tensors verified, byte for byte")
    table = Table(title="Programs that can load it")
    for heading in ("program", "devices", "loads", "why not"):
        table.add_column(heading)
    shown: set[tuple[str, str]] = set()
    for verdict in report.verdicts:
        devices = "" if verdict.tensor_parallel is None else str(verdict.tensor_parallel)
        # More devices only add reasons: show each reason once per program.
        new = [why for why in verdict.reasons if (verdict.consumer, why) not in shown]
        shown |= {(verdict.consumer, why) for why in new}
        lines = new if len(new) == len(verdict.reasons) else ["as above", *new]
        table.add_row(verdict.label, devices, "yes" if verdict.loads else "no", "\n".join(lines))
    console.print(table)
    known = sorted(
        {verdict.label.split(",")[0] for verdict in report.verdicts if verdict.evidence == "read"}
    )
    console.print(f"The limits of {' and '.join(known)} were taken from source code.")
    for note in report.notes:
        console.print(f"Note: {note}")
