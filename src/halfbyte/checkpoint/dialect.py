"""Detect a linear's dialect, symmetry and groups from its tensors.

Configs are often wrong, so the tensors take precedence: symmetric zeros all have the same value,
which differs between v1 and v2, and ``g_idx`` determines the group size and order.

Source:
    Mislabelled symmetric files (declared v1, stored v2): vLLM issue 38966.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from halfbyte.checkpoint.layout import FORMAT_V1, FORMAT_V2, LinearLayout
from halfbyte.errors import CheckpointError
from halfbyte.packing import codes_per_run, pack_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroDialect:
    """How the zeros of one linear are stored."""

    zero_offset: int
    """Subtracted from each zero before storing: 1 in v1, 0 in v2."""
    is_symmetric: bool
    """Whether every zero is the middle code."""
    note: str | None = None
    """Why the config was overruled; None if it was not."""


def detect_zero_dialect(
    module: str,
    qzeros: Tensor,
    bits: int,
    *,
    declared_offset: int,
    declared_symmetric: bool | None,
) -> ZeroDialect:
    """Distinguish v1 from v2 by the stored zeros if they are uniform, else by the config.

    Args:
        module: Full dotted name; used in messages.
        qzeros: int32 as on disk, shape [groups, out * bits / 32].
        bits: 2, 3, 4 or 8.
        declared_offset: 1 if the config declares v1 or nothing, 0 if it declares v2.
        declared_symmetric: The config's ``sym``; None if it has none.

    Returns:
        The dialect. Uniform zeros determine it unless the config declares them asymmetric.

    Raises:
        CheckpointError: The config says symmetric, but the zeros are not all the middle code.
    """
    for offset in (1, 0):
        stored = 2 ** (bits - 1) - offset
        run = _pack_uniform_run(bits, stored).to(qzeros.device)
        if not torch.equal(qzeros, run.repeat(qzeros.shape[1] // len(run)).expand_as(qzeros)):
            continue
        if declared_symmetric is False:
            middle = declared_offset == offset
            return ZeroDialect(zero_offset=declared_offset, is_symmetric=middle)
        note = None
        if offset != declared_offset:
            names = {1: FORMAT_V1, 0: FORMAT_V2}
            note = (
                f"{module}.qzeros stores {stored} everywhere, which is {names[offset]}; the config "
                f"says {names[declared_offset]}. The tensor is used."
            )
        return ZeroDialect(zero_offset=offset, is_symmetric=True, note=note)
    if declared_symmetric:
        middle_code = 2 ** (bits - 1)
        raise CheckpointError(
            f"{module}.qzeros does not store {middle_code - 1} (v1) or {middle_code} (v2) "
            f"everywhere, as sym: true in the config requires for {bits} bits. The file is "
            "damaged, or the config is wrong: if the model is asymmetric, set sym to false in it."
        )
    return ZeroDialect(zero_offset=declared_offset, is_symmetric=False)


@cache
def _pack_uniform_run(bits: int, code: int) -> Tensor:
    """Pack a run of one code into words; cached, as all linears of a model need the same."""
    codes = torch.full((codes_per_run(bits), 1), code, device="cpu")
    return pack_codes(codes, bits).flatten()


def infer_group_size(module: str, g_idx: Tensor, num_groups: int) -> int:
    """Infer the group size from ``g_idx``, and check that it is valid.

    Args:
        module: Full dotted name; used in messages.
        g_idx: Group of each input column, shape [in].
        num_groups: Rows of ``scales``.

    Returns:
        The size of all groups except the last, which may be smaller.

    Raises:
        CheckpointError: A group is out of range, or the groups have different sizes.
    """
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= num_groups:
        raise CheckpointError(
            f"{module}.g_idx has values {low}..{high}; allowed are 0..{num_groups - 1}, the rows "
            "of its scales. The file is damaged; download or quantize it again."
        )
    counts = torch.bincount(g_idx.long(), minlength=num_groups)
    group_size = int(counts[0])
    if bool((counts[:-1] != group_size).any()) or not 0 < int(counts[-1]) <= group_size:
        raise CheckpointError(
            f"{module}.g_idx gives its {num_groups} groups {int(counts.min())} to "
            f"{int(counts.max())} columns each; all but the last must have the same size. The file "
            "is damaged; download or quantize it again."
        )
    return group_size


def make_trivial_g_idx(layout: LinearLayout) -> Tensor:
    """Make the ``g_idx`` of contiguous groups in order, int32 [in]."""
    columns = torch.arange(layout.in_features, dtype=torch.int32)
    return columns // layout.group_size
