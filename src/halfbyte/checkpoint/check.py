"""Check which programs can load a checkpoint, with reasons for each that cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.checkpoint.consumers import (
    CONSUMERS,
    TENSOR_PARALLEL_SIZES,
    VLLM_REQUIRED_KEYS,
    Consumer,
)
from halfbyte.checkpoint.dynamic import resolve_dynamic
from halfbyte.checkpoint.labels import read_model_config
from halfbyte.checkpoint.read import Checkpoint, LinearInfo
from halfbyte.checkpoint.vllm_view import (
    ModelSizes,
    VllmView,
    declares_act_order,
    find_fused_siblings,
    split_linear,
    view_linear,
)
from halfbyte.quant_config import PER_CHANNEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one consumer can load the checkpoint at one tensor-parallel size."""

    consumer: str
    label: str
    tensor_parallel: int | None
    """Number of devices; None if the consumer has no tensor parallelism."""
    loads: bool
    reasons: tuple[str, ...]
    evidence: str
    """Basis of the rules: "ran" (tried) or "read" (in the consumer's source)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The result of `halfbyte check`."""

    folder: str
    num_linears: int
    schemes: Mapping[str, int]
    """Number of linears by bits, group size and symmetry."""
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return {
            "folder": self.folder,
            "num_linears": self.num_linears,
            "schemes": dict(self.schemes),
            "notes": list(self.notes),
            "verdicts": [
                {name: getattr(verdict, name) for name in Verdict.__slots__}
                for verdict in self.verdicts
            ],
        }


@dataclass(slots=True)
class _Reasons:
    """Collects reasons, with the modules each applies to."""

    modules: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, module: str | None = None) -> None:
        self.modules.setdefault(reason, []).extend([] if module is None else [module])

    def summarize(self) -> tuple[str, ...]:
        return tuple(
            reason
            + (f": {found[0]}" if found else "")
            + (f" and {len(found) - 1} more" if found[1:] else "")
            for reason, found in self.modules.items()
        )


def check_consumers(checkpoint: Checkpoint) -> CheckReport:
    """Check a checkpoint against the rules of every consumer.

    Reads the zeros and group indices of every linear, not the weights.

    Args:
        checkpoint: An open checkpoint.

    Returns:
        One verdict per consumer and tensor-parallel size.

    Raises:
        CheckpointError: A value is out of range, so that no program should load the checkpoint;
            names the tensor.
    """
    infos = {name: checkpoint.load_info(name) for name in checkpoint.linears}
    verdicts: list[Verdict] = []
    for consumer in CONSUMERS:
        for size in TENSOR_PARALLEL_SIZES if consumer.is_vllm else (None,):
            reasons = _Reasons()
            if not consumer.supports_offsets:
                for name, layout in checkpoint.linears.items():
                    if layout.has_offsets:
                        reasons.add("it cannot read the offsets of a merged adapter", name)
            if consumer.is_vllm:
                _check_vllm(checkpoint, infos, consumer, size or 1, reasons)
            else:
                _check_plain(checkpoint, infos, consumer, reasons)
            found = reasons.summarize()
            verdicts.append(
                Verdict(
                    consumer=consumer.name,
                    label=consumer.label,
                    tensor_parallel=size,
                    loads=not found,
                    reasons=found,
                    evidence=consumer.evidence,
                )
            )
    notes = [info.zeros.note for info in infos.values() if info.zeros.note]
    shown = (*notes[:1], *([f"The same for {len(notes) - 1} more linears."] if notes[1:] else []))
    return CheckReport(
        folder=str(checkpoint.folder),
        num_linears=len(infos),
        schemes=_count_schemes(infos),
        verdicts=tuple(verdicts),
        notes=(*checkpoint.notes, *shown),
    )


def _count_schemes(infos: Mapping[str, LinearInfo]) -> dict[str, int]:
    schemes: dict[str, int] = {}
    for info in infos.values():
        group = "per row" if info.layout.num_groups == 1 else str(info.layout.group_size)
        kind = "symmetric" if info.zeros.is_symmetric else "asymmetric"
        ragged = ", ragged" if info.layout.is_ragged else ""
        order = "" if info.has_trivial_groups else ", act-order"
        name = f"{info.layout.bits} bits, group {group}{ragged}, {kind}{order}"
        schemes[name] = schemes.get(name, 0) + 1
    return schemes


def _check_plain(
    checkpoint: Checkpoint, infos: Mapping[str, LinearInfo], consumer: Consumer, reasons: _Reasons
) -> None:
    """Check a consumer that loads one module at a time, under its own name."""
    for name, info in infos.items():
        in_features, out_features = info.layout.in_features, info.layout.out_features
        for reason in _explain_limits(consumer, info, in_features, out_features):
            reasons.add(reason, name)
        if consumer.trusts_config:
            _check_label(checkpoint, name, info, reasons)
    labels, maker = checkpoint.labels, consumer.v1_zeros_from
    if (
        maker
        and not labels.symmetric
        and labels.zero_offset
        and maker not in _list_makers(labels.raw)
    ):
        reasons.add(
            f"it accepts asymmetric zeros in the dialect 'gptq' only from {maker}, which "
            "meta.quantizer does not name"
        )


def _list_makers(raw: Mapping[str, Any]) -> set[str]:
    """Return the names of the tools that wrote the config, in lower case."""
    meta = raw.get("meta")
    named = meta.get("quantizer") if isinstance(meta, dict) else None
    listed = named if isinstance(named, list) else [named]
    return {entry.partition(":")[0].lower() for entry in listed if isinstance(entry, str)}


def _explain_limits(
    consumer: Consumer, info: LinearInfo, in_features: float, out_features: float
) -> Iterator[str]:
    """Yield each limit of a consumer that a linear with these sizes per device violates."""
    layout = info.layout
    if layout.bits not in consumer.bits:
        allowed = " or ".join(map(str, consumer.bits))
        yield f"it supports {allowed} bits, not {layout.bits}"
    if layout.bits in consumer.symmetric_bits and not info.zeros.is_symmetric:
        yield "it supports only symmetric quantization"
    for axis, size, multiple in (
        ("in_features", in_features, consumer.in_multiple),
        ("out_features", out_features, consumer.out_multiple),
    ):
        if size % multiple:
            yield f"{axis} {size:g} per device is not a multiple of {multiple}"
    group_size = PER_CHANNEL if layout.num_groups == 1 else layout.group_size
    if consumer.group_sizes is not None and group_size not in consumer.group_sizes:
        yield f"group size {group_size} is not one of {', '.join(map(str, consumer.group_sizes))}"
    if group_size % consumer.group_multiple and group_size != PER_CHANNEL:
        yield f"group size {group_size} is not a multiple of {consumer.group_multiple}"
    if not consumer.supports_g_idx and not info.has_trivial_groups:
        yield "it does not support act-order (g_idx is not in order)"


def _check_label(checkpoint: Checkpoint, name: str, info: LinearInfo, reasons: _Reasons) -> None:
    """Check what a consumer gets wrong that trusts the config over the tensors."""
    labels = checkpoint.labels
    overrides = resolve_dynamic(labels.dynamic, name)
    if overrides is None:
        reasons.add("dynamic in the config says that it is not quantized", name)
        return
    view = VllmView(
        bits=overrides.get("bits", labels.bits),
        group_size=overrides.get("group_size", labels.group_size),
        symmetric=overrides.get("sym", labels.symmetric),
    )
    _compare_view(view, info, name, reasons)
    if info.zeros.zero_offset != labels.zero_offset:
        reasons.add(
            "it trusts checkpoint_format, which is "
            f"'{labels.checkpoint_format or 'gptq'}' and does not match qzeros",
            name,
        )


def _compare_view(view: VllmView, info: LinearInfo, name: str, reasons: _Reasons) -> None:
    layout = info.layout
    if view.bits != layout.bits:
        reasons.add(f"the config says {view.bits} bits, the tensors have {layout.bits}", name)
    declared = layout.in_features if view.group_size == PER_CHANNEL else view.group_size
    # A group size of at least the layer's width means one group per row.
    if declared != layout.group_size and not (
        declared and layout.num_groups == 1 and declared >= layout.in_features
    ):
        reasons.add(
            f"the config says group size {view.group_size}, the tensors have {layout.group_size}",
            name,
        )


def _check_vllm(
    checkpoint: Checkpoint,
    infos: Mapping[str, LinearInfo],
    consumer: Consumer,
    tensor_parallel: int,
    reasons: _Reasons,
) -> None:
    labels = checkpoint.labels
    missing = [key for key in VLLM_REQUIRED_KEYS if labels.raw.get(key) is None]
    if missing:
        reasons.add(f"the quantization config has no {', '.join(missing)}")
        return
    if labels.bits not in (4, 8) or not labels.symmetric:
        kind = "symmetric" if labels.symmetric else "asymmetric"
        reasons.add(
            f"it supports configs with 4 or 8 bits, symmetric; this one has {labels.bits}, {kind}"
        )
        return
    if declares_act_order(labels):
        reasons.add("it does not support desc_act: true in the config, unless group_size is -1")
    sizes = ModelSizes.from_config(read_model_config(checkpoint.folder))
    heads = sizes.explain_heads(tensor_parallel)
    if heads:
        reasons.add(heads)
    linears = _list_linears(checkpoint)
    for name in linears:
        view = view_linear(labels, name, linears, checkpoint.linears)
        if name in infos:
            _check_vllm_linear(name, infos, view, linears, reasons)
            _check_split(consumer, name, infos, linears, sizes, tensor_parallel, reasons)
        elif view is not None:
            reasons.add("it would expect packed weights, but the linear is in 16 bits", name)
    heads_listed = [n for n in infos if n.rpartition(".")[2] == "lm_head"]
    if heads_listed and not labels.lm_head:
        reasons.add("the output head is quantized, but lm_head in the config is false")


def _list_linears(checkpoint: Checkpoint) -> dict[str, None]:
    """List every module with packed weights or with a 2-D weight."""
    names = dict.fromkeys(checkpoint.linears)
    for name, info in checkpoint.files.infos.items():
        if name.endswith(".weight") and len(info.shape) == 2:
            names[name.removesuffix(".weight")] = None
    return names


def _check_vllm_linear(
    name: str,
    infos: Mapping[str, LinearInfo],
    view: VllmView | None,
    linears: Mapping[str, None],
    reasons: _Reasons,
) -> None:
    info = infos[name]
    _, siblings = find_fused_siblings(name, linears)
    fused = ", ".join(sibling.rpartition(".")[2] for sibling in siblings)
    unquantized = [sibling for sibling in siblings if sibling not in infos]
    if unquantized:
        reasons.add(
            f"it fuses {fused}, of which {unquantized[0].rpartition('.')[2]} is in 16 bits", name
        )
        return
    kinds = {_describe_grid(infos[sibling]) for sibling in siblings}
    if len(kinds) > 1:
        reasons.add(
            f"it fuses {fused}, which have different grids ({'; '.join(sorted(kinds))})", name
        )
        return
    if view is None:
        reasons.add("according to the config, it would load the linear in 16 bits", name)
        return
    _compare_view(view, info, name, reasons)


def _describe_grid(info: LinearInfo) -> str:
    kind = "symmetric" if info.zeros.is_symmetric else "asymmetric"
    return f"{info.layout.bits} bits, group {info.layout.group_size}, {kind}"


def _check_split(
    consumer: Consumer,
    name: str,
    infos: Mapping[str, LinearInfo],
    linears: Mapping[str, None],
    sizes: ModelSizes,
    tensor_parallel: int,
    reasons: _Reasons,
) -> None:
    """Check the sizes on one device; fused linears are checked together, once."""
    _, siblings = find_fused_siblings(name, linears)
    if name != siblings[0] or any(sibling not in infos for sibling in siblings):
        return
    info, layout = infos[name], infos[name].layout
    parts = [split_linear(s, infos[s].layout, sizes, tensor_parallel) for s in siblings]
    in_features, out_features = parts[0][0], sum(out for _, out in parts)
    for reason in _explain_limits(consumer, info, in_features, out_features):
        reasons.add(reason, name)
    if layout.num_groups > 1 and in_features % layout.group_size:
        reasons.add(
            f"in_features {in_features:g} per device is not a multiple of group size "
            f"{layout.group_size}",
            name,
        )
