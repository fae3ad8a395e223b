"""An orthogonal matrix for a residual stream, and how the linears beside it take it up.

A model that reads its stream through RMS norms only, their gains moved into the linears behind
them, computes the same when the whole stream is turned: what reads it, ``W``, becomes ``W Q``, what
writes it ``Qᵀ W``. The few directions with huge numbers are then spread over all channels, and so
is what is special about a weight's columns.

Source:
    Turning a stream and moving gains: Ashkboos et al. 2024, "SliceGPT",
    https://arxiv.org/abs/2401.15024. Hadamard matrices with random signs against outliers:
    Ashkboos et al. 2024, "QuaRot", https://arxiv.org/abs/2404.00456; this rotation is R1 in Liu et
    al. 2024, "SpinQuant", https://arxiv.org/abs/2405.16406.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

LARGEST_HADAMARD = 64
"""A larger one is a product of several: as good, and less to compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """An orthogonal matrix Q: random signs, then the Kronecker product of its factors."""

    signs: Tensor
    """fp32 [width] of -1 and 1."""
    factors: tuple[Tensor, ...]
    """fp32, orthogonal, [n, n] each; the sizes multiply to the width."""

    @classmethod
    def random(cls, width: int, seed: int, device: torch.device | str = "cpu") -> Self:
        """Draw one: Hadamard factors as far as 2 divides the width, else a random factor.

        Args:
            width: Of the stream.
            seed: The same one gives the same matrix on every device.
            device: Where it is to be used.

        Returns:
            The rotation.
        """
        dice = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(0, 2, (width,), generator=dice) - 1
        power = width & -width
        factors = []
        if width > power:
            odd = width // power
            drawn = torch.randn(odd, odd, generator=dice, dtype=torch.float64)
            factors.append(torch.linalg.qr(drawn).Q.float().contiguous())
        while power > 1:
            size = min(power, LARGEST_HADAMARD)
            factors.append(_hadamard(size))
            power //= size
        return cls(signs=signs.to(device), factors=tuple(f.to(device) for f in factors))

    def turn(self, vectors: Tensor) -> Tensor:
        """Multiply with Q from the right.

        Args:
            vectors: [..., width]; computed in fp32.

        Returns:
            fp32 [..., width].
        """
        turned = vectors.float() * self.signs
        left, right = 1, turned.shape[-1]
        for factor in self.factors:
            size = len(factor)
            right //= size
            parts = turned.reshape(-1, left, size, right)
            turned = torch.einsum("nlir,ij->nljr", parts, factor)
            left *= size
        return turned.reshape(vectors.shape)

    def turn_reader(self, weight: Tensor, gains: Tensor) -> Tensor:
        """Give the weight of a linear that reads the turned stream.

        Args:
            weight: [out, width].
            gains: [width], of the norm in front of it, which loses them.

        Returns:
            fp32 [out, width].
        """
        return self.turn(weight.float() * gains.float())

    def turn_writer(self, weight: Tensor) -> Tensor:
        """Give the weight of a linear that writes into the turned stream.

        Args:
            weight: [width, in].

        Returns:
            fp32 [width, in].
        """
        return self.turn(weight.t()).t()


def _hadamard(size: int) -> Tensor:
    """Give Sylvester's matrix of a power of 2, with rows of length 1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.div_(size**0.5)
