"""Measure peak memory of quantizing models with more and more blocks, and of a 3B model.

    python bench/measure_flat_memory.py [--large] [--work DIR]

Random Llama-shaped checkpoints of 4, 8, 16 and 32 blocks of hidden size 2048 are quantized, each in
its own process, whose peak resident size is recorded. ``--large`` does the same for one with 3B
parameters (6 GB of fp16 on disk) and a memory limit of 4 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from record import save_result

BLOCKS = (4, 8, 16, 32)
SAMPLES, LENGTH = 8, 256
SMALL: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
LARGE: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_hidden_layers": 28,
}
LARGE_LIMIT = "4GB"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="the 3B model instead")
    parser.add_argument("--work", type=Path, help="folder for the models (default: temporary)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(**json.loads(args.child))))
        return
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        if args.large:
            measure_large(work)
        else:
            measure_blocks(work)
    finally:
        shutil.rmtree(work)


def measure_blocks(work: Path) -> None:
    """Quantize models that differ only in their number of blocks."""
    rows = []
    for blocks in BLOCKS:
        result = measure(work, {**SMALL, "num_hidden_layers": blocks}, None)
        rows.append([blocks, result["model_gb"], result["peak_gb"], result["seconds"]])
        print(rows[-1], flush=True)
    peaks = [row[2] for row in rows]
    save_result(
        "flat-memory",
        columns=["blocks", "model on disk, GB", "peak memory, GB", "seconds"],
        rows=rows,
        note=f"hidden 2048, intermediate 5632, {SAMPLES} x {LENGTH} tokens, bf16, group 128; "
        f"largest over smallest peak: {max(peaks) / min(peaks):.3f}",
        data={"largest_over_smallest": max(peaks) / min(peaks)},
    )


def measure_large(work: Path) -> None:
    """Quantize a 3B model within 4 GB."""
    result = measure(work, LARGE, LARGE_LIMIT, dtype="float16")
    print(result)
    save_result(
        "memory-3b",
        columns=["model on disk, GB", "limit", "peak memory, GB", "seconds"],
        rows=[[result["model_gb"], LARGE_LIMIT, result["peak_gb"], result["seconds"]]],
        note=f"hidden 3072, intermediate 8192, 28 blocks, fp16 on disk, {SAMPLES} x {LENGTH} "
        "tokens, group 128",
        data=result,
    )


def measure(
    work: Path, shape: dict[str, Any], memory: str | None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Make one model and quantize it in a child process."""
    folder = work / "model"
    size = write_model(folder, shape, getattr(torch, dtype))
    job = {"model": str(folder), "output": str(work / "out"), "memory": memory}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    shutil.rmtree(folder)
    shutil.rmtree(work / "out")
    return {"model_gb": round(size / 1e9, 2), **json.loads(done.stdout.splitlines()[-1])}


def run_child(model: str, output: str, memory: str | None) -> dict[str, float]:
    """Quantize; return this process's peak memory and the seconds."""
    import halfbyte
    from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig

    ids = torch.randint(0, 32000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    halfbyte.quantize(
        model,
        output,
        config=QuantConfig(group_size=128),
        calibration=CalibrationConfig(samples=SAMPLES, length=LENGTH),
        resources=ResourceConfig(memory=memory),
        text=ids.tolist(),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gb": round(peak / 1e9, 3), "seconds": round(time.monotonic() - start, 1)}


def write_model(folder: Path, shape: dict[str, Any], dtype: torch.dtype) -> int:
    """Write a checkpoint of random weights, one shard per block; return its size in bytes."""
    folder.mkdir()
    config = LlamaConfig(**shape, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    hidden, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    narrow = config.num_key_value_heads * (hidden // config.num_attention_heads)
    generator = torch.Generator().manual_seed(0)

    def make(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * size[-1] ** -0.5).to(dtype)

    weight_map: dict[str, str] = {}
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        tensors = {f"{name}.{linear}.weight": make(*size) for linear, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        if index == 0:
            tensors["model.embed_tokens.weight"] = make(vocabulary, hidden)
            tensors["lm_head.weight"] = make(vocabulary, hidden)
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
        shard = shard_name(index, config.num_hidden_layers)
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def shard_name(index: int, count: int) -> str:
    """Return the file name of a shard."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


if __name__ == "__main__":
    main()
