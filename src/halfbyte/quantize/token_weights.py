"""What the tokens of a run's calibration text count at each linear, read back from files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import TensorFiles

MOST = 16.0
"""No token counts for more than so many of the usual ones."""


class TokenWeights:
    """Weights of calibration tokens in Hessians, by linear."""

    def __init__(self, files: TensorFiles, portions: int, sizes: Sequence[int]) -> None:
        """Take what :func:`halfbyte.quantize.token_gradients.measure_token_weights` left.

        Args:
            files: Squared gradients [tokens], by linear and portion.
            portions: How many portions there are.
            sizes: Tokens of every batch.
        """
        self._files = files
        self._portions = range(portions)
        self._sizes = list(sizes)

    def roots(self, linears: Sequence[str], device: torch.device) -> list[Tensor] | None:
        """Give the square roots of what the tokens count at an input, so that a product has them.

        Args:
            linears: Names on disk of those that share the input.
            device: Where they are needed.

        Returns:
            fp32 [tokens] for every batch, of mean square 1; None where the linears do not see
            every token (experts), so that all they see counts alike.
        """
        names = [[key_of(linear, k) for k in self._portions] for linear in linears]
        if not all(name in self._files.infos for of_linear in names for name in of_linear):
            return None
        squares = torch.zeros(sum(self._sizes))
        for of_linear in names:
            found = self._files.load(of_linear)
            squares += torch.cat([found[name] for name in of_linear])
        weights = squares.sqrt_()
        mean = float(weights.mean())
        if mean == 0:
            return None  # nothing hangs on them, so nothing is to be told apart
        weights.div_(mean).clamp_(max=MOST)
        roots = weights.div_(weights.mean()).sqrt_().to(device)
        return list(torch.split(roots, self._sizes))


def key_of(linear: str, portion: int) -> str:
    """Name the tensor that holds a linear's squared gradients of one portion of the text."""
    return f"{linear}.{portion}"
