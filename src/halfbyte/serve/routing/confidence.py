"""Was the model sure of its answer? One number per answer, and a threshold from a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.serve.watch.observation import Seen

STATISTICS = ("mean_logprob", "sum_logprob", "least_logprob", "mean_entropy")
"""Of the drawn tokens, or of the distributions that they were drawn from; in nats."""

FORM = 1
"""Of the file; another one is not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """What counts as sure."""

    statistic: str
    threshold: float
    """An answer is unsure with logprobs below it, or an entropy above it."""
    first_tokens: int | None = None
    """How many tokens count, from the first; None: all of the answer."""

    def value(self, seen: Seen) -> float | None:
        """Give an answer's confidence; None where the model told nothing."""
        return measure_confidence(self.statistic, self.first_tokens, seen.logprobs, seen.entropies)

    def doubts(self, seen: Seen) -> bool:
        """Tell whether an answer is not sure enough."""
        found = self.value(seen)
        if found is None:
            return False
        return found < self.threshold if self.needs_logprobs else found > self.threshold

    @property
    def needs_logprobs(self) -> bool:
        """Whether a model must be asked for logprobs."""
        return self.statistic != "mean_entropy"

    def is_decided(self, seen: Seen) -> bool:
        """Tell whether enough of an answer is there, before it is complete."""
        values = seen.logprobs if self.needs_logprobs else seen.entropies
        return self.first_tokens is not None and len(values) >= self.first_tokens

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {
            "form": FORM,
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
    """Give one figure for how sure a model was.

    Args:
        statistic: One of ``STATISTICS``.
        first_tokens: How many count; None: all.
        logprobs: Of the drawn tokens.
        entropies: Of their distributions.

    Returns:
        The figure in nats; None where there is nothing to take it of.
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
    """Read what `halfbyte serve calibrate` wrote.

    Args:
        path: The file.

    Returns:
        The threshold.

    Raises:
        ConfigError: It is no such file.
    """
    try:
        values = json.loads(path.read_bytes())
        found = Confidence(
            statistic=values["statistic"],
            threshold=float(values["threshold"]),
            first_tokens=values["first_tokens"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Cannot read thresholds from '{path}': {error!r}. Write it with `halfbyte serve "
            "calibrate`."
        ) from error
    if values.get("form") != FORM or found.statistic not in STATISTICS:
        raise ConfigError(
            f"'{path}' has thresholds of form {values.get('form')} for {found.statistic!r}; this "
            f"version reads form {FORM} for {' or '.join(STATISTICS)}. Write it anew with "
            "`halfbyte serve calibrate`."
        )
    return found
