"""Calibrates from a comparison the confidence threshold below which a request falls back.

Base and candidate answered the same questions, and the candidate's confidence in each answer is
known. If the base answers the unsure ones instead, accuracy improves, and the larger model gets
that share of the requests. The threshold is chosen by the share, never by accuracy, so that the
accuracy in the table has no selection bias.
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
    """One item: the candidate's confidence, and which models were right."""

    document: str
    confidence: float
    """The statistic, in nats."""
    base_right: bool
    candidate_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One threshold and its effect."""

    threshold: float
    share: float
    """Share of the requests that fall back."""
    share_interval: Interval | None
    accuracy: float
    """Accuracy of both models together."""
    gain: float
    """Accuracy gain over the candidate alone."""
    gain_interval: Interval | None
    over_chance: float
    """Gain over falling back for as many requests drawn at random."""
    over_chance_interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The chosen threshold, and all candidates for it."""

    confidence: Confidence
    num_items: int
    base_accuracy: float
    candidate_accuracy: float
    choices: tuple[Choice, ...]
    chosen: Choice

    @property
    def is_better_than_chance(self) -> bool:
        """Whether low confidence finds wrong answers significantly better than chance."""
        interval = self.chosen.over_chance_interval
        return interval is not None and interval.low > 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values; `halfbyte serve --confidence` reads the first ones."""
        return {
            **self.confidence.to_dict(),
            "items": self.num_items,
            "base_accuracy": self.base_accuracy,
            "candidate_accuracy": self.candidate_accuracy,
            "interval": INTERVAL,
            "chosen": _to_dict(self.chosen),
            "choices": [_to_dict(choice) for choice in self.choices],
        }


def _to_dict(choice: Choice) -> dict[str, Any]:
    values = {name: getattr(choice, name) for name in choice.__dataclass_fields__}
    return {
        name: {"low": value.low, "high": value.high} if isinstance(value, Interval) else value
        for name, value in values.items()
    }


def read_judged(path: Path, statistic: str, first_tokens: int | None) -> list[Judged]:
    """Read a comparison's generated answers.

    Args:
        path: ``report.json`` of `halfbyte compare`, whose base is the larger model and whose
            candidate is the served model.
        statistic: The confidence statistic.
        first_tokens: Number of leading tokens that it uses; None: all.

    Returns:
        The items whose confidence is known.

    Raises:
        ConfigError: The file cannot be read, or has too few items.
    """
    try:
        items = json.loads(path.read_bytes())["items"]
        judged = [
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
            f"Cannot read '{path}' as the report.json of a comparison: {error!r}. Create it with "
            "`halfbyte compare LARGER SERVED -o FOLDER` of this version."
        ) from error
    documents = len({item.document for item in judged})
    if documents < MIN_DOCUMENTS:
        raise ConfigError(
            f"Cannot calibrate from '{path}': it has {documents} generated answers with known "
            f"confidence; at least {MIN_DOCUMENTS} are needed, and hundreds for narrow "
            "intervals. Compare on more items, with the candidate as a folder, not as an address."
        )
    return judged


def calibrate(
    items: Sequence[Judged],
    *,
    statistic: str = "mean_logprob",
    first_tokens: int | None = None,
    share: float = 0.1,
) -> Calibration:
    """Choose the threshold at which at most a given share of the requests falls back.

    Args:
        items: Judged answers.
        statistic: Their confidence statistic.
        first_tokens: Number of leading tokens that it uses; None: all.
        share: Maximum share of the requests that fall back.

    Returns:
        The threshold, and a table of other shares.

    Raises:
        ConfigError: The share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share is {share:g}; it must be above 0 and below 1.")
    shares = sorted({*SHARES, share})
    choices = {value: _choose(items, statistic, value) for value in shares}
    return Calibration(
        confidence=Confidence(
            statistic=statistic, threshold=choices[share].threshold, first_tokens=first_tokens
        ),
        num_items=len(items),
        base_accuracy=float(np.mean([item.base_right for item in items])),
        candidate_accuracy=float(np.mean([item.candidate_right for item in items])),
        choices=tuple(choices[value] for value in shares),
        chosen=choices[share],
    )


def _choose(items: Sequence[Judged], statistic: str, share: float) -> Choice:
    """Find the threshold for a share, and its effect."""
    # Uncertainty: higher means less confident, for every statistic.
    sign = 1.0 if statistic == "mean_entropy" else -1.0
    uncertainty = sign * np.array([item.confidence for item in items])
    ordered = np.sort(uncertainty)
    allowed = math.floor(share * len(items))
    # Only items strictly above the threshold fall back, so that ties do not exceed the share.
    threshold = float(ordered[len(items) - allowed - 1])
    falls_back = uncertainty > threshold
    improvement = np.array([float(item.base_right) - item.candidate_right for item in items])
    right = np.array([float(item.candidate_right) for item in items])
    gains = falls_back * improvement
    chance = float(falls_back.mean()) * improvement
    documents = [item.document for item in items]
    return Choice(
        threshold=sign * threshold,
        share=float(falls_back.mean()),
        share_interval=_interval(falls_back.astype(np.float64), documents),
        accuracy=float((right + gains).mean()),
        gain=float(gains.mean()),
        gain_interval=_interval(gains, documents),
        over_chance=float((gains - chance).mean()),
        over_chance_interval=_interval(gains - chance, documents),
    )


def _interval(values: Floats, documents: Sequence[str]) -> Interval | None:
    """Return the bootstrap interval of a mean; a document's items are resampled together."""
    names = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    index = np.array([names[name] for name in documents])
    totals, counts = np.bincount(index, weights=values), np.bincount(index)
    ratio = bootstrap_ratio(totals.tolist(), counts.tolist())
    return None if ratio is None else ratio.interval(INTERVAL)
