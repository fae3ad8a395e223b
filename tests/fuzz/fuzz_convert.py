"""Fuzz the sources of conversions: a damaged model must be refused or read, without a crash.

Run from the root of the project: ``python -m tests.fuzz.fuzz_convert --mutations 10000``; the
number is that for each format.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from tests.fuzz.conversion import damage, judge, make_bases

HANG_SECONDS = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    failures: list[str] = []
    signal.signal(signal.SIGALRM, _report_hang)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bases = make_bases(folder / "bases")
        for base in bases:
            for number in range(args.mutations // 2):  # there are two bases per format
                rng = random.Random(f"{args.seed}/{base.name}/{number}")
                done, files = damage(rng, base)
                source = folder / "bases" / "sourceTrue" if number % 10 == 0 else None
                signal.alarm(HANG_SECONDS)
                try:
                    outcome = judge(folder / "work", files, source)
                except Exception:  # noqa: BLE001 - any other exception is a defect
                    outcome = "FAILED"
                    failures.append(f"{base.name} {number}: {done}\n{traceback.format_exc()}")
                signal.alarm(0)
                counts.setdefault(base.name, Counter())[outcome] += 1
    rows = [f"{name:30} {dict(count)}" for name, count in counts.items()]
    sys.stdout.write("\n".join([*rows, f"seed {args.seed}", *failures[:10]]) + "\n")
    return 1 if failures else 0


def _report_hang(*_: object) -> None:
    raise TimeoutError(f"not finished after {HANG_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
