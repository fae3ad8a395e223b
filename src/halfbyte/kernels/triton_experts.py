"""Products of a mixture of experts: all experts of a layer in one launch of the Triton kernel.

::

    expert ids [tokens, k] ──route──> blocks of rows, each of one expert ──multiply_experts──>
    [rows, out] ──combine──> the weighted sum of each token's k rows

All shapes depend on the number of tokens only, never on which experts they choose, so nothing waits
for the CPU and a decode step can be captured as a CUDA graph. Experts stay where they are in
memory: the kernel reads their addresses from a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.fragments import find_order, find_zeros
from halfbyte.kernels.gpu_device import (
    count_processors,
    early_options,
    name_architecture,
    on_device,
)
from halfbyte.kernels.triton_configs import choose_experts_config, next_power_of_two
from halfbyte.kernels.triton_linear import DEVICES, launch_multiply

MAX_TILE = 2**12
"""Tokens times experts up to which one program routes; more would not fit its registers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Rows of a product, sorted by expert; an expert has whole blocks of rows."""

    block_rows: int
    """Rows per block."""
    block_experts: Tensor
    """int32 [row blocks], the expert of each block; undefined if the block has no rows."""
    block_counts: Tensor
    """int32 [row blocks], how many rows of each block are used."""
    sources: Tensor
    """int32 [rows], the token of each used row."""
    places: Tensor
    """int32 [tokens, k], the row of each of a token's experts; -1 for an id of no expert."""


class ExpertWeights:
    """The same linear of all experts of a layer, as a table of addresses."""

    def __init__(
        self, spec: LinearSpec, operands: Sequence[Operands], biases: Sequence[Tensor | None]
    ) -> None:
        """Collect the addresses.

        Args:
            spec: The linear; the same for all experts.
            operands: Operands of each expert in the layout of :mod:`halfbyte.kernels.fragments`,
                on one device. The caller keeps them alive.
            biases: Bias [out] of each expert, all or none.
        """
        self.spec = spec
        self.num_experts = len(operands)
        # Of the first expert, for the types of the tensors.
        self.operands, self.bias = operands[0], biases[0]
        self.addresses = torch.tensor(
            [
                [
                    0 if tensor is None else tensor.data_ptr()
                    for tensor in (
                        one.weight[0],
                        find_zeros(one, spec),
                        one.scales,
                        find_order(one, spec),
                        bias,
                    )
                ]
                for one, bias in zip(operands, biases, strict=True)
            ],
            dtype=torch.int64,
            device=operands[0].scales.device,
        )


def choose_block_rows(pairs: int, num_experts: int) -> int:
    """Choose the rows per block from the mean number of rows of an expert.

    Args:
        pairs: Tokens times experts per token.
        num_experts: Experts of the layer.

    Returns:
        16, 32 or 64.
    """
    mean = pairs / min(pairs, num_experts)
    return next((rows for rows in (16, 32) if mean <= rows), 64)


def count_row_blocks(pairs: int, num_experts: int, block_rows: int) -> int:
    """Return how many blocks of rows suffice, whichever experts the tokens choose."""
    # Every expert with rows leaves at most block_rows - 1 unused.
    return (pairs + min(pairs, num_experts) * (block_rows - 1)) // block_rows


def route(experts: Tensor, num_experts: int, block_rows: int) -> Routing:
    """Sort the rows of a product by expert.

    Args:
        experts: int64 [tokens, k], distinct ids of each token's experts. Ids outside of
            0..num_experts - 1 stand for no expert.
        num_experts: Experts of the layer.
        block_rows: Rows per block.

    Returns:
        The routing, in the order of the tokens for each expert.
    """
    tokens, per_token = experts.shape
    row_blocks = count_row_blocks(experts.numel(), num_experts, block_rows)
    if experts.device.type not in DEVICES or tokens * num_experts > MAX_TILE:
        return route_in_torch(experts, num_experts, block_rows)
    from halfbyte.kernels.triton_expert_kernels import route_kernel

    block_experts, block_counts = experts.new_empty(2, row_blocks, dtype=torch.int32).unbind()
    sources = experts.new_empty(row_blocks * block_rows, dtype=torch.int32)
    places = torch.empty_like(experts, dtype=torch.int32, memory_format=torch.contiguous_format)
    with on_device(experts.device):
        route_kernel[(1,)](
            experts.contiguous(),
            block_experts,
            block_counts,
            sources,
            places,
            tokens,
            num_experts,
            row_blocks,
            PER_TOKEN=per_token,
            BLOCK_ROWS=block_rows,
            TOKENS=next_power_of_two(tokens),
            EXPERTS=next_power_of_two(num_experts),
            BLOCKS=next_power_of_two(row_blocks),
            num_warps=8,
        )
    return Routing(
        block_rows=block_rows,
        block_experts=block_experts,
        block_counts=block_counts,
        sources=sources,
        places=places,
    )


def route_in_torch(experts: Tensor, num_experts: int, block_rows: int) -> Routing:
    """Do the same as :func:`route` in plain torch, for any number of tokens."""
    tokens = experts.shape[0]
    row_blocks = count_row_blocks(experts.numel(), num_experts, block_rows)
    exists = (experts >= 0) & (experts < num_experts)
    # One column more, for the ids of no expert.
    ids = torch.where(exists, experts, num_experts)
    chosen = ids.new_zeros(tokens, num_experts + 1).scatter_(1, ids, 1)
    chosen[:, num_experts] = 0
    counts = chosen.sum(0)
    blocks = (counts + block_rows - 1) // block_rows
    ends = blocks.cumsum(0)
    firsts = ends - blocks
    places = (firsts * block_rows + chosen.cumsum(0) - chosen).gather(1, ids)
    # One row more, for the ids of no expert.
    sources = ids.new_zeros(row_blocks * block_rows + 1)
    rows = torch.where(exists, places, row_blocks * block_rows)
    token = torch.arange(tokens, device=ids.device)[:, None].expand_as(rows)
    sources.scatter_(0, rows.flatten(), token.flatten())
    block = torch.arange(row_blocks, device=ids.device)
    owner = torch.searchsorted(ends, block, right=True).clamp_(max=num_experts)
    left = counts[owner] - (block - firsts[owner]) * block_rows
    return Routing(
        block_rows=block_rows,
        block_experts=owner.int(),
        block_counts=torch.where(owner < num_experts, left.clamp(max=block_rows), 0).int(),
        sources=sources[:-1].int(),
        places=torch.where(exists, places, -1).int(),
    )


def multiply_experts(
    x: Tensor, weights: ExpertWeights, routing: Routing, *, by_token: bool, fast: bool | None = None
) -> Tensor:
    """Multiply each row by the weight of its expert.

    Args:
        x: [tokens, in] or [rows, in], contiguous, in the dtype of the layer.
        weights: The linear of all experts.
        routing: The rows.
        by_token: Whether x has a row per token instead of one per row of the result.
        fast: Whether to use NVIDIA's instructions; None: if the device is an NVIDIA GPU.

    Returns:
        [rows, out]; rows that are not used are undefined.
    """
    spec, row_blocks = weights.spec, len(routing.block_counts)
    result = x.new_empty(row_blocks * routing.block_rows, spec.out_features)
    config = choose_experts_config(
        name_architecture(x.device),
        count_processors(x.device),
        spec.in_features,
        spec.out_features,
        row_blocks,
        routing.block_rows,
    )
    launch_multiply(
        x,
        weights.operands,
        weights.bias,
        result,
        spec,
        config,
        fast=fast,
        early=True,
        addresses=weights.addresses,
        block_experts=routing.block_experts,
        block_counts=routing.block_counts,
        sources=routing.sources if by_token else None,
    )
    return result


def combine(parts: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """Add up the results of each token's experts.

    Args:
        parts: [rows, width].
        routing: The rows.
        weights: [tokens, k], of each token's experts.

    Returns:
        [tokens, width] in the dtype of ``parts``, summed in fp32 in the order of k.
    """
    from halfbyte.kernels.triton_expert_kernels import combine_kernel

    tokens, per_token = weights.shape
    width = parts.shape[1]
    result = parts.new_empty(tokens, width)
    block = 512
    with on_device(parts.device):
        combine_kernel[(-(-width // block), tokens)](
            parts,
            routing.places,
            weights.contiguous(),
            result,
            width,
            PER_TOKEN=per_token,
            BLOCK=block,
            num_warps=4,
            **early_options(parts.device),
        )
    return result
