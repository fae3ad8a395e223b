"""Weights of calibration tokens at each linear, loaded from the gradients on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import TensorFiles

MAX_WEIGHT = 16.0
"""Upper limit of a token's weight, relative to the mean."""


class TokenWeights:
    """Weights of calibration tokens in the Hessians, by linear."""

    def __init__(self, files: TensorFiles, portions: int, sizes: Sequence[int]) -> None:
        """Use the files of :func:`halfbyte.quantize.token_gradients.measure_token_weights`.

        Args:
            files: Squared gradients [tokens], by linear and portion.
            portions: Number of portions.
            sizes: Tokens of every batch.
        """
        self._files = files
        self._portions = range(portions)
        self._sizes = list(sizes)

    def roots(self, linears: Sequence[str], device: torch.device) -> list[Tensor] | None:
        """Return square roots of the token weights, by which inputs are scaled before x xᵀ.

        Args:
            linears: Names on disk of the linears that share the input.
            device: Device of the result.

        Returns:
            fp32 [tokens] for every batch, of mean square 1; None for equal weights, as for linears
            that do not see every token (experts).
        """
        keys = [[gradient_key(linear, k) for k in self._portions] for linear in linears]
        if not all(key in self._files.infos for linear_keys in keys for key in linear_keys):
            return None
        squares = torch.zeros(sum(self._sizes))
        for linear_keys in keys:
            tensors = self._files.load(linear_keys)
            squares += torch.cat([tensors[key] for key in linear_keys])
        weights = squares.sqrt_()
        mean = float(weights.mean())
        if mean == 0:
            return None  # no token has a gradient, so all weigh the same
        weights.div_(mean).clamp_(max=MAX_WEIGHT)
        roots = weights.div_(weights.mean()).sqrt_().to(device)
        return list(torch.split(roots, self._sizes))


def gradient_key(linear: str, portion: int) -> str:
    """Return the name of the tensor with a linear's squared gradients of one portion."""
    return f"{linear}.{portion}"
