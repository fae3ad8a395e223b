"""Simulate the error rates of the verdict of ``halfbyte compare``.

    python bench/measure_verdict.py [--studies 2000]

Each simulated study samples items with known rates of harmful and beneficial flips in eight slices,
optionally in documents whose items flip together or have correlated rates of harm (beta-distributed
over documents), and paired log-likelihoods of documents of different lengths with skewed
differences. ``decide`` then returns its verdict, as for real models. A pass is wrong if a true loss
is at or above its margin, a fail is wrong if every true loss is at or below its margin.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

import numpy as np

from halfbyte.judge.bootstrap import bootstrap_ratio
from halfbyte.judge.fidelity import TextFidelity
from halfbyte.judge.statistics import count_flips
from halfbyte.judge.verdict import Evidence, Margins, Outcome, decide, measure_slice
from record import save_result

SLICES = 8
BASE_ACCURACY = 0.6


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The true parameters of a simulation."""

    name: str
    items: int
    flips: float
    """Share of items that flip in either direction."""
    loss: float
    """True loss of accuracy."""
    ratio: float
    """True perplexity ratio."""
    documents: int = 40
    cluster: int = 1
    """Items per document."""
    correlation: float = 1.0
    """Correlation of harm within a document; 1: its items flip together."""
    slice_loss: float = 0.0
    """Additional loss in one of the eight slices."""
    wrong: str = ""
    """The verdict that would be wrong: "pass" or "fail"."""


MARGINS = Margins()
TRUTHS = (
    Truth(name="equal, 300 items", items=300, flips=0.06, loss=0, ratio=1.02, wrong="fail"),
    Truth(name="equal, 1,000 items", items=1000, flips=0.06, loss=0, ratio=1.02, wrong="fail"),
    Truth(name="equal, 3,000 items", items=3000, flips=0.06, loss=0, ratio=1.02, wrong="fail"),
    Truth(name="equal, no flips, 300 items", items=300, flips=0, loss=0, ratio=1.0, wrong="fail"),
    Truth(
        name="equal, 1,000 items, documents of 5",
        items=1000,
        flips=0.06,
        loss=0,
        ratio=1.02,
        cluster=5,
        wrong="fail",
    ),
    Truth(
        name="loss is the margin, 1,000 items",
        items=1000,
        flips=0.06,
        loss=0.02,
        ratio=1.02,
        wrong="pass",
    ),
    Truth(
        name="loss is the margin, documents of 5",
        items=1000,
        flips=0.06,
        loss=0.02,
        ratio=1.02,
        cluster=5,
        wrong="pass",
    ),
    *(
        Truth(
            name=f"loss is the margin, {documents} documents of {1000 // documents}, "
            f"alike by {correlation}",
            items=1000,
            flips=0.04,
            loss=0.02,
            ratio=1.02,
            cluster=1000 // documents,
            correlation=correlation,
            wrong="pass",
        )
        for correlation, documents in itertools.product((0.1, 0.3), (5, 10, 20, 40, 200))
    ),
    Truth(
        name="equal, 40 documents of 25, alike by 0.1",
        items=1000,
        flips=0.04,
        loss=0,
        ratio=1.02,
        cluster=25,
        correlation=0.1,
        wrong="fail",
    ),
    Truth(
        name="loss is the margin, 300 items",
        items=300,
        flips=0.04,
        loss=0.02,
        ratio=1.02,
        wrong="pass",
    ),
    Truth(
        name="perplexity is the margin, 40 documents",
        items=3000,
        flips=0.04,
        loss=0,
        ratio=1.10,
        wrong="pass",
    ),
    Truth(
        name="perplexity is the margin, 16 documents",
        items=3000,
        flips=0.04,
        loss=0,
        ratio=1.10,
        documents=16,
        wrong="pass",
    ),
    Truth(
        name="all losses at their margins, 1,000 items",
        items=1000,
        flips=0.06,
        loss=0.02,
        ratio=1.10,
        wrong="fail",
    ),
    Truth(
        name="loss of 6 points, 1,000 items",
        items=1000,
        flips=0.12,
        loss=0.06,
        ratio=1.05,
        wrong="pass",
    ),
    Truth(
        name="one slice loses 40 points, 1,000 items",
        items=1000,
        flips=0.04,
        loss=0,
        ratio=1.02,
        slice_loss=0.4,
        wrong="pass",
    ),
)


def main() -> None:
    """Simulate, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    args = parser.parse_args()
    rows, data = [], {}
    for number, truth in enumerate(TRUTHS):
        rng = np.random.default_rng(number)
        counts = dict.fromkeys(Outcome, 0)
        covered = both = 0
        for study in range(args.studies):
            evidence = draw(truth, rng, study)
            verdict, _ = decide(evidence, MARGINS)
            counts[verdict.outcome] += 1
            inside = evidence.overall.interval
            loss = truth.loss + truth.slice_loss / SLICES
            covered += inside.low <= -loss <= inside.high
            text = evidence.text.nll_increase_interval
            both += text.low <= math.log(truth.ratio) <= text.high
        share = {outcome.value: count / args.studies for outcome, count in counts.items()}
        wrong = share[truth.wrong]
        rows.append(
            [
                truth.name,
                *(round(share[name], 3) for name in ("pass", "fail", "inconclusive")),
                f"{truth.wrong}: {wrong:.3f}",
                round(covered / args.studies, 3),
                round(both / args.studies, 3),
            ]
        )
        data[truth.name] = {**share, "accuracy_coverage": covered, "text_coverage": both}
        print(rows[-1], flush=True)
    error = math.sqrt(0.05 * 0.95 / args.studies)
    save_result(
        "verdict",
        columns=[
            "truth",
            "pass",
            "fail",
            "inconclusive",
            "wrong would be",
            "90% interval of accuracy covers",
            "of perplexity covers",
        ],
        rows=rows,
        note=f"{args.studies} simulated studies per row; margins 2 points, 10 points per slice of "
        f"eight, 10% perplexity, alpha 5%; standard error of a share of 5%: {error:.3f}",
        data=data,
    )


def draw(truth: Truth, rng: np.random.Generator, seed: int) -> Evidence:
    """Sample one study."""
    groups = truth.items // truth.cluster
    slice_of = np.arange(groups) % SLICES
    loss = truth.loss + np.where(slice_of == 0, truth.slice_loss, 0.0)
    flips = np.maximum(truth.flips, loss)
    harm, gain = (flips + loss) / 2, (flips - loss) / 2
    documents = np.repeat(np.arange(groups), truth.cluster)
    if truth.correlation < 1:
        shape = 1 / truth.correlation - 1
        harm, luck = rng.beta(harm * shape, (1 - harm) * shape), rng.random(truth.items)
    else:
        luck = rng.random(groups)[documents]
    harm, gain, place = harm[documents], gain[documents], slice_of[documents]
    change = np.where(luck < harm, -1, np.where(luck < harm + gain, 1, 0))
    base = np.where(change == 0, rng.random(groups)[documents] < BASE_ACCURACY, change < 0)
    candidate = np.where(change == 0, base, change > 0)

    def part(name: str, rows: np.ndarray):
        seen = count_flips(base[rows].tolist(), candidate[rows].tolist(), documents[rows].tolist())
        return measure_slice(name, seen, int(base[rows].sum()), MARGINS)

    return Evidence(
        overall=part("all items", np.ones(len(base), dtype=bool)),
        slices=tuple(part(f"slice {s}", place == s) for s in range(min(SLICES, groups))),
        text=draw_text(truth, rng, seed),
    )


def draw_text(truth: Truth, rng: np.random.Generator, seed: int) -> TextFidelity:
    """Sample paired documents: lengths from 100 to 600, skewed differences as in real ones."""
    counts = rng.integers(100, 600, truth.documents)
    spread = 0.04
    skewed = (rng.gamma(2.0, 1.0, truth.documents) - 2.0) / math.sqrt(2.0)
    per_token = math.log(truth.ratio) + spread * skewed
    boot = bootstrap_ratio(per_token * counts, counts, seed=seed, resamples=1000)
    assert boot is not None
    interval = boot.interval(MARGINS.confidence)
    return TextFidelity(
        num_tokens=int(counts.sum()),
        num_documents=truth.documents,
        kl_nats=0.1,
        kl_interval=None,
        kl_percentiles={},
        kl_histogram=(),
        top1_agreement=0.9,
        top1_interval=None,
        base_perplexity=20.0,
        candidate_perplexity=20.0 * math.exp(boot.mean),
        nll_increase_nats=boot.mean,
        nll_increase_interval=interval,
        bootstrap=boot,
        by_kind=(),
        worst=(),
        noise_kl_nats=None,
        noise_kl_largest=None,
        candidate_finite=True,
        base_finite=True,
    )


if __name__ == "__main__":
    main()
