"""Run the measurements that need no GPU and no other tools, each in its own process.

    python bench/run_all.py [--only measure_router measure_plan] [--work .bench]

They use the sample model and its quantized version (preset ``fast``). Scripts that need a GPU,
other tools or hours of computing are not included; their docstrings say how to run them.
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
    "measure_busy_machine": (QUANTIZED,),
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
"""Script name to arguments."""


def main() -> int:
    """Run the scripts; return the number of failures as exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=list(RUNS), choices=list(RUNS), help="scripts (default: all)"
    )
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="folder for models")
    options = parser.parse_args()
    models = make_models(options.work)
    failed = [name for name in options.only if run(name, options.work, models)]
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def make_models(work: Path) -> dict[str, Path]:
    """Return the folders of the sample model and its quantized version, created if missing."""
    base, quantized = work / "SmolLM2-135M", work / "q4"
    if not (base / "config.json").is_file():
        write_sample_model(base)
    quantize(base, quantized, config=QuantConfig.from_preset("fast"), resume=quantized.exists())
    return {"base": base, "quantized": quantized}


def run(name: str, work: Path, models: dict[str, Path]) -> int:
    """Run one script with its own work folder; return its exit code."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [argument.format(work=folder, **models) for argument in RUNS[name]]
    print("==", name, *arguments, flush=True)
    script = str(Path(__file__).parent / f"{name}.py")
    return subprocess.run([sys.executable, script, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
