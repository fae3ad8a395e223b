"""Measure speed and memory of conversions, compared with a plain copy of the same bytes.

    python bench/measure_conversion.py [FOLDER]

FOLDER holds the models and the outputs. Synthetic GPTQ checkpoints (4 bits, group 128, random
codes) are converted to every format: one of 0.4 GB, which may fit the page cache, and one of 3 GB
with the shapes of an 8B model. The copy reads the source and writes as many bytes as the
conversion, with fsync: once through the page cache, as programs copy, and once with O_DIRECT, at
the speed of the disk. The source is evicted from the page cache before each run. Copies and
conversion run in turn; the fastest repeat counts, because it was disturbed least. Each conversion
runs in its own process to measure its peak memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

GROUP_SIZE = 128
CHUNK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a synthetic model."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    vocabulary: int
    repeats: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input features by name within a block."""
        hidden, intermediate = self.hidden, self.intermediate
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 4, hidden),
            "self_attn.v_proj": (hidden // 4, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }


SHAPES = (
    Shape(name="0.4 GB", hidden=2048, intermediate=8192, blocks=12, vocabulary=8192, repeats=3),
    Shape(name="3 GB", hidden=4096, intermediate=14336, blocks=24, vocabulary=32768, repeats=2),
)

PROGRAM = """
import json, sys, time
import torch
from halfbyte.machine.memory import peak_memory_bytes
from halfbyte.convert.run import ConversionConfig, convert
torch.set_num_threads(1)
started = time.process_time()
before = peak_memory_bytes()
report = convert(sys.argv[1], sys.argv[2], config=ConversionConfig(to=sys.argv[3]))
seconds = time.process_time() - started
after = peak_memory_bytes()
print(json.dumps({"seconds": report.seconds, "bytes": report.num_bytes, "cpu_seconds": seconds,
                  "memory_bytes": after - before, "exact": report.is_exact}))
"""


def main() -> None:
    """Measure every target, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="for models and outputs")
    args = parser.parse_args()
    work = args.folder or Path(tempfile.mkdtemp())
    rows, data = [], {}
    for shape in SHAPES:
        source = work / shape.name.replace(" ", "")
        if not source.exists():
            make_model(source, shape)
        for to in FORMATS:
            row, data[f"{shape.name} {to}"] = measure(work, source, shape, to)
            rows.append(row)
            print(row, flush=True)
    save_result(
        "conversion",
        columns=["model", "to", "read, MB", "written, MB", "s", "copy, s", "copy past the cache, s",
                 "of a copy's speed", "of the disk's", "CPU s", "memory added, MB",
                 "largest tensor, MB", "exact"],
        rows=rows,
        note=f"4 bits, group {GROUP_SIZE}, "
        + "; ".join(f"{shape.name}: {shape.blocks} blocks of hidden {shape.hidden}, intermediate "
                    f"{shape.intermediate}, vocabulary {shape.vocabulary}" for shape in SHAPES)
        + "; source from the disk, output brought to it; fastest of "
        + " and ".join(str(shape.repeats) for shape in SHAPES)
        + ", copies and conversion in turn. Time includes planning, tokenizer and, for gptq, "
        "digests; the largest tensor is the larger of those read and written",
        data=data,
    )  # fmt: skip


def measure(
    work: Path, source: Path, shape: Shape, to: str
) -> tuple[list[str | float], dict[str, Any]]:
    """Convert and copy in turn; return the row of the table and the raw times."""
    files = sorted(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    copies: list[float] = []
    direct: list[float] = []
    runs = []
    for _ in range(shape.repeats):
        evict(files)
        runs.append(convert_once(source, work / "out", to))
        evict(files)
        copies.append(copy_once(files, work / "copy", runs[-1]["bytes"]))
        evict(files)
        direct.append(copy_once(files, work / "copy", runs[-1]["bytes"], os.O_DIRECT))
    best = min(runs, key=lambda run: run["seconds"])
    matrix = shape.intermediate * shape.hidden
    largest = max(2 * matrix if to == "hf" else matrix // 2, 2 * shape.vocabulary * shape.hidden)
    row = [
        shape.name,
        to,
        size / 1e6,
        best["bytes"] / 1e6,
        best["seconds"],
        min(copies),
        min(direct),
        min(copies) / best["seconds"],
        min(*copies, *direct) / best["seconds"],
        min(run["cpu_seconds"] for run in runs),
        max(run["memory_bytes"] for run in runs) / 1e6,
        largest / 1e6,
        "yes" if best["exact"] else "no",
    ]
    return row, {"runs": runs, "copy_seconds": copies, "direct_copy_seconds": direct}


def make_model(folder: Path, shape: Shape) -> None:
    """Write a checkpoint of random codes, one shard per block, with a small tokenizer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    packed = {}
    for name, (out, inputs) in shape.linears.items():
        groups = inputs // GROUP_SIZE
        packed[name] = pack_linear(
            torch.randint(0, 16, (out, inputs), generator=generator, dtype=torch.uint8),
            torch.full((out, groups), 8),
            torch.rand(out, groups, generator=generator) * 0.01 + 0.001,
            bits=4,
            g_idx=torch.arange(inputs) // GROUP_SIZE,
        )
    norm = torch.ones(shape.hidden, dtype=torch.bfloat16)
    digests = []
    for layer in range(shape.blocks):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{name}.{suffix}": tensor
            for name, parts in packed.items()
            for suffix, tensor in parts.items()
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = norm
        digests.append(write_shard(folder / shard_name(layer + 1, shape.blocks + 1), tensors))
    outside = {
        "model.embed_tokens.weight": torch.randn(shape.vocabulary, shape.hidden).bfloat16(),
        "model.norm.weight": norm,
    }
    last = shard_name(shape.blocks + 1, shape.blocks + 1)
    digests.append(write_shard(folder / last, outside))
    weight_map = {name: digest.file_name for digest in digests for name in digest.tensors}
    write_index(folder, weight_map, sum(digest.tensor_bytes for digest in digests))
    config = build_quantization_config(
        QuantConfig(group_size=GROUP_SIZE),
        quantized={
            f"model.layers.{layer}.{name}": Scheme(bits=4, group_size=GROUP_SIZE, symmetric=True)
            for layer in range(shape.blocks)
            for name in shape.linears
        },
        skipped={},
        module_groups=[[name] for name in shape.linears],
        version="0",
    )
    write_configs(folder, shape.config, config)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on the built-in text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([calibration_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def evict(files: list[Path]) -> None:
    """Evict files from the page cache."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert_once(source: Path, output: Path, to: str) -> dict[str, float]:
    """Convert in a separate process; return its measurements."""
    shutil.rmtree(output, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(output), to],
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1])


def copy_once(files: list[Path], output: Path, num_bytes: int, flags: int = 0) -> float:
    """Read the source and write as many bytes as the conversion did; return the seconds.

    With O_DIRECT in ``flags``, sizes are rounded up to whole blocks.
    """
    buffer = memoryview(mmap.mmap(-1, CHUNK))  # page-aligned, as O_DIRECT requires
    block = mmap.PAGESIZE if flags else 1
    num_bytes = -(-num_bytes // block) * block
    started = time.perf_counter()
    written = 0
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o644)
    for file in files:
        source = os.open(file, os.O_RDONLY | flags)
        while count := os.readv(source, [buffer]):
            whole = -(-count // block) * block
            written += os.write(target, buffer[: min(whole, num_bytes - written)])
        os.close(source)
    while written < num_bytes:
        written += os.write(target, buffer[: min(CHUNK, num_bytes - written)])
    os.fsync(target)
    os.close(target)
    seconds = time.perf_counter() - started
    output.unlink()
    return seconds


if __name__ == "__main__":
    main()
