"""The inner loops of the sweep and of polishing as one Triton kernel.

Both loops go through a block of columns one by one, adding to each column the errors of those
before it. As separate torch operations that takes about six launches per column. Here one program
processes a few output rows for the whole block, which stays in registers; rows are independent.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting this rounds to the nearest integer, halves to even, like torch.round, for
# numbers far smaller than it, as codes are.
MAGIC = tl.constexpr(1.5 * 2**23)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def column_kernel(
    values,
    plain,
    steps,
    errors,
    feedback,
    divisors,
    scales,
    lowest,
    highest,
    groups,
    num_columns,
    num_rows,
    POLISH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round or polish one block of columns for ROWS output rows, as ``columns.py`` defines it."""
    # All matrices are fp32, [columns, rows] and contiguous; scales, lowest and highest are [groups,
    # rows]; feedback is [columns, columns]: the effect of an error in column j on column k, at
    # [j, k]. Without POLISH: values are the targets, plain the targets before any feedback; steps
    # receives code - zero, errors receives plain - scale * step. With it: values are gradients,
    # divisors curvatures; steps holds code - zero and is updated; errors receives the moves.
    # In both, values receives each column with the feedback of the columns before it.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    column = tl.arange(0, COLUMNS)
    offsets = column[:, None] * num_rows + row[None, :]
    whole = (column[:, None] < num_columns) & inside[None, :]
    block = tl.load(values + offsets, mask=whole, other=0.0)
    for k in range(num_columns):
        here = tl.reduce(tl.where(column[:, None] == k, block, 0.0), 0, _add)
        group = tl.load(groups + k)
        scale = tl.load(scales + group * num_rows + row, mask=inside, other=1.0)
        low = tl.load(lowest + group * num_rows + row, mask=inside, other=0.0)
        high = tl.load(highest + group * num_rows + row, mask=inside, other=0.0)
        at = k * num_rows + row
        if POLISH:
            old = tl.load(steps + at, mask=inside, other=0.0)
            wanted = here / tl.load(divisors + k) / scale + old
            new = tl.minimum(tl.maximum((wanted + MAGIC) - MAGIC, low), high)
            error = (new - old) * scale
        else:
            new = tl.minimum(tl.maximum((here / scale + MAGIC) - MAGIC, low), high)
            error = tl.load(plain + at, mask=inside, other=0.0) - new * scale
        tl.store(values + at, here, mask=inside)
        tl.store(steps + at, new, mask=inside)
        tl.store(errors + at, error, mask=inside)
        onto = tl.load(
            feedback + k * num_columns + column,
            mask=(column > k) & (column < num_columns),
            other=0.0,
        )
        block += onto[:, None] * error[None, :]
