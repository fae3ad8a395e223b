"""Compare the peak memory of a training step on a 4-bit and on a bf16 base.

    python bench/measure_training_memory.py [--tokens 256] [--all-linear]

The model has TinyLlama's shape (1.1 billion parameters) and random weights; adapters of rank 16 on
the query and value projections (or every linear), gradient checkpointing, the loss of ``halfbyte
finetune``, AdamW. Each base runs in its own process; the result is the peak resident size during
the second step, minus the size before the model was made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import peft.tuners.lora  # noqa: F401 - imported before memory is first read
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.finetune.config import AdapterConfig
from halfbyte.finetune.loss import ChunkedLoss
from halfbyte.finetune.train import attach_adapter
from halfbyte.kernels.contract import LinearSpec
from halfbyte.machine.memory import map_large_blocks, release_memory
from halfbyte.nn.linear import QuantLinear
from halfbyte.plan.memory import Load
from halfbyte.plan.shapes import parse_config
from halfbyte.plan.training import TrainingLoad, plan_training
from record import save_result

CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=2048,
)
GROUP_SIZE = 128


def main() -> None:
    """Measure both bases, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--all-linear", action="store_true")
    parser.add_argument("--base", choices=("4-bit", "bf16"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.base is not None:
        print(json.dumps(measure(args.base, args.tokens, all_linear=args.all_linear)))
        return
    found = {}
    for base in ("4-bit", "bf16"):
        command = [sys.executable, __file__, "--base", base, "--tokens", str(args.tokens)]
        command += ["--all-linear"] * args.all_linear
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[base] = json.loads(done.stdout.splitlines()[-1])
        print(base, found[base], flush=True)
    share = found["4-bit"]["peak_bytes"] / found["bf16"]["peak_bytes"]
    save_result(
        "training-memory",
        columns=["base", "peak of a step, GB", "weights, GB", "adapters and optimizer, GB",
                 "planned / measured"],
        rows=[
            [
                base,
                *(f[key] / 1e9 for key in ("peak_bytes", "weight_bytes", "adapter_bytes")),
                plan(base, args.tokens, all_linear=args.all_linear) / f["peak_bytes"],
            ]
            for base, f in found.items()
        ],
        note=(
            f"1.1 billion parameters (TinyLlama's shape), 1 x {args.tokens} tokens, rank 16 on "
            f"{'every linear' if args.all_linear else 'q_proj and v_proj'}, recomputed "
            f"activations; 4 bits take {share:.0%} of bf16."
        ),
        data=found,
    )  # fmt: skip


def plan(base: str, tokens: int, *, all_linear: bool) -> int:
    """Return the memory that `halfbyte plan --finetune` plans, without the program. Unit: bytes."""
    load = TrainingLoad(
        base=Load(
            bits=4 if base == "4-bit" else 16,
            group_size=GROUP_SIZE,
            context=tokens,
            program_bytes=0,
        ),
        targets=() if all_linear else ("q_proj", "v_proj"),
    )
    return plan_training(parse_config(CONFIG.to_dict(), "TinyLlama"), load).total


def measure(base: str, tokens: int, *, all_linear: bool) -> dict[str, float]:
    """Build the model, run two steps, return the peak of the second one. Unit: bytes."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    map_large_blocks()
    before = _memory("VmRSS")
    model = _build(quantized=base == "4-bit")
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = () if all_linear else ("q_proj", "v_proj")
    adapted = attach_adapter(model, AdapterConfig(dropout=0.0, targets=targets)).train()
    loss = ChunkedLoss(adapted)
    assert loss.obstacle is None
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(0, CONFIG.vocab_size, (1, tokens))
    for step in range(2):
        if step:
            # Resets VmHWM, to exclude the peaks of loading and repacking.
            release_memory()
            Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        loss({"input_ids": ids, "labels": ids}).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
    return {
        "peak_bytes": _memory("VmHWM") - before,
        "weight_bytes": weights,
        "adapter_bytes": 4 * sum(4 * p.numel() for p in trained),
        "seconds": seconds,
    }


def _build(*, quantized: bool) -> LlamaForCausalLM:
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG).bfloat16()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and quantized:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, _quantized(module))
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                # Filled, so that the pages become resident.
                made = torch.empty(parameter.shape, dtype=torch.bfloat16).fill_(0.01)
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(CONFIG)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()
    return model


def _quantized(linear: nn.Linear) -> QuantLinear:
    spec = LinearSpec(
        bits=4,
        group_size=GROUP_SIZE,
        in_features=linear.in_features,
        out_features=linear.out_features,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=torch.bfloat16,
        device_type="cpu",
    )
    with torch.device("cpu"):
        layer = QuantLinear(spec, {"scales": torch.float16})
        layer.qweight.random_(-(2**31), 2**31 - 1)
        layer.qzeros.fill_(0x77777777)
        layer.scales.fill_(0.002)
    return layer


def _memory(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key))


if __name__ == "__main__":
    main()
