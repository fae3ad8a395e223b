"""Measures how confident a model was in an answer, and compares it with a calibrated threshold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.serve.watch.observation import AttemptRecord

STATISTICS = ("mean_logprob", "sum_logprob", "least_logprob", "mean_entropy")
"""Computed from the log-probabilities of the sampled tokens, or the entropies of the distributions
they were sampled from; in nats."""

FORMAT_VERSION = 1
"""Version of the file format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """A confidence statistic and the threshold that separates confident from unsure answers."""

    statistic: str
    threshold: float
    """An answer is unsure if its log-probability is below this, or its entropy above it."""
    first_tokens: int | None = None
    """Number of leading tokens that the statistic uses; None: the whole answer."""

    def measure(self, record: AttemptRecord) -> float | None:
        """Return an answer's confidence; None if the model reported no values."""
        return measure_confidence(
            self.statistic, self.first_tokens, record.logprobs, record.entropies
        )

    def is_unsure(self, record: AttemptRecord) -> bool:
        """Return whether an answer's confidence is beyond the threshold. Unknown is not unsure."""
        value = self.measure(record)
        if value is None:
            return False
        return value < self.threshold if self.needs_logprobs else value > self.threshold

    @property
    def needs_logprobs(self) -> bool:
        """Whether the model must be asked for log-probabilities."""
        return self.statistic != "mean_entropy"

    def has_enough_tokens(self, record: AttemptRecord) -> bool:
        """Return whether a partial answer has all tokens that the statistic uses."""
        values = record.logprobs if self.needs_logprobs else record.entropies
        return self.first_tokens is not None and len(values) >= self.first_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return {
            "form": FORMAT_VERSION,
            "statistic": self.statistic,
            "threshold": self.threshold,
            "first_tokens": self.first_tokens,
        }


def measure_confidence(
    statistic: str,
    first_tokens: int | None,
    logprobs: Sequence[float],
    entropies: Sequence[float],
) -> float | None:
    """Compute a confidence statistic.

    Args:
        statistic: One of ``STATISTICS``.
        first_tokens: Number of leading tokens to use; None: all.
        logprobs: Log-probability of each sampled token.
        entropies: Entropy of each token's distribution.

    Returns:
        The statistic in nats; None if there are no values.
    """
    values = (entropies if statistic == "mean_entropy" else logprobs)[:first_tokens]
    if not values:
        return None
    match statistic:
        case "sum_logprob":
            return sum(values)
        case "least_logprob":
            return min(values)
        case _:
            return sum(values) / len(values)


def read_confidence(path: Path) -> Confidence:
    """Read the file that `halfbyte serve calibrate` writes.

    Args:
        path: The file.

    Returns:
        The statistic and its threshold.

    Raises:
        ConfigError: The file cannot be read, or has another format.
    """
    try:
        values = json.loads(path.read_bytes())
        confidence = Confidence(
            statistic=values["statistic"],
            threshold=float(values["threshold"]),
            first_tokens=values["first_tokens"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Cannot read a confidence threshold from '{path}': {error!r}. Create the file with "
            "`halfbyte serve calibrate`."
        ) from error
    if values.get("form") != FORMAT_VERSION or confidence.statistic not in STATISTICS:
        raise ConfigError(
            f"Cannot use '{path}': it has format {values.get('form')} and the statistic "
            f"{confidence.statistic!r}; this version reads format {FORMAT_VERSION} and "
            f"{' or '.join(STATISTICS)}. Create it again with `halfbyte serve calibrate`."
        )
    return confidence
