"""Compare the compiled decoder with Transformers' forward on a mixture of experts, on a CPU.

    python bench/measure_cpu_experts.py [--rounds 3] [--blocks 4]

The blocks have the shape of Qwen3-30B-A3B's (128 experts of width 768, 8 per token) and random
codes; a few suffice, because only the time per block matters. Both arms use the same packed weights
and kernels; they run in turn, each in its own process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from halfbyte.integrations import generation
from halfbyte.integrations.load import load_model
from halfbyte.integrations.speed import SpeedResult, measure_apart, measure_speed
from measure_cpu_models import NEW, PROMPT, VOCABULARY, make_random_linear, write_config
from record import save_result

SHAPE = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
ARMS = {"compiled decoder": True, "Transformers' forward": False}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4)
    arguments = parser.parse_args()
    measured: dict[str, list[SpeedResult]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as made:
        folder = write_model(Path(made), arguments.blocks)
        for _ in range(arguments.rounds):
            for arm, is_compiled in ARMS.items():
                measured[arm].append(measure_apart(measure_arm, folder, is_compiled))
    rows = [
        [
            arm,
            statistics.median(result.prompt_rate for result in results),
            statistics.median(result.rate for result in results),
            statistics.median(result.memory_share or 0 for result in results),
        ]
        for arm, results in measured.items()
    ]
    for row in rows:
        print(*row)
    save_result(
        "cpu-experts",
        columns=["decoder", "prompt tok/s", "generated tok/s", "of memory's speed"],
        rows=rows,
        note=f"{arguments.blocks} blocks of the shape of Qwen3-30B-A3B's, of its 48, with random "
        f"codes of 4 bits, a head of {VOCABULARY} rows in 16 bits; batch 1, "
        f"{torch.get_num_threads()} threads; {PROMPT} prompt tokens, {NEW} generated after them; "
        f"medians of {arguments.rounds} rounds, arms in turn.",
        data={arm: list(map(asdict, results)) for arm, results in measured.items()},
    )


def measure_arm(folder: Path, is_compiled: bool) -> SpeedResult:
    """Measure one arm in this process."""
    if not is_compiled:
        generation.find_obstacle = lambda _: "not asked for"  # type: ignore[assignment]
    result = measure_speed(
        lambda: load_model(folder, dtype="auto", device="cpu"),
        prompt_tokens=PROMPT,
        new_tokens=NEW,
        repeats=3,
    )
    if result.compiled_decoder != is_compiled:
        raise SystemExit(
            f"Cannot measure the arm: compiled_decoder is {result.compiled_decoder}, not "
            f"{is_compiled}: {result.why_not}"
        )
    return result


def write_model(folder: Path, blocks: int) -> Path:
    """Write the shape as a GPTQ checkpoint of random codes."""
    generator = torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, num_hidden_layers=blocks)
    hidden, width = config.hidden_size, config.moe_intermediate_size
    query, key = config.num_attention_heads * config.head_dim, 4 * config.head_dim
    linears = {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.o_proj": (query, hidden),
    }
    for expert in range(config.num_experts):
        for name, shape in (("gate", (hidden, width)), ("up", (hidden, width))):
            linears[f"mlp.experts.{expert}.{name}_proj"] = shape
        linears[f"mlp.experts.{expert}.down_proj"] = (width, hidden)
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.norm.weight": ones}
    for layer in range(blocks):
        prefix = f"model.layers.{layer}"
        for name, (columns, rows) in linears.items():
            tensors |= make_random_linear(f"{prefix}.{name}", columns, rows, generator)
        router = torch.randn(config.num_experts, hidden, generator=generator) * 0.1
        tensors[f"{prefix}.mlp.gate.weight"] = router.bfloat16()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ones.clone()
        for norm in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{norm}.weight"] = ones[: config.head_dim].clone()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        dense = torch.randn(VOCABULARY, hidden, generator=generator)
        tensors[name] = dense.mul(0.02).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, config, "Qwen3MoeForCausalLM")
    return folder


if __name__ == "__main__":
    main()
