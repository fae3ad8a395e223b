"""Compare halfbyte with llama.cpp on a CPU: prompt and generated tokens per second.

A 1B shape with random weights is generated for both; other models are given as NAME=FOLDER and
NAME=FILE.gguf. Arms run in turn, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig

from halfbyte.integrations.load import load_model
from halfbyte.integrations.speed import SpeedResult, measure_apart, measure_speed
from record import save_result

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY, GROUP = 2048, 8192, 16, 32, 8, 32000, 128
LINEARS = {
    "self_attn.q_proj": ("attn_q", HIDDEN, HIDDEN),
    "self_attn.k_proj": ("attn_k", HIDDEN, HIDDEN * KV_HEADS // HEADS),
    "self_attn.v_proj": ("attn_v", HIDDEN, HIDDEN * KV_HEADS // HEADS),
    "self_attn.o_proj": ("attn_output", HIDDEN, HIDDEN),
    "mlp.gate_proj": ("ffn_gate", HIDDEN, INTERMEDIATE),
    "mlp.up_proj": ("ffn_up", HIDDEN, INTERMEDIATE),
    "mlp.down_proj": ("ffn_down", INTERMEDIATE, HIDDEN),
}
"""Name in Transformers to name in llama.cpp, input and output features."""
SHAPE = "1B shape"
PROMPT, NEW = 512, 64


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=FOLDER", help="GPTQ models")
    parser.add_argument("--theirs", nargs="*", default=[], metavar="NAME=FILE", help="GGUF models")
    parser.add_argument("--llama-bench", type=Path, metavar="PROGRAM")
    parser.add_argument("--llama-build", default="", help="how llama.cpp was built, for the note")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        ours = {SHAPE: write_gptq(Path(made))} | split_pairs(arguments.ours)
        theirs = {}
        if arguments.llama_bench:
            theirs = {SHAPE: write_gguf(Path(made))} | split_pairs(arguments.theirs)
        rows, data = [], {}
        for name, folder in ours.items():
            arms: dict[str, list[dict[str, float]]] = {}
            for _ in range(arguments.rounds):
                for bits in (16, 8):
                    result = measure_apart(measure_folder, folder, bits)
                    found = {"prompt": result.prompt_rate, "rate": result.rate}
                    facts = {"megabytes": result.read_bytes / 1e6, "share": result.memory_share}
                    arms.setdefault(f"halfbyte, head of {bits} bits", []).append(found | facts)
                    data[f"{name}, head of {bits} bits"] = asdict(result)
                if name in theirs:
                    found = run_llama(arguments.llama_bench, theirs[name])
                    arms.setdefault("llama.cpp", []).append(found)
            for arm, measured in arms.items():
                rows.append([name, arm, *medians(measured)])
                print(*rows[-1], flush=True)
            data[name] = arms
    save_result(
        "cpu-models",
        columns=[
            "model",
            "program",
            "prompt tok/s",
            "generated tok/s",
            "MB read a token",
            "of memory's speed",
        ],
        rows=rows,
        note=f"4 bits, batch 1, {torch.get_num_threads()} threads; {PROMPT} prompt tokens, {NEW} "
        f"generated after them (llama.cpp: after none); medians of {arguments.rounds} rounds, arms "
        "in turn. The 1B shape has random weights; llama.cpp's is Q4_0 with a Q6_K head. "
        f"llama.cpp: {arguments.llama_build or 'as its build chooses'}.",
        data=data,
    )


def split_pairs(pairs: list[str]) -> dict[str, Path]:
    """Parse NAME=PATH arguments to paths by name."""
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


def medians(measured: list[dict[str, float]]) -> list[float | str]:
    """Return the median of each quantity; a dash if a program does not report it."""
    keys = ("prompt", "rate", "megabytes", "share")
    return [
        statistics.median(one[key] for one in measured) if key in measured[0] else "–"
        for key in keys
    ]


def measure_folder(folder: Path, head_bits: int) -> SpeedResult:
    """Measure a GPTQ model with halfbyte, in this process."""
    return measure_speed(
        lambda: load_model(folder, dtype="auto", device="cpu"),
        prompt_tokens=PROMPT,
        new_tokens=NEW,
        repeats=3,
        head_bits=head_bits,
    )


def run_llama(program: Path, file: Path) -> dict[str, float]:
    """Run llama-bench once; return its rates."""
    threads = str(torch.get_num_threads())
    options = ["-t", threads, "-p", str(PROMPT), "-n", str(NEW), "-r", "3", "-o", "json"]
    done = subprocess.run(
        [program, "-m", file, *options], capture_output=True, text=True, check=True
    )
    tests: list[dict[str, Any]] = json.loads(done.stdout)
    speed = {"rate" if test["n_gen"] else "prompt": test["avg_ts"] for test in tests}
    return {"prompt": speed["prompt"], "rate": speed["rate"]}


def write_gptq(folder: Path) -> Path:
    """Write the 1B shape as a GPTQ checkpoint of random codes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, (_, columns, rows) in LINEARS.items():
            tensors |= make_random_linear(f"{prefix}.{name}", columns, rows, generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        dense = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        tensors[name] = dense.mul(0.02).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    write_config(folder, config, "LlamaForCausalLM")
    return folder


def make_random_linear(
    name: str, columns: int, rows: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Make a linear of random 4-bit codes: its tensors in the GPTQ format, by name."""
    groups = columns // GROUP
    words = torch.randint(-(2**31), 2**31, (columns // 8, rows), generator=generator)
    return {
        f"{name}.qweight": words.to(torch.int32),
        f"{name}.qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.full((groups, rows), 0.2 / columns**0.5).half(),
    }


def write_config(folder: Path, config: PretrainedConfig, architecture: str) -> None:
    """Write config.json with the quantization config of such linears."""
    labels = {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    labels |= {"quant_method": "gptq", "checkpoint_format": "gptq"}
    values = config.to_dict() | {"architectures": [architecture], "dtype": "bfloat16"}
    values["quantization_config"] = labels
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def write_gguf(folder: Path) -> Path:
    """Write the 1B shape in GGUF: Q4_0 with a Q6_K head, as llama.cpp's quantizer does."""
    import gguf

    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [b"t%d" % i for i in range(VOCABULARY - 3)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    random = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType

    def add(name: str, rows: int, columns: int, kind: Any) -> None:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
        # Random bytes may encode a scale of NaN.
        place = slice(0, 2) if kind == kinds.Q4_0 else slice(-2, None)
        blocks[:, :, place] = np.array([0.001], dtype=np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=kind)

    add("token_embd", VOCABULARY, HIDDEN, kinds.Q4_0)
    add("output", VOCABULARY, HIDDEN, kinds.Q6_K)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    for layer in range(LAYERS):
        for name, columns, rows in LINEARS.values():
            add(f"blk.{layer}.{name}", rows, columns, kinds.Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            ones = np.ones(HIDDEN, dtype=np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    main()
