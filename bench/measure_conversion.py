"""How fast does a model convert beside a plain copy of the same bytes, and in how much memory?

Makes up a GPTQ checkpoint (4 bits, group 128, random codes) and converts it to every format. The
copy reads the source and writes as many bytes as the conversion did, with fsync. The source comes
from the disk both times: it is put out of the page cache before. Copy and conversion run in turn;
the fastest of the repeats is compared, as it is the least disturbed one. Each conversion is a
process of its own, so that its peak memory is its own.

    python bench/measure_conversion.py [FOLDER for the made-up model and the outputs]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from halfbyte.checkpoint.write import (
    build_quantization_config,
    pack_linear,
    shard_name,
    write_configs,
    write_index,
    write_shard,
)
from halfbyte.convert.run import FORMATS
from halfbyte.data import calibration_text
from halfbyte.quant_config import QuantConfig, Scheme
from record import save_result

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 2048, 8192, 12, 8192
GROUP_SIZE = 128
REPEATS = 3
CHUNK = 1 << 22
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}

PROGRAM = """
import json, sys, time, resource
import torch
from halfbyte.convert.run import ConversionConfig, convert
torch.set_num_threads(1)
started = time.process_time()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = convert(sys.argv[1], sys.argv[2], config=ConversionConfig(to=sys.argv[3]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": report.seconds, "bytes": report.num_bytes,
                  "cpu_seconds": time.process_time() - started,
                  "memory_kib": after - before, "exact": report.is_exact}))
"""


def main() -> None:
    """Measure every target, print and save the table."""
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    source = place / "source"
    if not source.exists():
        make_model(source)
    files = sorted(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    rows, data = [], {}
    for to in FORMATS:
        copies, runs = [], []
        for _ in range(REPEATS):
            forget(files)
            runs.append(convert_once(source, place / "out", to))
            forget(files)
            copies.append(copy_once(files, place / "copy", runs[-1]["bytes"]))
        best = min(runs, key=lambda run: run["seconds"])
        copy = min(copies)
        moved = size + best["bytes"]
        rows.append(
            [
                to,
                size / 1e6,
                best["bytes"] / 1e6,
                best["seconds"],
                copy,
                moved / best["seconds"] / 1e6,
                copy / best["seconds"],
                min(run["cpu_seconds"] for run in runs),
                max(run["memory_kib"] for run in runs) * 1024 / 1e6,
                "yes" if best["exact"] else "no",
            ]
        )
        data[to] = {"runs": runs, "copy_seconds": copies}
        print(rows[-1], flush=True)
    largest = max(INTERMEDIATE * HIDDEN, VOCABULARY * HIDDEN)
    save_result(
        "conversion",
        columns=["to", "read, MB", "written, MB", "s", "copy, s", "MB/s read and written",
                 "copy / conversion", "CPU s", "memory added, MB", "exact"],
        rows=rows,
        note=f"{LAYERS} blocks of hidden {HIDDEN}, intermediate {INTERMEDIATE}, 4 bits, group "
        f"{GROUP_SIZE}; the largest matrix has {largest / 1e6:.1f} million weights; source from "
        f"the disk, output brought to it; fastest of {REPEATS}, copy and conversion in turn. Two "
        "threads compute, one writes, one syncs; time includes planning, tokenizer and, for gptq, "
        "digests",
        data=data,
    )  # fmt: skip


def make_model(folder: Path) -> None:
    """Write a checkpoint of random codes, a shard a block, with a small tokenizer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    digests = []
    for layer in range(LAYERS):
        tensors = {}
        for name, (out, inputs) in SHAPES.items():
            groups = inputs // GROUP_SIZE
            packed = pack_linear(
                torch.randint(0, 16, (out, inputs), generator=generator, dtype=torch.uint8),
                torch.full((out, groups), 8),
                torch.rand(out, groups, generator=generator) * 0.01 + 0.001,
                bits=4,
                g_idx=torch.arange(inputs) // GROUP_SIZE,
            )
            prefix = f"model.layers.{layer}.{name}"
            tensors |= {f"{prefix}.{suffix}": tensor for suffix, tensor in packed.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(
                HIDDEN, dtype=torch.bfloat16
            )
        digests.append(write_shard(folder / shard_name(layer + 1, LAYERS + 1), tensors))
    outside = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).to(torch.bfloat16),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    digests.append(write_shard(folder / shard_name(LAYERS + 1, LAYERS + 1), outside))
    weight_map = {name: digest.file_name for digest in digests for name in digest.tensors}
    write_index(folder, weight_map, sum(digest.tensor_bytes for digest in digests))
    schemes = {
        f"model.layers.{layer}.{name}": Scheme(bits=4, group_size=GROUP_SIZE, symmetric=True)
        for layer in range(LAYERS)
        for name in SHAPES
    }
    config = build_quantization_config(
        QuantConfig(group_size=GROUP_SIZE),
        quantized=schemes,
        skipped={},
        module_groups=[[name] for name in SHAPES],
        version="0",
    )
    write_configs(folder, MODEL_CONFIG, config)
    make_tokenizer(folder)


MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def make_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on the built-in text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([calibration_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def forget(files: list[Path]) -> None:
    """Put files out of the page cache."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert_once(source: Path, output: Path, to: str) -> dict[str, float]:
    """Convert in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(output), to],
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1])


def copy_once(files: list[Path], output: Path, num_bytes: int) -> float:
    """Read the source and write as many bytes as the conversion did; seconds."""
    started = time.perf_counter()
    written = 0
    buffer = bytearray(CHUNK)
    with output.open("wb") as target:
        for file in files:
            with file.open("rb", buffering=0) as handle:
                while count := handle.readinto(buffer):
                    keep = min(count, num_bytes - written)
                    target.write(memoryview(buffer)[:keep])
                    written += keep
        while written < num_bytes:
            written += target.write(memoryview(buffer)[: min(CHUNK, num_bytes - written)])
        target.flush()
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    output.unlink()
    return seconds


if __name__ == "__main__":
    main()
