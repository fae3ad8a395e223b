"""The inner loops of the sweep and of polishing, as one Triton program each.

Both walk through a block of columns one by one, and each column takes the errors of those before.
As separate operations that is some six launches a column. Here a program takes a few output rows
through the whole block: the block stays in registers, and rows do not depend on each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and taking this off leaves the nearest whole number, halves to even, as torch rounds; codes
# are far smaller.
MAGIC = tl.constexpr(1.5 * 2**23)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def column_program(
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
    """Settle one block of columns for ROWS output rows; see ``columns.py`` for what it computes."""
    # All matrices are fp32, [columns, rows] and contiguous; scales, lowest and highest are [groups,
    # rows]; feedback is [columns, columns]: what an error of column j adds to column k, at [j, k].
    # Without POLISH: values are what each column is to come near to, plain the same before any
    # feedback; steps gets codes less zeros, errors the difference of plain to what they stand for.
    # With it: values are gradients, divisors curvatures, steps holds the codes and gets the moved
    # ones, errors gets how far the weights moved. values are left as each column found them.
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
