"""Offsets added to all weights of a group: an adapter that was merged exactly.

::

    x ──sum over each group──> [..., groups] @ offsets [groups, out] ──> added to x @ codes
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def sum_groups(x: Tensor, group_size: int, g_idx: Tensor | None) -> Tensor:
    """Sum the columns of each group.

    Args:
        x: [..., in].
        group_size: Columns per group; the last one may be shorter.
        g_idx: Group of each column, [in]; None: groups are contiguous.

    Returns:
        [..., groups], in x's dtype.
    """
    if g_idx is not None:
        groups = -(-x.shape[-1] // group_size)
        sums = x.new_zeros(*x.shape[:-1], groups)
        return sums.index_add(-1, g_idx.long(), x)
    full = pad(x, (0, -x.shape[-1] % group_size))
    return full.reshape(*x.shape[:-1], -1, group_size).sum(-1)


def spread_offsets(
    offsets: Tensor, in_features: int, group_size: int, g_idx: Tensor | None
) -> Tensor:
    """Expand offsets to what they add to each weight.

    Args:
        offsets: [groups, out].
        in_features: Columns of the weight.
        group_size: As for :func:`sum_groups`.
        g_idx: As for :func:`sum_groups`.

    Returns:
        [out, in], in the offsets' dtype.
    """
    if g_idx is None:
        g_idx = torch.arange(in_features, device=offsets.device) // group_size
    return offsets.t()[:, g_idx.long()]


def multiply_offsets(x: Tensor, offsets: Tensor, group_size: int, g_idx: Tensor | None) -> Tensor:
    """Compute what offsets add to a linear's output.

    Args:
        x: [..., in].
        offsets: [groups, out].
        group_size: As for :func:`sum_groups`.
        g_idx: As for :func:`sum_groups`.

    Returns:
        [..., out], in float32 or wider: the sums of a group in 16 bits would lose what is exact.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return sum_groups(x.to(wide), group_size, g_idx) @ offsets.to(wide)
