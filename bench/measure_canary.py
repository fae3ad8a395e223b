"""Simulate the canary's test: error rates, and number of requests until a decision.

    python bench/measure_canary.py [--trials 400] [--requests 20000]

Each trial feeds requests with known failure rates to the sequential test of `halfbyte serve`, which
is evaluated whenever it can have crossed its threshold, as in the server.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from halfbyte.serve.rollout.sequential import TwoArmTest, requests_until_rejected
from record import save_result

SHARE, MARGIN, ALPHA = 0.1, 0.02, 0.05


@dataclass(frozen=True)
class Scenario:
    """True failure rates of a trial."""

    name: str
    base: float
    candidate: float
    waves: float = 0.0
    """Added to both rates in every second thousand requests."""


SCENARIOS = (
    Scenario("as good, nothing fails", 0.0, 0.0),
    Scenario("as good", 0.02, 0.02),
    Scenario("as good, many failures", 0.05, 0.05),
    Scenario("as good, traffic in waves", 0.01, 0.01, 0.2),
    Scenario("worse by the margin", 0.02, 0.04),
    Scenario("worse by 3 points", 0.02, 0.05),
    Scenario("worse by 8 points", 0.02, 0.10),
    Scenario("worse by 18 points", 0.02, 0.20),
    Scenario("worse by half", 0.02, 0.52),
    Scenario("broken", 0.02, 1.0),
)


def run_trial(scenario: Scenario, requests: int, seed: int) -> tuple[str, int]:
    """Return the outcome of a trial, and the number of requests it took."""
    rng = np.random.default_rng(seed)
    test = TwoArmTest(SHARE, MARGIN)
    threshold = math.log(1 / ALPHA)
    drawn = rng.random(requests) < SHARE
    waves = np.where(np.arange(requests) // 1000 % 2 == 1, scenario.waves, 0.0)
    rates = np.where(drawn, scenario.candidate, scenario.base) + waves
    failed = rng.random(requests) < rates
    for number in range(requests):
        # Without failures, evidence for the candidate grows; evidence against it is constant.
        if (failed[number] or number % 10 == 0) and test.as_good.log_evidence >= threshold:
            return "promoted", number
        test.update(candidate=bool(drawn[number]), failed=bool(failed[number]))
        if failed[number] and test.worse.log_evidence >= threshold:
            return "rolled back", number + 1
    return "open", requests


def quantile(values: Sequence[int], share: float) -> int:
    """Return a quantile, rounded down."""
    return int(np.quantile(values, share))


def main() -> None:
    """Simulate every scenario and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--requests", type=int, default=20_000)
    args = parser.parse_args()
    rows, data = [], []
    with ProcessPoolExecutor(2) as pool:
        for scenario in SCENARIOS:
            run = partial(run_trial, scenario, args.requests)
            ends = list(pool.map(run, range(args.trials), chunksize=10))
            counts = {end: sum(e == end for e, _ in ends) for end in
                      ("promoted", "rolled back", "open")}  # fmt: skip
            decided = [n for end, n in ends if end != "open"]
            promised = requests_until_rejected((scenario.base, scenario.candidate), SHARE, ALPHA)
            within = [end == "rolled back" and n <= promised for end, n in ends] if promised else []
            rows.append(
                [
                    scenario.name,
                    f"{100 * scenario.base:g} / {100 * scenario.candidate:g}",
                    f"{100 * counts['rolled back'] / args.trials:.1f}%",
                    f"{100 * counts['promoted'] / args.trials:.1f}%",
                    f"{100 * counts['open'] / args.trials:.1f}%",
                    quantile(decided, 0.5) if decided else "-",
                    quantile(decided, 0.95) if decided else "-",
                    promised or "-",
                    f"{100 * np.mean(within):.1f}%" if within else "-",
                ]
            )
            print(*rows[-1], sep=" | ", flush=True)
            data.append({"scenario": scenario.__dict__, "ends": ends, "promised": promised})
    path = save_result(
        "canary",
        columns=[
            "candidate", "fails, % (present / new)", "rolled back", "promoted", "open",
            "requests, median", "95th", "promised", "within it",
        ],
        rows=rows,
        note=(
            f"{args.trials} simulated trials a row, at most {args.requests} requests each; share "
            f"{SHARE}, margin {100 * MARGIN:g} points, alpha {ALPHA}. Requests are those of both "
            "arms; the candidate gets a tenth of them. Waves: 20 points more failures of both in "
            "every other thousand requests. A wrong rollback is one of a candidate as good; a "
            "wrong promotion one of a candidate worse by the margin or more; each may happen in "
            "5% of trials. Promised: what the server says a rollback takes at most, 19 times of 20."
        ),
        data={"trials": data},
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
