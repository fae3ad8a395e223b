"""Measure the sizes of a model's blocks for the memory and time plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfbyte.model.blocks import linear_weight, quantizable_linears
from halfbyte.model.experts import find_fused_experts
from halfbyte.model.weights import ModelWeights
from halfbyte.quantize.rounding import rows_at_a_time

SOLVER_COPIES = 8
"""fp32 matrices of a weight's size that the solver holds at its peak, as measured."""
HESSIAN_COPIES = 5
"""fp32 matrices of a Hessian's size that the factorization holds at its peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the largest block, which determine memory, and of all blocks together."""

    hidden: int
    """Numbers per token between blocks."""
    block_bytes: int
    """In the stored dtype."""
    block_numbers: int
    """Parameters of the largest block."""
    widest_input: int
    solver_bytes: int
    """Peak memory of rounding."""
    routed: int
    """Experts that a token is routed to; 1 without experts."""
    numbers: int
    """Weights of all linears in all blocks that are active for a token."""
    linears: int
    """Number of linears in all blocks, without fused experts."""
    hessian_macs: int
    """in² summed over all inputs: multiply-adds per token for the Hessians."""
    solve_macs: int
    """Multiply-adds of one sweep over all weights."""


def measure_sizes(weights: ModelWeights, *, hidden: int, matrices: int) -> Sizes:
    """Measure the block sizes of a model that is not loaded.

    Args:
        weights: The model.
        hidden: Numbers per token between blocks.
        matrices: Matrices of a Hessian's size held in addition to those of the factorization.

    Returns:
        The sizes.
    """
    config = weights.config.get_text_config()
    widest = routed = 1
    solver = numbers = hessian = solve = block_numbers = linears = 0
    for block in weights.blocks.modules:
        block_numbers = max(block_numbers, sum(p.numel() for p in block.parameters()))
        shapes = [_shape(linear_weight(m)) for m in quantizable_linears(block).values()]
        linears += len(shapes)
        active = float(sum(o * i for o, i in shapes))
        for fused in find_fused_experts(block).values():
            routed = int(getattr(config, "num_experts_per_tok", None) or 1)
            share = routed / int(fused.num_experts)  # type: ignore[arg-type]
            for parameter in fused.parameters():
                if parameter.dim() == 3:
                    shapes.append(_shape(parameter[0]))
                    active += parameter.numel() * share
        numbers += int(active)
        inputs = {(o, i) for o, i in shapes}
        hessian += sum(i * i for _, i in inputs)
        solve += sum(o * i * i for o, i in shapes)
        widest = max([widest, *(i for _, i in shapes)])
        for o, i in shapes:
            rows = min(3 * o, rows_at_a_time(weights.device, i))
            squares = (HESSIAN_COPIES + matrices) * i * i
            solver = max(solver, 4 * (SOLVER_COPIES * rows * i + squares))
    return Sizes(
        hidden=hidden,
        block_bytes=block_numbers * weights.dtype.itemsize,
        block_numbers=block_numbers,
        widest_input=widest,
        solver_bytes=solver,
        routed=routed,
        numbers=numbers,
        linears=linears,
        hessian_macs=hessian,
        solve_macs=solve,
    )


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns
