"""Find the number of rows of x from which dequantizing first beats torch's int4 product.

This determines ROWS_LIMIT of halfbyte.kernels.torch_int4. The arms of a case run in turn, so that
other load affects all of them equally; the fastest repeat counts, because it was disturbed least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.torch_int4 import ROWS_LIMIT, TorchInt4
from halfbyte.kernels.torch_reference import TorchReference
from halfbyte.packing import pack_weight, pack_zeros
from record import save_result

SHAPES = ((576, 1536), (2048, 2048), (2048, 8192), (4096, 4096))
ROWS = (1, 4, 8, 16, 32, 48, 64, 96, 128, 256)
GROUP_SIZE = 64
REPEATS = 7


def main() -> None:
    """Measure every shape and row count, print and save the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows, crossings = [], {}
    for in_features, out_features in SHAPES:
        faster_from = None
        for num_rows in ROWS:
            best = measure_case(in_features, out_features, num_rows)
            dequantizes_faster = best["dequantize first"] <= best["int4 product"]
            faster_from = (faster_from or num_rows) if dequantizes_faster else None
            rows.append([f"{in_features} -> {out_features}", num_rows, *best.values()])
            print(rows[-1], flush=True)
        crossings[f"{in_features} -> {out_features}"] = faster_from
    save_result(
        "int4-rows",
        columns=["layer", "rows", *(f"{arm}, µs" for arm in best)],
        rows=rows,
        note=f"bfloat16, group size {GROUP_SIZE}, symmetric; fastest of {REPEATS} repeats in turn. "
        f"Dequantizing first wins from these rows on: {crossings}; ROWS_LIMIT is {ROWS_LIMIT}.",
        data={"crossings": crossings, "threads": torch.get_num_threads()},
    )


def measure_case(in_features: int, out_features: int, num_rows: int) -> dict[str, float]:
    """Time the arms on one layer; return the microseconds of the fastest repeat."""
    spec = LinearSpec(
        bits=4,
        group_size=GROUP_SIZE,
        in_features=in_features,
        out_features=out_features,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=torch.bfloat16,
        device_type="cpu",
    )
    codes = torch.randint(0, 16, (out_features, in_features))
    zeros = torch.full((out_features, spec.num_groups), 8)
    stored = Operands(
        weight=(pack_weight(codes, 4),),
        qzeros=pack_zeros(zeros, 4, 1),
        scales=(torch.rand(spec.num_groups, out_features) * 0.01 + 0.01).half(),
        g_idx=None,
    )
    int4, reference = TorchInt4(), TorchReference()
    packed = replace(stored, weight=int4.prepare(stored, spec))
    dense = reference.dequantize(stored, spec, torch.bfloat16).contiguous()
    x = torch.randn(num_rows, in_features).bfloat16()
    arms: dict[str, Callable[[], Tensor]] = {
        "int4 product": partial(
            torch.ops.aten._weight_int4pack_mm_for_cpu,
            x,
            packed.weight[0],
            GROUP_SIZE,
            packed.weight[1],
        ),
        "dequantize first": partial(int4._apply_dense, x, packed, spec),
        "torch_reference": partial(reference.apply, x, stored, None, spec),
        "dense bfloat16": partial(functional.linear, x, dense),
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(REPEATS):
        for arm, run in arms.items():
            times[arm].append(measure_once(run))
    return {arm: round(min(found) * 1e6, 1) for arm, found in times.items()}


def measure_once(run: Callable[[], Tensor], seconds: float = 0.02) -> float:
    """Return the median seconds per call, over as many calls as fit in ``seconds``."""
    run()
    calls: list[float] = []
    end = time.perf_counter() + seconds
    while not calls or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        calls.append(time.perf_counter() - start)
    return statistics.median(calls)


if __name__ == "__main__":
    main()
