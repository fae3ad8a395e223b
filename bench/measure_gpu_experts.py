"""Measure decode speed of a mixture of experts of Qwen3-30B-A3B's shape at batch 1, in 4 bits.

128 experts of width 768 in each block, 8 per token; random weights. Arms:

    together    the experts of a block in three products, a decode step as one CUDA graph
    own         the same with Transformers' forward as the CUDA graph
    alone       one expert after the other, without a CUDA graph, as Transformers runs split experts

Each arm reports the distance of its logits from a forward of ``alone`` without a cache, and the
time of a prompt.

    python bench/measure_gpu_experts.py [--layers 48] [--arms together own alone]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from halfbyte.integrations.graph_steps import GraphSteps
from halfbyte.model.experts import UnfusedExperts, unfuse_experts
from halfbyte.nn.fusion import fuse_linears
from halfbyte.nn.grouped_experts import group_experts
from measure_gpu_decode import make_linear, measure_arms, time_steps, time_tokens

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
}
CONTEXT = 512
"""Tokens in the cache at the measured step."""


def make_model(layers: int, kernel: str, device: str, **shape: int) -> Qwen3MoeForCausalLM:
    """Make the model: linears of the blocks in 4 bits, everything else in bf16.

    It is made on the meta device, because 30 billion weights in 16 bits would not fit the GPU.
    """
    config = Qwen3MoeConfig(num_hidden_layers=layers, **SHAPE | shape)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    unfuse_experts(model)
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, make_linear(module, kernel, device))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            values = values.fill_(1) if values.dim() == 1 else values.normal_(0, 0.02)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    fuse_linears(model)
    return model


def set_together(model: nn.Module, *, together: bool) -> None:
    """Run the experts of each block together or one after the other."""
    if together and not group_experts(model):
        raise RuntimeError("The experts cannot run together.")
    for module in model.modules():
        if isinstance(module, UnfusedExperts) and not together:
            module.grouped = None


def time_forward(run: Callable[[], Any], repeats: int) -> float:
    """Return the median of the milliseconds of a call, including the CPU's part."""
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(model: Qwen3MoeForCausalLM, arm: str) -> dict[str, Any]:
    """Time the prompt and the steps of an arm, and compare its logits."""
    prompt = torch.randint(0, 1000, (1, CONTEXT), device="cuda")
    whole = torch.cat([prompt, prompt[:, :1]], dim=1)
    with torch.inference_mode():
        set_together(model, together=False)
        expected = model(whole, logits_to_keep=1).logits[0, -1].float()
        set_together(model, together=arm != "alone")
        prompt_ms = time_forward(lambda: model(prompt, logits_to_keep=1), 3)
        if arm == "alone":
            cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
            token = prompt[:, :1]
            step = lambda: model(token, past_key_values=cache, use_cache=True)  # noqa: E731
            found = step().logits[0, -1].float()
            ms, host, reason = None, time_forward(step, 20), "one after the other"
        else:
            steps = GraphSteps(model, 2 * CONTEXT, own_forward=arm == "own")
            steps.prefill(prompt)
            found = steps(int(prompt[0, 0]), CONTEXT)
            time_steps(steps, 5)
            ms = statistics.median(time_steps(steps, 20) for _ in range(9))
            host = statistics.median(time_tokens(steps, prompt, 64) for _ in range(3))
            reason = steps.fallback_reason
    return {
        "own_forward_because": reason,
        "ms": ms and round(ms, 4),
        "ms_with_host": round(host, 4),
        "tokens_per_second": round(1e3 / (ms or host), 1),
        "prompt_ms": round(prompt_ms, 2),
        "distance_of_logits": round(float((found - expected).norm() / expected.norm()), 5),
        "gpu_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def main() -> None:
    """Make the model and measure all arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-experts.json"))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--arms", nargs="*", default=["together", "own", "alone"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Nothing measured: this needs a GPU.")
        return
    model = make_model(options.layers, "cuda", "cuda")
    measure_arms(
        options.arms,
        lambda arm: measure(model, arm),
        options.output,
        layers=options.layers,
        context=CONTEXT,
    )


if __name__ == "__main__":
    main()
