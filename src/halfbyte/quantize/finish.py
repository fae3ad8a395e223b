"""The last steps: what is outside the blocks, index and configs, a reload, the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.checkpoint.checksums import ShardDigest, write_checksums
from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.write import (
    build_quantization_config,
    shard_name,
    write_configs,
    write_index,
    write_shard,
)
from halfbyte.model.weights import ModelWeights, map_tensor
from halfbyte.quant_config import QuantConfig, Scheme
from halfbyte.quantize.model_card import save_model_card
from halfbyte.quantize.plot import save_plot
from halfbyte.quantize.report import ModuleReport, QuantizationReport, SkippedModule
from halfbyte.quantize.rounding import RoundedLinear
from halfbyte.version import __version__


def write_outside(
    weights: ModelWeights,
    output: Path,
    head: Sequence[RoundedLinear],
    changed: Mapping[str, Tensor],
) -> ShardDigest:
    """Write the last shard: embeddings, norms and head, as they are or, the head, packed.

    Args:
        weights: The base model.
        output: The checkpoint's folder.
        head: The rounded head, or nothing.
        changed: Tensors that training changed, by name on disk.

    Returns:
        The shard's digest.
    """
    packed = {f"{r.name}.{suffix}": t for r in head for suffix, t in r.tensors.items()}
    dropped = {f"{r.name}.{suffix}" for r in head for suffix in ("weight", "bias")}
    infos = weights.files.infos
    dense = {k: map_tensor(infos[k]) for k in weights.outside_keys if k not in dropped}
    count = len(weights.blocks.modules) + 1
    return write_shard(output / shard_name(count, count), {**dense, **changed, **packed})


def write_descriptions(
    weights: ModelWeights,
    output: Path,
    config: QuantConfig,
    shards: Sequence[ShardDigest],
    blocks: Sequence[Mapping[str, Any]],
    found: RoundedModules,
    *,
    head: bool,
) -> dict[str, Any]:
    """Write everything that says what the shards are, and copy the tokenizer.

    Args:
        weights: The base model.
        output: The checkpoint's folder.
        config: What was asked for.
        shards: Digests of all shards.
        blocks: The journal's entries.
        found: What is in them.
        head: Whether the head was rounded too.

    Returns:
        The quantization config as written.
    """
    quantized = {
        m.name: Scheme(bits=m.bits, group_size=m.group_size, symmetric=m.symmetric)
        for m in found.modules
    }
    labels = build_quantization_config(
        config,
        quantized=quantized,
        skipped={s.name: s.reason for s in found.skipped},
        module_groups=_module_groups(blocks),
        version=__version__,
    )
    model_config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
    if head:
        model_config["tie_word_embeddings"] = False
    write_index(
        output,
        {name: shard.file_name for shard in shards for name in shard.tensors},
        sum(shard.tensor_bytes for shard in shards),
    )
    write_checksums(output, shards, labels)
    copy_companions(weights.folder, output)
    write_configs(output, model_config, labels)
    return labels


def save_report(report: QuantizationReport, base: Path, output: Path) -> QuantizationReport:
    """Write the report, the model card and the picture.

    Args:
        report: The run.
        base: The base model's folder, whose licence the card carries on.
        output: The checkpoint's folder.

    Returns:
        The report as saved.
    """
    save_plot(report, output)
    save_model_card(report, base, output)
    report.save(output)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedModules:
    """What all blocks and the head came to."""

    modules: tuple[ModuleReport, ...]
    skipped: tuple[SkippedModule, ...]
    bits_per_weight: float
    """Codes, scales and zeros over the weights they stand for."""

    @property
    def names(self) -> set[str]:
        """Every linear that was looked at, by its name on disk."""
        return {m.name for m in self.modules} | {s.name for s in self.skipped}


def collect_modules(
    blocks: Sequence[Mapping[str, Any]], head: Sequence[RoundedLinear]
) -> RoundedModules:
    """Put together what the journal says of the blocks and what came of the head.

    Args:
        blocks: The journal's entries.
        head: The rounded head, or nothing.

    Returns:
        Modules in the order of their rounding.
    """
    modules = [
        ModuleReport(**{**values, "notes": tuple(values["notes"])})
        for entry in blocks
        for values in entry["modules"]
    ]
    counts = [tuple(entry["packed_bits"]) for entry in blocks]
    counts += [count_packed_bits(r.tensors) for r in head]
    return RoundedModules(
        modules=(*modules, *(r.report for r in head)),
        skipped=tuple(SkippedModule(name=n, reason=r) for e in blocks for n, r in e["skipped"]),
        bits_per_weight=sum(b for b, _ in counts) / max(sum(n for _, n in counts), 1),
    )


def count_packed_bits(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Count what a packed linear takes on disk for its weights.

    Args:
        tensors: By suffix.

    Returns:
        Bits of codes, scales and zeros; and weights.
    """
    parts = ("qweight", "scales", "qzeros")
    bits = 8 * sum(tensors[s].numel() * tensors[s].element_size() for s in parts)
    return bits, tensors["g_idx"].numel() * tensors["qweight"].shape[1]


def _module_groups(blocks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Collect groups of linears that share an input over all blocks, in execution order."""
    groups: list[list[str]] = []
    seen: set[str] = set()
    for entry in blocks:
        for stage in entry["stages"]:
            for linears in stage:
                new = [name for name in linears if name not in seen]
                if new:
                    groups.append(new)
                    seen.update(new)
    return groups
