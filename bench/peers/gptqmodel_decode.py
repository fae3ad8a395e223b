"""Save weights as GPTQModel dequantizes them. Run in its environment: python FILE JOB.json.

Fields of the job: runs, each with a checkpoint folder and an output file. The output has, by module
name, the float32 weight [out, in] that GPTQModel multiplies with; if GPTQModel refuses the
checkpoint, its error message is written to the output file's name plus .refused.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Decode every checkpoint."""
    # GPTQModel refuses to load a model with fewer, whatever the number of cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # Compiling takes minutes and does not change results.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from safetensors.torch import save_file

    for run in job["runs"]:
        try:
            weights = decode(run["checkpoint"])
        except ValueError as error:
            Path(run["output"] + ".refused").write_text(str(error), encoding="utf-8")
        else:
            save_file(weights, run["output"])


def decode(checkpoint: str) -> dict[str, Any]:
    """Load a checkpoint and dequantize its linears."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    # Scales are fp16 on disk: loading in fp16 preserves them, and converting to float32 is exact.
    loaded = GPTQModel.load(checkpoint, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    return {
        name: module.dequantize_weight().t().contiguous()
        for name, module in loaded.model.float().eval().named_modules()
        if isinstance(module, BaseQuantLinear)
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
