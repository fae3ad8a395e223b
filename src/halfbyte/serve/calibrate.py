"""From a comparison to a threshold: how unsure must an answer be for the larger model to be asked?

Base and candidate answered the same questions, and the candidate's confidence in each answer is
known. Where the unsure ones are answered by the base instead, some get better, and the larger model
has that share of the work. A threshold is chosen by that share, never by the accuracy that it seems
to bring: so what the table says about accuracy is not flattered by the choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import ConfigError
from halfbyte.judge.bootstrap import bootstrap_ratio
from halfbyte.judge.statistics import MIN_DOCUMENTS, Interval
from halfbyte.serve.routing.confidence import Confidence, measure_confidence

SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
INTERVAL = 0.9

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One item: how sure the candidate was, and who was right."""

    document: str
    confidence: float
    """The statistic, in nats."""
    base_right: bool
    candidate_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one threshold brings."""

    threshold: float
    share: float
    """Of the requests that fall back."""
    share_interval: Interval | None
    accuracy: float
    """Of both models together."""
    gain: float
    """Over the candidate alone."""
    gain_interval: Interval | None
    over_chance: float
    """Of that gain, what as many requests drawn at random would not bring."""
    over_chance_interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold, and the table that it was chosen from."""

    confidence: Confidence
    num_items: int
    base_accuracy: float
    candidate_accuracy: float
    choices: tuple[Choice, ...]
    chosen: Choice

    @property
    def tells(self) -> bool:
        """Whether low confidence finds wrong answers better than chance does, beyond doubt."""
        interval = self.chosen.over_chance_interval
        return interval is not None and interval.low > 0

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON; `halfbyte serve --confidence` reads the first ones."""
        return {
            **self.confidence.to_dict(),
            "items": self.num_items,
            "base_accuracy": self.base_accuracy,
            "candidate_accuracy": self.candidate_accuracy,
            "interval": INTERVAL,
            "chosen": _plain(self.chosen),
            "choices": [_plain(choice) for choice in self.choices],
        }


def _plain(choice: Choice) -> dict[str, Any]:
    values = {name: getattr(choice, name) for name in choice.__dataclass_fields__}
    return {
        name: {"low": value.low, "high": value.high} if isinstance(value, Interval) else value
        for name, value in values.items()
    }


def read_judged(path: Path, statistic: str, first_tokens: int | None) -> list[Judged]:
    """Read a comparison's written answers.

    Args:
        path: ``report.json`` of `halfbyte compare`: its base is the larger model, its candidate
            the one that is served.
        statistic: What confidence is.
        first_tokens: Of each answer that count; None: all.

    Returns:
        Those items of which the confidence is known.

    Raises:
        ConfigError: It is no such file, or there are too few.
    """
    try:
        items = json.loads(path.read_bytes())["items"]
        found = [
            Judged(
                document=item["document"] or item["name"],
                confidence=value,
                base_right=item["base_right"],
                candidate_right=item["candidate_right"],
            )
            for item in items
            if (
                value := measure_confidence(
                    statistic,
                    first_tokens,
                    item["candidate_logprobs"],
                    item["candidate_entropies"],
                )
            )
            is not None
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Cannot read '{path}' as the report.json of a comparison: {error!r}. Write it with "
            "`halfbyte compare LARGER SERVED -o FOLDER` of this version."
        ) from error
    documents = len({one.document for one in found})
    if documents < MIN_DOCUMENTS:
        raise ConfigError(
            f"'{path}' has {documents} written answers of known confidence; at least "
            f"{MIN_DOCUMENTS} are needed, and hundreds for narrow intervals. Compare on more "
            "items, with the candidate in this machine and not behind an address."
        )
    return found


def calibrate(
    items: Sequence[Judged],
    *,
    statistic: str = "mean_logprob",
    first_tokens: int | None = None,
    share: float = 0.1,
) -> Calibration:
    """Choose the threshold below which at most a share of the requests falls.

    Args:
        items: Judged answers.
        statistic: What their confidence is.
        first_tokens: That it was taken of.
        share: Of the requests that may fall back.

    Returns:
        The threshold and the table around it.

    Raises:
        ConfigError: The share is none.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share is {share:g}; it must be above 0 and below 1.")
    shares = sorted({*SHARES, share})
    choices = {one: _choose(items, statistic, one) for one in shares}
    return Calibration(
        confidence=Confidence(
            statistic=statistic, threshold=choices[share].threshold, first_tokens=first_tokens
        ),
        num_items=len(items),
        base_accuracy=float(np.mean([one.base_right for one in items])),
        candidate_accuracy=float(np.mean([one.candidate_right for one in items])),
        choices=tuple(choices[one] for one in shares),
        chosen=choices[share],
    )


def _choose(items: Sequence[Judged], statistic: str, share: float) -> Choice:
    """Find the threshold of a share, and what it brings."""
    # The higher, the less sure.
    sign = 1.0 if statistic == "mean_entropy" else -1.0
    doubt = sign * np.array([one.confidence for one in items])
    ordered = np.sort(doubt)
    allowed = math.floor(share * len(items))
    # Those strictly above the threshold fall back: of equal ones none, rather than too many.
    threshold = float(ordered[len(items) - allowed - 1])
    falls = doubt > threshold
    better = np.array([float(one.base_right) - one.candidate_right for one in items])
    right = np.array([float(one.candidate_right) for one in items])
    gains = falls * better
    chance = float(falls.mean()) * better
    documents = [one.document for one in items]
    return Choice(
        threshold=sign * threshold,
        share=float(falls.mean()),
        share_interval=_interval(falls.astype(np.float64), documents),
        accuracy=float((right + gains).mean()),
        gain=float(gains.mean()),
        gain_interval=_interval(gains, documents),
        over_chance=float((gains - chance).mean()),
        over_chance_interval=_interval(gains - chance, documents),
    )


def _interval(values: Floats, documents: Sequence[str]) -> Interval | None:
    """Give the bootstrap interval of a mean; items of a document are resampled together."""
    names = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    index = np.array([names[name] for name in documents])
    totals, counts = np.bincount(index, weights=values), np.bincount(index)
    found = bootstrap_ratio(totals.tolist(), counts.tolist())
    return None if found is None else found.interval(INTERVAL)
