"""Plan the tensors of a GGUF file: names, types, and which are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.bit_order import BLOCK
from halfbyte.convert.coded_linear import CodedSpec
from halfbyte.convert.folder import check_exact
from halfbyte.convert.gguf_architecture import (
    COMPUTED,
    EMBEDDING,
    HEAD,
    IN_FLOAT32,
    Architecture,
    find_expert,
)
from halfbyte.convert.gguf_blocks import PLAIN
from halfbyte.convert.gguf_file import F16, F32, Q4_0, Q4_1, Q6_K, Q8_0, BlockType
from halfbyte.convert.gguf_positions import make_rope_factors
from halfbyte.convert.source import Source
from halfbyte.errors import ConfigError

EMBEDDING_TYPES = ("keep", "f16", "q8_0", "q6_k")
CHOICES = {"f16": F16, "q8_0": Q8_0, "q6_k": Q6_K}
_KEPT = {dtype: kind for kind, dtype in PLAIN.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufOptions:
    """Options for writing a GGUF file."""

    embeddings: str = "keep"
    head: str = "keep"
    allow_error: bool = False
    widen: bool = False
    pre_tokenizer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of the file, or one expert's slice of it, and its origin."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    """Shape of the tensor, or of the expert's slice."""
    source: str
    """Name of the quantized module, or of the unquantized tensor."""
    part: str
    """"blocks", "weight" (dense, of a quantized module), "bias", "other" or "factors"."""
    how: str | None = None
    """How it is rounded; None if it is exact."""
    expert: int | None = None
    """Number of the expert; the slices of one tensor are consecutive."""

    @property
    def num_bytes(self) -> int:
        """Size in the file. Unit: bytes."""
        return self.kind.count_bytes(self.shape)


def choose_types(
    specs: Mapping[str, CodedSpec], options: GgufOptions
) -> tuple[dict[str, BlockType], dict[str, str]]:
    """Choose a block type for each linear.

    Args:
        specs: Properties of the linears.
        options: Whether errors and wider types are allowed.

    Returns:
        The types by linear, and for each rounded linear, how.
    """
    kinds: dict[str, BlockType] = {}
    reasons: dict[str, str] = {}
    for name, spec in specs.items():
        kinds[name], reason = _choose_type(spec, options.widen)
        if reason is not None:
            reasons[name] = reason
    if not options.allow_error:
        check_exact("gguf", reasons, len(specs))
    return kinds, reasons


def _choose_type(spec: CodedSpec, widen: bool) -> tuple[BlockType, str | None]:
    """Return the narrowest exact type, else the closest one and why it is not exact."""
    if not spec.is_ordered:
        return F16, "act-order (desc_act); GGUF has no g_idx"
    if not spec.scales_fit_half:
        return F16, "a scale that fp16 cannot represent"
    if spec.even_group % BLOCK:
        return F16, f"groups of {spec.group_size}, which is not a multiple of {BLOCK}"
    if spec.can_recenter(4):
        return Q4_0, None
    if spec.bits <= 4 and spec.minima_fit_half:
        return Q4_1, None
    if spec.can_recenter(8) and (widen or spec.bits > 4):
        return Q8_0, None
    if spec.bits <= 4:
        exact = "" if spec.has_free_minima else " (--widen: exact in Q8_0)"
        return Q4_1, f"an asymmetric grid: Q4_1 rounds the minimum to fp16{exact}"
    return F16, f"an asymmetric grid in {spec.bits} bits; Q8_0 is symmetric"


def plan_entries(
    source: Source,
    specs: Mapping[str, CodedSpec],
    architecture: Architecture,
    kinds: Mapping[str, BlockType],
    reasons: Mapping[str, str],
    options: GgufOptions,
) -> list[Entry]:
    """List the file's tensors in the source's order.

    Args:
        source: The model.
        specs: Properties of its linears.
        architecture: Its architecture.
        kinds: Block type by linear.
        reasons: How each rounded linear is rounded, by name.
        options: Options.

    Returns:
        The tensors, followed by the slices of experts.
    """
    entries: list[Entry] = []
    for name, spec in specs.items():
        shape: tuple[int, ...] = (spec.out_features, spec.in_features)
        part = "weight" if kinds[name] in PLAIN else "blocks"
        entries.append(
            Entry(
                name=f"{_translate(architecture, name)}.weight",
                kind=kinds[name],
                shape=shape,
                source=name,
                part=part,
                how=reasons.get(name),
                expert=find_expert(name),
            )
        )
        if spec.bias is not None:
            bias = f"{_translate(architecture, name)}.bias"
            entries.append(
                Entry(name=bias, kind=F32, shape=spec.bias.shape, source=name, part="bias")
            )
    entries += [
        _plan_other(name, spec, architecture, options)
        for name, spec in source.others.items()
        if not _is_tied_head(name, source, architecture) and not COMPUTED.fullmatch(name)
    ]
    entries += _copy_embeddings_as_head(entries, source, architecture, options)
    entries += [
        Entry(name=name, kind=F32, shape=tuple(factors.shape), source=name, part="factors")
        for name, factors in make_rope_factors(source.model_config).items()
    ]
    experts = [entry for entry in entries if entry.expert is not None]
    experts.sort(key=lambda entry: (entry.name, entry.expert))
    return [entry for entry in entries if entry.expert is None] + experts


def _is_tied_head(name: str, source: Source, architecture: Architecture) -> bool:
    """Return whether a tensor is a redundant copy of tied embeddings as the head."""
    is_head = architecture.to_gguf(name.removesuffix(".weight")) == HEAD
    return is_head and architecture.is_tied(source.model_config)


def _copy_embeddings_as_head(
    entries: list[Entry], source: Source, architecture: Architecture, options: GgufOptions
) -> list[Entry]:
    """Plan the head of a model with tied embeddings if llama.cpp requires one."""
    if not (architecture.needs_head and architecture.is_tied(source.model_config)):
        return []
    embeddings = next(entry for entry in entries if entry.name == f"{EMBEDDING}.weight")
    head = replace(embeddings, name=f"{HEAD}.weight")
    if head.part != "other":
        return [head]
    kind, how = _choose_plain(head.source, source.others[head.source], options.head)
    return [replace(head, kind=kind, how=how)]


def _plan_other(
    name: str, spec: TensorSpec, architecture: Architecture, options: GgufOptions
) -> Entry:
    module, _, suffix = name.rpartition(".")
    theirs = _translate(architecture, module)
    shape = spec.shape
    if len(shape) == 2 and architecture.is_transposed(name):
        shape = shape[::-1]
    if len(shape) == 2 and shape[0] == 1:
        shape = shape[1:]  # the gate of a shared expert
    if len(shape) < 2 or theirs.rpartition(".")[2] in IN_FLOAT32:
        kind, how = F32, None
    else:
        choice = {EMBEDDING: options.embeddings, HEAD: options.head}.get(theirs, "keep")
        kind, how = _choose_plain(name, spec, choice)
    return Entry(
        name=f"{theirs}.{suffix}",
        kind=kind,
        shape=shape,
        source=name,
        part="other",
        how=how,
        expert=find_expert(name),
    )


def _choose_plain(name: str, spec: TensorSpec, choice: str) -> tuple[BlockType, str | None]:
    """Return a matrix's own type, or the chosen one."""
    if choice == "keep":
        return _KEPT.get(spec.dtype, F32), None
    kind = CHOICES[choice]
    if spec.shape[-1] % kind.block:
        raise ConfigError(
            f"Cannot store {name} as {kind.name}: its rows of {spec.shape[-1]} are not a multiple "
            f"of {kind.block}. Use q8_0 or f16."
        )
    return kind, f"chosen: {kind.name}"


def _translate(architecture: Architecture, module: str) -> str:
    found = architecture.to_gguf(module)
    if found is None:
        raise ConfigError(
            f"Cannot write GGUF: llama.cpp's '{architecture.name}' has no tensor for {module}. "
            "Choose another format."
        )
    return found


def make_table(entries: list[Entry]) -> list[tuple[str, BlockType, tuple[int, ...]]]:
    """List the file's tensors, with the experts of a block merged into one.

    Args:
        entries: From :func:`plan_entries`.

    Returns:
        Name, type and shape of each.

    Raises:
        ConfigError: The experts of a block have different types or shapes, or one is missing.
    """
    table: list[tuple[str, BlockType, tuple[int, ...]]] = []
    for name, group in groupby(entries, key=lambda entry: entry.name):
        parts = list(group)
        first = parts[0]
        shape = first.shape if first.expert is None else (len(parts), *first.shape)
        if any((part.kind, part.shape) != (first.kind, first.shape) for part in parts) or any(
            part.expert != number for number, part in enumerate(parts) if part.expert is not None
        ):
            kinds = sorted({part.kind.name for part in parts})
            raise ConfigError(
                f"Cannot write GGUF: it stores the {len(parts)} experts of {name} as one tensor, "
                f"but they differ ({', '.join(kinds)}; the last is expert {parts[-1].expert}). "
                "Quantize all experts of a block alike, or choose another format."
            )
        table.append((name, first.kind, shape))
    return table
