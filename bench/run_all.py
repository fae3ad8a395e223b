"""Run the measurements that need nothing but this machine, each in a process of its own.

    python bench/run_all.py [--only measure_router measure_plan] [--work .bench]

They take the sample model, and that quantized by the fastest preset. Those that need a GPU, other
tools or hours of computing are not among them: each says in its own docstring how to run it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.sample_model import write_sample_model

BASE, QUANTIZED, WORK = "{base}", "{quantized}", "{work}"
RUNS: dict[str, tuple[str, ...]] = {
    "measure_activations": (QUANTIZED,),
    "measure_article_memory": (),
    "measure_canary": (),
    "measure_compare_speed": (BASE, QUANTIZED),
    "measure_continuous_batching": (QUANTIZED,),
    "measure_conversion": (WORK,),
    "measure_cpu_experts": (),
    "measure_cpu_layers": (),
    "measure_cpu_tokens": (QUANTIZED,),
    "measure_engine": (QUANTIZED,),
    "measure_faults": (BASE, QUANTIZED, "--work", WORK),
    "measure_flat_memory": (),
    "measure_gateway": (QUANTIZED,),
    "measure_int4_rows": (),
    "measure_loading": (QUANTIZED,),
    "measure_plan": (BASE, QUANTIZED, "--shape-1b"),
    "measure_repair": (QUANTIZED, BASE),
    "measure_router": (),
    "measure_serve_load": (QUANTIZED,),
    "measure_training_hardware": (),
    "measure_training_memory": (),
    "measure_verdict": (),
}
"""Script -> its arguments."""


def main() -> int:
    """Run the scripts; the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    options = parser.parse_args()
    models = make_models(options.work)
    failed = [name for name in options.only if run(name, options.work, models)]
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def make_models(work: Path) -> dict[str, Path]:
    """Give the sample model and its quantized form, made where they are missing."""
    base, quantized = work / "SmolLM2-135M", work / "q4"
    if not (base / "config.json").is_file():
        write_sample_model(base)
    quantize(base, quantized, config=QuantConfig.from_preset("fast"), resume=quantized.exists())
    return {"base": base, "quantized": quantized}


def run(name: str, work: Path, models: dict[str, Path]) -> int:
    """Run one script in a folder of its own; give its exit code."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [argument.format(work=folder, **models) for argument in RUNS[name]]
    print("==", name, *arguments, flush=True)
    script = str(Path(__file__).parent / f"{name}.py")
    return subprocess.run([sys.executable, script, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
