"""Fuzz the checkpoint reader: a damaged checkpoint must be refused or give the original weights.

Run from the root of the project: ``python -m tests.fuzz.fuzz_checkpoint --mutations 10000``.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.fuzz.bases import make_bases
from tests.fuzz.judge import digest_weights, judge, write_files
from tests.fuzz.mutations import damage

from halfbyte.checkpoint.read import open_checkpoint

HANG_SECONDS = 30
OUTCOMES = ("refused", "same", "digest", "fooled", "FAILED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    failures, slowest = [], 0.0
    signal.signal(signal.SIGALRM, _report_hang)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bases = make_bases(folder / "bases")
        intact = {}
        for base in bases:
            write_files(folder / "x", dict(base.files))
            intact[base.name] = digest_weights(open_checkpoint(folder / "x"))
        for number in range(args.mutations):
            # One generator per mutation, so that any of them can be repeated alone.
            rng = random.Random(f"{args.seed}/{number}")
            base = rng.choice(bases)
            done, files = damage(rng, base)
            started = time.perf_counter()
            signal.alarm(HANG_SECONDS)
            try:
                outcome = judge(folder / "x", base, intact[base.name], done, files)
            except Exception:  # noqa: BLE001 - any other exception is a defect
                outcome = "FAILED"
                failures.append(f"mutation {number}: {base.name}: {done}\n{traceback.format_exc()}")
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - started)
            counts.setdefault(done.kind, Counter())[outcome] += 1
    lines = [*_count_lines(counts), f"slowest: {slowest * 1000:.0f} ms; seed {args.seed}"]
    sys.stdout.write("\n".join([*lines, *failures[:10]]) + "\n")
    return 1 if failures else 0


def _report_hang(*_: object) -> None:
    raise TimeoutError(f"not finished after {HANG_SECONDS} s")


def _count_lines(counts: dict[str, Counter[str]]) -> list[str]:
    total = sum(counts.values(), Counter[str]())
    rows = [*sorted(counts.items()), (f"all {total.total()}", total)]
    head = f"{'damage':22}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)
    return [
        head,
        *(
            f"{kind:22}" + "".join(f"{found[outcome]:9}" for outcome in OUTCOMES)
            for kind, found in rows
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
