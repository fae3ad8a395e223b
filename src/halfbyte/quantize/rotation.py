"""An orthogonal rotation of the residual stream, and its fusion into the linears around it.

If a model reads its residual stream only through RMS norms, whose gains are folded into the
following linears, its outputs do not change when the stream is rotated: weights that read the
stream become ``W Q``, and weights that write it ``Qᵀ W``. The rotation spreads the few channels
with very large activations, and outlier columns of weights, over all channels.

Source:
    Rotating the stream and folding gains: Ashkboos et al. 2024, "SliceGPT",
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
"""Larger sizes use a Kronecker product of several: equally good and cheaper to apply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """An orthogonal matrix Q: random signs followed by the Kronecker product of the factors."""

    signs: Tensor
    """fp32 [width] of -1 and 1."""
    factors: tuple[Tensor, ...]
    """fp32, orthogonal, [n, n] each; the sizes multiply to the width."""

    @classmethod
    def random(cls, width: int, seed: int, device: torch.device | str = "cpu") -> Self:
        """Draw a rotation: Hadamard factors for the width's power of 2, a random one for the rest.

        Args:
            width: Width of the stream.
            seed: Random seed; the result does not depend on the device.
            device: Device of the result.

        Returns:
            The rotation.
        """
        generator = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(0, 2, (width,), generator=generator) - 1
        power = width & -width
        factors = []
        if width > power:
            odd = width // power
            drawn = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
            factors.append(torch.linalg.qr(drawn).Q.float().contiguous())
        while power > 1:
            size = min(power, LARGEST_HADAMARD)
            factors.append(_hadamard(size))
            power //= size
        return cls(signs=signs.to(device), factors=tuple(f.to(device) for f in factors))

    def rotate(self, vectors: Tensor) -> Tensor:
        """Multiply by Q from the right.

        Args:
            vectors: [..., width]; computed in fp32.

        Returns:
            fp32 [..., width].
        """
        rotated = vectors.float() * self.signs
        left, right = 1, rotated.shape[-1]
        for factor in self.factors:
            size = len(factor)
            right //= size
            parts = rotated.reshape(-1, left, size, right)
            rotated = torch.einsum("nlir,ij->nljr", parts, factor)
            left *= size
        return rotated.reshape(vectors.shape)

    def rotate_reader(self, weight: Tensor, gains: Tensor) -> Tensor:
        """Return the weight of a linear that reads the rotated stream.

        Args:
            weight: [out, width].
            gains: [width], of the norm before it, which are folded into the weight.

        Returns:
            fp32 [out, width].
        """
        return self.rotate(weight.float() * gains.float())

    def rotate_writer(self, weight: Tensor) -> Tensor:
        """Return the weight of a linear that writes the rotated stream.

        Args:
            weight: [width, in].

        Returns:
            fp32 [width, in].
        """
        return self.rotate(weight.t()).t()


def _hadamard(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix of a power of 2, with rows of norm 1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.div_(size**0.5)
