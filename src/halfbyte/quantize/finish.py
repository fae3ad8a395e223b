"""Write what belongs to the whole checkpoint: remaining tensors, index, configs, and the report."""

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
    """Write the last shard: embeddings, norms and head; the head packed if it was rounded.

    Args:
        weights: The base model.
        output: The checkpoint's folder.
        head: The rounded head; empty if it stays as it is.
        changed: Tensors changed by end-to-end training, by name on disk.

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
    summary: ModuleSummary,
    *,
    head: bool,
) -> None:
    """Write index, checksums and configs, and copy the tokenizer and other companion files.

    Args:
        weights: The base model.
        output: The checkpoint's folder.
        config: The quantization settings.
        shards: Digests of all shards.
        blocks: The journal's entries.
        summary: Summary of the modules in them.
        head: Whether the head was rounded too.
    """
    quantized = {
        m.name: Scheme(bits=m.bits, group_size=m.group_size, symmetric=m.symmetric)
        for m in summary.modules
    }
    labels = build_quantization_config(
        config,
        quantized=quantized,
        skipped={s.name: s.reason for s in summary.skipped},
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


def save_report(report: QuantizationReport, base: Path, output: Path) -> None:
    """Write the report, the model card and the plot.

    Args:
        report: Report of the run.
        base: The base model's folder, whose license the card repeats.
        output: The checkpoint's folder.
    """
    save_plot(report, output)
    save_model_card(report, base, output)
    report.save(output)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSummary:
    """Summary of the modules in all blocks and the head."""

    modules: tuple[ModuleReport, ...]
    skipped: tuple[SkippedModule, ...]
    bits_per_weight: float
    """Storage of codes, scales and zeros per quantized weight."""
    num_weights: int
    """Quantized weights in the blocks."""

    @property
    def names(self) -> set[str]:
        """Names on disk of all rounded and skipped modules."""
        return {m.name for m in self.modules} | {s.name for s in self.skipped}


def summarize_modules(
    blocks: Sequence[Mapping[str, Any]], head: Sequence[RoundedLinear]
) -> ModuleSummary:
    """Summarize the modules in the journal's entries and the head.

    Args:
        blocks: The journal's entries.
        head: The rounded head; empty if it stays as it is.

    Returns:
        The summary, with modules in the order of rounding.
    """
    modules = [
        ModuleReport(**{**values, "notes": tuple(values["notes"])})
        for entry in blocks
        for values in entry["modules"]
    ]
    in_blocks = [tuple(entry["packed_bits"]) for entry in blocks]
    counts = in_blocks + [count_packed_bits(r.tensors) for r in head]
    return ModuleSummary(
        modules=(*modules, *(r.report for r in head)),
        skipped=tuple(SkippedModule(name=n, reason=r) for e in blocks for n, r in e["skipped"]),
        bits_per_weight=sum(b for b, _ in counts) / max(sum(n for _, n in counts), 1),
        num_weights=sum(n for _, n in in_blocks),
    )


def count_packed_bits(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Count the bits of storage and the weights of a packed linear.

    Args:
        tensors: Its tensors by suffix.

    Returns:
        Bits of codes, scales and zeros; number of weights.
    """
    parts = ("qweight", "scales", "qzeros")
    bits = 8 * sum(tensors[s].numel() * tensors[s].element_size() for s in parts)
    return bits, tensors["g_idx"].numel() * tensors["qweight"].shape[1]


def _module_groups(blocks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Collect the groups of linears that share an input from all blocks, in execution order."""
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
