"""How many tokens a second does an 8B-shaped model write at batch 1, in 4 bits and in bf16?

A Llama of the 8B shape with random weights (nothing is downloaded), Transformers' own forward and
static cache, one whole step as a CUDA graph. With ``--compile`` the forward goes through
torch.compile first, as Transformers does it for a static cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from halfbyte.kernels.contract import LinearSpec
from halfbyte.nn.linear import QuantLinear
from halfbyte.quantize.provenance import installed_versions, machine_facts

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
}
CONTEXT = 512
"""Tokens in the cache; where the step is taken."""


def make_model(layers: int, kernel: str | None) -> LlamaForCausalLM:
    """Make the model on the GPU; ``kernel`` None: bf16."""
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    if kernel is not None:
        for block in model.model.layers:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    parent = block.get_submodule(name.rpartition(".")[0])
                    setattr(parent, name.rpartition(".")[2], make_linear(module, kernel))
    return model


def make_linear(dense: nn.Linear, kernel: str) -> QuantLinear:
    """A random 4-bit layer in the place of a dense one."""
    spec = LinearSpec(
        bits=4,
        group_size=128,
        in_features=dense.in_features,
        out_features=dense.out_features,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=torch.bfloat16,
        device_type="cuda",
    )
    layer = QuantLinear(spec, {"scales": torch.float16}, device="cuda")
    layer.qweight.random_(-(2**31), 2**31 - 1)
    layer.qzeros.fill_(0x77777777)
    layer.scales.uniform_(0.001, 0.002)
    layer.prepare(kernel=kernel)
    return layer


class Step:
    """One decode step over a static cache, as a CUDA graph."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=2 * CONTEXT)
        prompt = torch.randint(0, 1000, (1, CONTEXT), device="cuda")
        positions = torch.arange(CONTEXT, device="cuda")
        with torch.inference_mode():
            model(prompt, past_key_values=self.cache, cache_position=positions, use_cache=True)
        self.token = torch.randint(0, 1000, (1, 1), device="cuda")
        self.position = torch.tensor([CONTEXT], device="cuda")
        forward = torch.compile(model.forward, fullgraph=True) if compiled else model.forward

        def run() -> Tensor:
            found = forward(
                self.token,
                past_key_values=self.cache,
                cache_position=self.position,
                position_ids=self.position[None],
                use_cache=True,
            )
            logits: Tensor = found.logits
            return logits

        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.logits = run()
        torch.cuda.synchronize()

    def time(self, steps: int) -> float:
        """Milliseconds of a step."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / steps


def main() -> None:
    """Measure, and write after every arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-decode.json"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--arms", nargs="*", default=["cuda", "triton", "bf16"])
    options = parser.parse_args()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "machine": machine_facts(),
        "versions": installed_versions(),
        "layers": options.layers,
        "context": CONTEXT,
        "compiled": options.compile,
        "arms": {},
    }
    for arm in options.arms:
        start = time.monotonic()
        try:
            model = make_model(options.layers, None if arm == "bf16" else arm)
            made = time.monotonic()
            step = Step(model, options.compile)
            captured = time.monotonic()
            step.time(5)
            times = [step.time(20) for _ in range(9)]
            found: Any = {
                "ms": round(statistics.median(times), 4),
                "spread": round((max(times) - min(times)) / statistics.median(times), 4),
                "tokens_per_second": round(1e3 / statistics.median(times), 1),
                "finite": bool(torch.isfinite(step.logits).all()),
                "seconds_to_make": round(made - start, 1),
                "seconds_to_capture": round(captured - made, 1),
                "gpu_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            }
            del step, model
        except Exception as error:  # noqa: BLE001 - the other arms are worth having
            found = f"{type(error).__name__}: {str(error)[:1000]}"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results["arms"][arm] = found
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(arm, found, flush=True)


if __name__ == "__main__":
    main()
