"""Small complete checkpoints for fuzzing, one for each kind that exists in practice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.helpers.tiny_gptq import TinyLinear, make_model, write_model

from halfbyte.checkpoint.checksums import write_checksums
from halfbyte.checkpoint.write import (
    build_quantization_config,
    shard_name,
    write_configs,
    write_index,
    write_shard,
)
from halfbyte.quant_config import QuantConfig, Scheme

Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The files of a checkpoint as bytes, and the properties of its linears."""

    name: str
    files: Mapping[str, bytes]
    linears: Mapping[str, TinyLinear]
    has_labels: bool = True
    has_digests: bool = False

    @property
    def is_symmetric(self) -> bool:
        return all(linear.symmetric for linear in self.linears.values())

    @property
    def has_g_idx(self) -> bool:
        return all(linear.with_g_idx for linear in self.linears.values())

    @property
    def has_act_order(self) -> bool:
        return any(linear.act_order for linear in self.linears.values())

    @property
    def weight_files(self) -> list[str]:
        return [name for name in self.files if name.endswith(".safetensors")]

    @property
    def config_files(self) -> list[str]:
        found = ("config.json", "quantize_config.json")
        return [name for name in found if b'"bits"' in self.files.get(name, b"")]


BLOCK = "model.layers.0"


def make_bases(folder: Path) -> list[Base]:
    """Write the checkpoints under a folder and read them back as bytes."""
    asymmetric = TinyLinear(symmetric=False, zero_offset=0, act_order=True)
    old = TinyLinear(bits=3, with_g_idx=False, scale_dtype=torch.bfloat16)
    bare = TinyLinear(bits=2, symmetric=False)
    bases = [_make_halfbyte_checkpoint(folder / "ours")]
    for name, linear, config_file, file_name in (
        ("v2 act-order", asymmetric, "quantize_config.json", "model.safetensors"),
        ("AutoGPTQ", old, "quantize_config.json", "gptq_model-3bit-32g.safetensors"),
        ("no config", bare, "config.json", "model.safetensors"),
    ):
        linears = {f"{BLOCK}.self_attn.q_proj": linear, f"{BLOCK}.mlp.down_proj": linear}
        write_model(folder / name, linears, config_file=config_file, file_name=file_name)
        if name == "no config":
            (folder / name / "config.json").unlink()
        bases.append(
            Base(
                name=name,
                files=read_files(folder / name),
                linears=linears,
                has_labels=name != "no config",
            )
        )
    return bases


def _make_halfbyte_checkpoint(folder: Path) -> Base:
    """Make two shards with an index, configs and digests; mixed bits, ragged groups, a bias."""
    linears = {
        f"{BLOCK}.self_attn.q_proj": TinyLinear(with_bias=True),
        f"{BLOCK}.mlp.up_proj": TinyLinear(bits=8),
        f"{BLOCK}.mlp.down_proj": TinyLinear(in_features=96, group_size=64),
    }
    tensors, _ = make_model(linears)
    folder.mkdir(parents=True)
    split = len(tensors) // 2
    parts = [dict(list(tensors.items())[:split]), dict(list(tensors.items())[split:])]
    digests = [
        write_shard(folder / shard_name(i, 2), part) for i, part in enumerate(parts, start=1)
    ]
    weight_map = {name: shard_name(i, 2) for i, part in enumerate(parts, start=1) for name in part}
    write_index(folder, weight_map, sum(digest.tensor_bytes for digest in digests))
    config = build_quantization_config(
        QuantConfig(group_size=32),
        quantized={
            name: Scheme(bits=linear.bits, group_size=linear.group_size, symmetric=True)
            for name, linear in linears.items()
        },
        skipped={f"{BLOCK}.mlp.gate": "a router"},
        module_groups=[[name.removeprefix(BLOCK + ".")] for name in linears],
        version="0",
    )
    write_configs(folder, {"model_type": "llama", "hidden_size": 64}, config)
    write_checksums(folder, digests, config)
    return Base(name="ours", files=read_files(folder), linears=linears, has_digests=True)


def read_files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
