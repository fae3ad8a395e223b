"""Random quantized linears: stored tensors, spec and the weight in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.packing import pack_weight, pack_zeros


@dataclass(frozen=True, kw_only=True)
class RandomLinear:
    spec: LinearSpec
    stored: Operands
    """With a g_idx of None if the groups are in order."""
    g_idx: Tensor
    weight: Tensor
    """float64 [out, in], computed from codes, zeros and scales without packing.py."""


KINDS = ("symmetric", "asymmetric", "act-order")


def make_linear_of(
    layer: tuple[int, int, int, int], kind: str, dtype: torch.dtype = torch.float32
) -> RandomLinear:
    """Make a linear of one of KINDS; ``layer`` is (bits, in, out, group size)."""
    bits, in_features, out_features, group_size = layer
    return make_linear(
        bits=bits,
        in_features=in_features,
        out_features=out_features,
        group_size=group_size,
        symmetric=kind == "symmetric",
        act_order=kind == "act-order",
        dtype=dtype,
    )


def make_linear(
    *,
    bits: int = 4,
    in_features: int = 128,
    out_features: int = 64,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    zero_offset: int = 1,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
    size: float = 1.0,
    seed: int = 0,
) -> RandomLinear:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    groups = -(-in_features // group_size)
    codes = integers(0, 2**bits, out_features, in_features)
    if symmetric:
        zeros = torch.full((out_features, groups), 2 ** (bits - 1))
    else:
        zeros = integers(zero_offset, 2**bits, out_features, groups)
    random = torch.rand(groups, out_features, generator=generator)
    scales = ((random * 0.02 + 0.01) * size).to(scale_dtype)
    g_idx = (torch.arange(in_features) // group_size).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    rows = g_idx.long()
    return RandomLinear(
        spec=LinearSpec(
            bits=bits,
            group_size=group_size,
            in_features=in_features,
            out_features=out_features,
            symmetric=symmetric,
            act_order=act_order,
            zero_offset=zero_offset,
            dtype=dtype,
            device_type="cpu",
        ),
        stored=Operands(
            weight=(pack_weight(codes, bits),),
            qzeros=pack_zeros(zeros, bits, zero_offset),
            scales=scales,
            g_idx=g_idx if act_order else None,
        ),
        g_idx=g_idx,
        weight=(codes - zeros[:, rows]).double() * scales.t()[:, rows].double(),
    )
