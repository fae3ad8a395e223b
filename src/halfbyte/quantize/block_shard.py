"""Write a finished block: its shard on disk and its entry in the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import read_shard
from halfbyte.checkpoint.write import shard_name, write_shard
from halfbyte.model.blocks import LinearTensors
from halfbyte.model.weights import ModelWeights
from halfbyte.quantize.finish import count_packed_bits
from halfbyte.quantize.report import ModuleReport
from halfbyte.quantize.rounding import RoundedLinear, weight_checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShard:
    """A finished block that is ready to be written, independent of the model."""

    path: Path
    tensors: Mapping[str, Tensor]
    """On the CPU, or being copied to it."""
    copied: torch.cuda.Event | None
    """Recorded after the copies; None where nothing is copied from a GPU."""
    modules: Sequence[ModuleReport]
    checksums: Mapping[str, int]
    packed_bits: tuple[int, int]

    def write(self) -> dict[str, Any]:
        """Write the shard.

        Returns:
            The block's entry for the journal.
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
    exact: Mapping[str, LinearTensors],
    split_experts: Sequence[str],
) -> BlockShard:
    """Collect the tensors of one block's shard.

    Args:
        weights: The base model, with the block loaded.
        output: The checkpoint's folder.
        index: Index of the block.
        rounded: Its rounded linears.
        exact: Weight and bias of all its linears before rounding, by name within the block.
        split_experts: Names of its fused experts modules that were split into linears.

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
    """Start copying GPU tensors to the host, without waiting for the copies."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return dict(tensors), None
    host_tensors = {}
    for name, tensor in tensors.items():
        if tensor.is_cuda:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host_tensors[name] = host.copy_(tensor, non_blocking=True)
        else:
            host_tensors[name] = tensor
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    return host_tensors, copied


def rewrite_block(
    output: Path,
    entry: Mapping[str, Any],
    changed: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    note: str,
) -> dict[str, Any]:
    """Write a finished block's shard again with changed scales and gains.

    Args:
        output: The checkpoint's folder.
        entry: The block's entry in the journal.
        changed: Tensors that replace those of the same name.
        weights: The linears' dequantized weights, fp32 [out, in], by name on disk.
        note: Added to the report of every linear.

    Returns:
        The block's new entry for the journal.
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
    exact: Mapping[str, LinearTensors],
    split_experts: Sequence[str],
) -> dict[str, Tensor]:
    """Return the tensors of a block that are not quantized.

    They are copied as they are on disk. Where a tensor on disk holds several linears of which some
    are quantized (fused experts, fused q/k/v), the unquantized ones are stored separately.
    """
    prefix = weights.blocks.name(index)
    names = {r.module for r in rounded}
    split = [s for s in split_experts if any(m.startswith(f"{s}.") for m in names)]
    inside = tuple(f"{s}." for s in split)
    without = [f"{prefix}.{name}" for name in (*names, *split)]
    kept = weights.block_keys(index, without)
    dense = weights.files.load(kept)
    dropped = set(weights.block_keys(index)) - set(kept)
    missing = {name for key in dropped for name in weights.parameters_of(key)}
    for name, tensors in exact.items():
        if name in names:
            continue
        disk_name = weights.disk_name(f"{prefix}.{name}")
        for suffix, tensor in tensors._asdict().items():
            is_missing = f"{prefix}.{name}.{suffix}" in missing or name.startswith(inside)
            if is_missing and tensor is not None:
                dense[f"{disk_name}.{suffix}"] = tensor
    return dense
