"""Measure decode speed of an 8B-shaped model at batch 1, in 4 bits and in bf16.

The model is a Llama of the 8B shape with random weights (nothing is downloaded) and Transformers'
static cache; a whole decode step is one CUDA graph (``halfbyte.integrations.graph_steps``). An arm
is a kernel or ``bf16``, followed by options: ``own`` (Transformers' forward instead of the step
with few launches), ``apart`` (q, k, v and gate, up not fused), ``compiled`` (own, with
torch.compile). Each arm reports the distance of the graph's logits from a forward without cache and
graph.

    python bench/measure_gpu_decode.py --arms cuda "cuda own" "cuda compiled" bf16 "bf16 compiled"
    python bench/measure_gpu_decode.py --count      launches of the own forward; needs no GPU
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.integrations.graph_steps import GraphSteps
from halfbyte.kernels import torch_reference
from halfbyte.kernels.contract import LinearSpec
from halfbyte.machine.facts import installed_versions, machine_facts
from halfbyte.nn import fusion
from halfbyte.nn.linear import QuantLinear

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
}
CONTEXT = 512
"""Tokens in the cache at the measured step."""


def make_model(
    layers: int, kernel: str | None, *, fused: bool, device: str = "cuda", **shape: int
) -> LlamaForCausalLM:
    """Make the model; ``kernel`` None keeps it in bf16."""
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE | shape)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    if kernel is not None:
        for block in model.model.layers:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    parent = block.get_submodule(name.rpartition(".")[0])
                    child = name.rpartition(".")[2]
                    setattr(parent, child, make_linear(module, kernel, device))
        if fused:
            fusion.fuse_linears(model)
    return model


def make_linear(dense: nn.Linear, kernel: str, device: str) -> QuantLinear:
    """Make a random 4-bit layer of a dense one's shape."""
    spec = LinearSpec(
        bits=4,
        group_size=128,
        in_features=dense.in_features,
        out_features=dense.out_features,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=torch.bfloat16,
        device_type=device,
    )
    layer = QuantLinear(spec, {"scales": torch.float16}, device=device)
    layer.qweight.random_(-(2**31), 2**31 - 1)
    layer.qzeros.fill_(0x77777777)
    layer.scales.uniform_(0.001, 0.002)
    layer.prepare(kernel=kernel)
    return layer


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU, which views do not."""

    VIEWS = (
        "view", "reshape", "t", "transpose", "slice", "expand", "unsqueeze", "squeeze", "split",
        "split_with_sizes", "detach", "alias", "select", "permute", "_unsafe_view", "empty",
        "lift_fresh",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        # A cast to the same dtype is a no-op.
        is_noop = name == "to" and result is args[0]
        if name not in self.VIEWS and not is_noop:
            self.counts[name] += 1
        return result


def count_launches() -> dict[str, Any]:
    """Count the launches of a decode step per block, with linears fused and apart."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
    found: dict[str, Any] = {}
    fusion.FUSED_KERNELS = ("torch_reference",)

    def apply(self: object, x: Tensor, operands: object, bias: object, spec: LinearSpec) -> Tensor:
        # One launch, like the CUDA kernel without act-order.
        return x.new_zeros(*x.shape[:-1], spec.out_features)

    torch_reference.TorchReference.apply = apply  # type: ignore[assignment]
    for fused in (True, False):
        totals = []
        for layers in (1, 2):
            model = make_model(layers, "torch_reference", fused=fused, device="cpu", **sizes)
            steps = GraphSteps(model, 8, own_forward=True)
            steps.prefill(torch.zeros(1, 4, dtype=torch.int64))
            with torch.inference_mode(), Launches() as launches:
                steps._run()
            totals.append(launches.counts)
        block = totals[1] - totals[0]
        name = "fused" if fused else "apart"
        found[name] = {
            "a block": block.total(),
            "of it linears": block["new_zeros"],
            "besides": totals[0].total() - block.total(),
            "a token of 32 blocks": totals[0].total() + 31 * block.total(),
            "by operation, a block": dict(block.most_common()),
        }
    return found


def measure(arm: str, layers: int, *, profiled: bool) -> dict[str, Any]:
    """Time the steps of an arm, and compare them with a forward without cache and graph."""
    start = time.monotonic()
    kernel, *how = arm.split()
    model = make_model(layers, None if kernel == "bf16" else kernel, fused="apart" not in how)
    prompt = torch.randint(0, 1000, (1, CONTEXT), device="cuda")
    made = time.monotonic()
    plain = model.forward
    with torch.inference_mode():
        expected = model(torch.cat([prompt, prompt[:, :1]], dim=1), logits_to_keep=1).logits[0, -1]
    if "compiled" in how:
        model.forward = _compile_steps(plain, torch.compile(plain, fullgraph=True))
    steps = GraphSteps(model, 2 * CONTEXT, own_forward=bool({"own", "compiled"} & {*how}))
    steps.prefill(prompt)
    captured = time.monotonic()
    found = steps(int(prompt[0, 0]), CONTEXT)
    distance = float((found - expected.float()).norm() / expected.float().norm())
    time_steps(steps, 5)
    times = [time_steps(steps, 20) for _ in range(9)]
    host = statistics.median(time_tokens(steps, prompt, 64) for _ in range(3))
    if profiled:
        print(profile_step(steps), flush=True)
    return {
        "own_forward_because": steps.fallback_reason,
        "ms_with_host": round(host, 4),
        "ms": round(statistics.median(times), 4),
        "spread": round((max(times) - min(times)) / statistics.median(times), 4),
        "tokens_per_second": round(1e3 / statistics.median(times), 1),
        "distance_of_logits": round(distance, 5),
        "finite": bool(torch.isfinite(found).all()),
        "seconds_to_make": round(made - start, 1),
        "seconds_to_capture": round(captured - made, 1),
        "gpu_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def _compile_steps(plain: Any, compiled: Any) -> Any:
    """Compile only decode steps: a prompt would be compiled for its length alone."""

    # wraps: callers inspect the signature, which differs between versions of Transformers.
    @functools.wraps(plain)
    def forward(ids: Tensor, **keywords: Any) -> Any:
        return (compiled if ids.shape[1] == 1 else plain)(ids, **keywords)

    return forward


def time_steps(steps: GraphSteps, count: int) -> float:
    """Return the milliseconds of a replay, without the CPU's part."""
    assert steps._graph is not None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        steps._graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / count


def time_tokens(steps: GraphSteps, prompt: Tensor, count: int) -> float:
    """Return the milliseconds per token as a user sees them, each token copied to the CPU."""
    token = int(steps.prefill(prompt).argmax())
    start = time.perf_counter()
    assert len(list(steps.decode_greedily(token, count))) == count
    return (time.perf_counter() - start) / count * 1e3


def profile_step(steps: GraphSteps) -> str:
    """Return a table of the launches' times in a replay; overlapping time counts twice."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        time_steps(steps, 2)
    return found.key_averages().table(
        sort_by="cuda_time_total", row_limit=14, max_name_column_width=60
    )


def main() -> None:
    """Measure the arms, or count launches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-decode.json"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--count", action="store_true", help="only count launches")
    parser.add_argument("--arms", nargs="*", default=["cuda", "cuda own", "triton", "bf16"])
    parser.add_argument("--profile", action="store_true", help="print the time of each launch")
    options = parser.parse_args()
    if options.count:
        print(json.dumps(count_launches(), indent=1))
        return
    if not torch.cuda.is_available():
        print("Nothing measured: this needs a GPU. --count counts a block's launches without one.")
        return
    measure_arms(
        options.arms,
        lambda arm: measure(arm, options.layers, profiled=options.profile),
        options.output,
        layers=options.layers,
        context=CONTEXT,
    )


def measure_arms(
    arms: list[str], measure_arm: Callable[[str], dict[str, Any]], output: Path, **facts: Any
) -> None:
    """Measure all arms on this GPU; write the results after each one."""
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "machine": machine_facts(),
        "versions": installed_versions(),
        **facts,
        "arms": {},
    }
    for arm in arms:
        try:
            found: Any = measure_arm(arm)
        except Exception as error:  # noqa: BLE001 - the other arms still run
            found = f"{type(error).__name__}: {str(error)[:1000]}"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results["arms"][arm] = found
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(arm, found, flush=True)


if __name__ == "__main__":
    main()
