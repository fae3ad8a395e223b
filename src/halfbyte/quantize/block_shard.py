"""What a finished block leaves behind: its shard on disk, and what the journal says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import read_shard
from halfbyte.checkpoint.write import shard_name, write_shard
from halfbyte.model.weights import ModelWeights
from halfbyte.quantize.finish import count_packed_bits
from halfbyte.quantize.report import ModuleReport
from halfbyte.quantize.rounding import RoundedLinear, weight_checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShard:
    """A finished block on its way to the disk; the model is not needed any more."""

    path: Path
    tensors: Mapping[str, Tensor]
    """On the CPU, or on their way there."""
    copied: torch.cuda.Event | None
    """Happens when they are there."""
    modules: Sequence[ModuleReport]
    checksums: Mapping[str, int]
    packed_bits: tuple[int, int]

    def write(self) -> dict[str, Any]:
        """Write the shard.

        Returns:
            The journal's entry about it.
        """
        if self.copied is not None:
            self.copied.synchronize()
        return {
            "shard": asdict(write_shard(self.path, self.tensors)),
            "modules": [asdict(report) for report in self.modules],
            "checksums": dict(self.checksums),
            "packed_bits": list(self.packed_bits),
        }


def gather_block(
    weights: ModelWeights,
    output: Path,
    index: int,
    *,
    rounded: Sequence[RoundedLinear],
    exact: Mapping[str, Tensor],
    split_experts: Sequence[str],
) -> BlockShard:
    """Gather what one block's shard will hold.

    Args:
        weights: The base model, with the block loaded.
        output: The checkpoint's folder.
        index: Which block.
        rounded: Its rounded linears.
        exact: The weights of all its linears before rounding, by name within the block.
        split_experts: Names of its experts modules that were split.

    Returns:
        The shard.
    """
    packed = {f"{r.name}.{suffix}": t for r in rounded for suffix, t in r.tensors.items()}
    dense = _dense_tensors(weights, index, rounded, exact, split_experts)
    bits = [count_packed_bits(r.tensors) for r in rounded]
    tensors, copied = _copy_to_host({**dense, **packed})
    return BlockShard(
        path=output / shard_name(index + 1, len(weights.blocks.modules) + 1),
        tensors=tensors,
        copied=copied,
        modules=[r.report for r in rounded],
        checksums={r.name: r.checksum for r in rounded},
        packed_bits=(sum(b for b, _ in bits), sum(n for _, n in bits)),
    )


def _copy_to_host(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Begin to copy what lies on a GPU; nobody waits for it."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return dict(tensors), None
    found = {}
    for name, tensor in tensors.items():
        if tensor.is_cuda:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            found[name] = host.copy_(tensor, non_blocking=True)
        else:
            found[name] = tensor
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    return found, copied


def rewrite_block(
    output: Path,
    entry: Mapping[str, Any],
    changed: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    note: str,
) -> dict[str, Any]:
    """Write a finished block's shard again, with other scales and gains.

    Args:
        output: The checkpoint's folder.
        entry: What the journal says of the block.
        changed: Tensors that take the place of those of the same name.
        weights: The linears' dequantized weights, fp32 [out, in], by name on disk.
        note: For every linear's report.

    Returns:
        The journal's new entry.
    """
    path = output / entry["shard"]["file_name"]
    digest = write_shard(path, {**read_shard(path), **changed})
    modules = [
        m if note in m["notes"] else {**m, "notes": [*m["notes"], note]} for m in entry["modules"]
    ]
    checksums = {name: weight_checksum(weights[name]) for name in entry["checksums"]}
    return {**entry, "shard": asdict(digest), "modules": modules, "checksums": checksums}


def _dense_tensors(
    weights: ModelWeights,
    index: int,
    rounded: Sequence[RoundedLinear],
    exact: Mapping[str, Tensor],
    split_experts: Sequence[str],
) -> dict[str, Tensor]:
    """Take a block's other tensors as they are; an expert left dense goes out on its own."""
    prefix = weights.blocks.name(index)
    names = {r.module for r in rounded}
    split = [s for s in split_experts if any(m.startswith(f"{s}.") for m in names)]
    without = [f"{prefix}.{name}" for name in (*names, *split)]
    dense = weights.files.load(weights.block_keys(index, without))
    block = weights.blocks.modules[index]
    for name, weight in exact.items():
        if name not in names and any(name.startswith(f"{s}.") for s in split):
            disk_name = weights.disk_name(f"{prefix}.{name}")
            dense[f"{disk_name}.weight"] = weight
            bias = block.get_submodule(name).bias
            if bias is not None:
                dense[f"{disk_name}.bias"] = bias.data  # type: ignore[assignment]
    return dense
