"""Compare the time of a quantization run with the floor of its arithmetic.

    python bench/measure_floor.py MODEL [--text FILE] [--samples 128] [--length 512]

The floor is the time of the floating-point operations that a run requires (one forward pass through
the linears; per input, the lower half of one Hessian, one factorization and one sweep) at the rate
of matrix products measured just before: in the model's compute dtype for forward and Hessians, in
float32 for the solver.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import halfbyte
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize.resources import resolve_dtype
from record import save_result

SIZE = 2048
REPEATS = 7


def main() -> None:
    """Measure the rates, quantize, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="calibration text (default: the built-in one)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    dtype, _ = resolve_dtype("auto", torch.bfloat16, torch.device("cpu"))
    rates = {"forward": measure_rate(dtype), "solve": measure_rate(torch.float32)}
    rates["Hessians"] = rates["forward"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF)
        report = halfbyte.quantize(
            args.model,
            Path(folder) / "out",
            config=QuantConfig(group_size=128, ragged_groups=True),
            calibration=CalibrationConfig(samples=args.samples, length=args.length),
            text=args.text,
            quality=False,
        )
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
    floor = {kind: flops / rates[kind] for kind, flops in report.flops.items()}
    share = sum(floor.values()) / seconds
    rows = [
        [kind, report.flops[kind] / 1e12, rates[kind] / 1e9, floor[kind]] for kind in sorted(floor)
    ]
    rows.append(["in all", sum(report.flops.values()) / 1e12, "", sum(floor.values())])
    for row in rows:
        print(row)
    user = after.ru_utime - before.ru_utime
    print(f"{seconds:.1f} s wall, {user:.1f} s user CPU; the floor is {share:.0%} of the wall time")
    print({phase: round(value, 1) for phase, value in report.seconds_by_phase.items()})
    save_result(
        "floor",
        columns=["work", "TFLOP", "measured rate, GFLOP/s", "floor, s"],
        rows=rows,
        note=f"{report.calibration.tokens} tokens; the run took {seconds:.1f} s, of which the "
        f"floor is {share:.0%}",
        data={
            "seconds": seconds,
            "user_seconds": user,
            "share": share,
            "seconds_by_phase": report.seconds_by_phase,
            "flops": report.flops,
            "rates": rates,
        },
    )


def measure_rate(dtype: torch.dtype) -> float:
    """Return the median rate of square matrix products. Unit: FLOP/s."""
    left, right = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return 2 * SIZE**3 / sorted(times)[REPEATS // 2]


if __name__ == "__main__":
    main()
