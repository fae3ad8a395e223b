"""Write a GGUF file: metadata and tokenizer, then one tensor after another.

Linears become Q4_0 where (code - zero) fits -8..7, Q8_0 where it fits -128..127: exact. Other
tensors keep their type, vectors become F32: exact too. Embeddings and head by choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from torch import Tensor

from halfbyte.checkpoint.new_folder import check_new_folder
from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.ahead import run_ahead
from halfbyte.convert.coded import CodedSpec
from halfbyte.convert.folder import Written, check_fit
from halfbyte.convert.gguf_architecture import (
    COMPUTED,
    EMBEDDING,
    HEAD,
    IN_FLOAT32,
    Architecture,
    find_architecture,
    find_expert,
)
from halfbyte.convert.gguf_blocks import (
    PLAIN,
    read_plain,
    spell_blocks,
    spell_plain,
)
from halfbyte.convert.gguf_file import (
    F16,
    F32,
    Q4_0,
    Q4_1,
    Q6_K,
    Q8_0,
    BlockType,
    write_gguf_file,
)
from halfbyte.convert.gguf_hyperparameters import note_limits
from halfbyte.convert.gguf_metadata import describe_file
from halfbyte.convert.gguf_positions import make_rope_factors
from halfbyte.convert.report import RoundedTensor, measure_rounding, sample_rows, worst_first
from halfbyte.convert.respell import BLOCK
from halfbyte.convert.source import Source
from halfbyte.errors import ConfigError

EMBEDDING_TYPES = ("keep", "f16", "q8_0", "q6_k")
_CHOICES = {"f16": F16, "q8_0": Q8_0, "q6_k": Q6_K}
_KEPT = {dtype: kind for kind, dtype in PLAIN.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufOptions:
    """What is to be decided for a GGUF file."""

    embeddings: str = "keep"
    head: str = "keep"
    allow_error: bool = False
    widen: bool = False
    pre_tokenizer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One tensor of the file, or what one expert is of it, and where it comes from."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    """Of this expert alone, where it is of one."""
    source: str
    """The module, or the tensor where it is not of a coded module."""
    part: str
    """"blocks", "weight" (dense, of a coded module), "bias", "other" or "factors"."""
    how: str | None = None
    """What is rounded."""
    expert: int | None = None
    """Number of the expert; those of one tensor follow each other."""


def write_gguf(
    source: Source, specs: Mapping[str, CodedSpec], output: Path, options: GgufOptions
) -> Written:
    """Write a model as one GGUF file.

    Args:
        source: The model.
        specs: Its linears' facts.
        output: The file, or a folder for ``model.gguf``.
        options: Choices.

    Returns:
        What was written.

    Raises:
        ConfigError: llama.cpp has no such architecture or tensor, something does not fit exactly
            and no error is allowed, or the output exists.
    """
    path = output if output.suffix == ".gguf" else output / "model.gguf"
    if path == output and path.exists():
        raise ConfigError(f"The output {output} exists. Choose another name, or remove it.")
    if path != output:
        check_new_folder(output)
    architecture = find_architecture(source.model_config)
    kinds, reasons = choose_types(specs, options)
    entries = _plan(source, specs, architecture, kinds, reasons, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = describe_file(source, specs, architecture, kinds, options.pre_tokenizer)
    rounded: list[RoundedTensor] = []
    table = _make_table(entries)
    tensors = _make_tensors(source, architecture, entries, rounded)
    size = write_gguf_file(path, pairs, table, tensors)
    return Written(
        path=path,
        holds={name: kind.name for name, kind in kinds.items()},
        rounded=worst_first(rounded),
        num_bytes=size,
        notes=(
            *note_limits(architecture, source.model_config),
            *_notes(source, entries),
            *_note_head(source, entries, options),
        ),
    )


def choose_types(
    specs: Mapping[str, CodedSpec], options: GgufOptions
) -> tuple[dict[str, BlockType], dict[str, str]]:
    """Choose a block type for each linear.

    Args:
        specs: The linears' facts.
        options: Whether an error, and whether a wider type, is allowed.

    Returns:
        The types, and by linear what is rounded.
    """
    kinds: dict[str, BlockType] = {}
    reasons: dict[str, str] = {}
    for name, spec in specs.items():
        kinds[name], reason = _choose_type(spec, options.widen)
        if reason is not None:
            reasons[name] = reason
    if not options.allow_error:
        check_fit("gguf", reasons, len(specs))
    return kinds, reasons


def _make_table(entries: list[_Entry]) -> list[tuple[str, BlockType, tuple[int, ...]]]:
    """Describe the file's tensors: experts that follow each other are one."""
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
                f"Cannot write GGUF: the {len(parts)} experts of {name} are one tensor there, and "
                f"these are not alike ({', '.join(kinds)}; the last is expert {parts[-1].expert}). "
                "Quantize all experts of a block in the same way, or choose another format."
            )
        table.append((name, first.kind, shape))
    return table


def _choose_type(spec: CodedSpec, widen: bool) -> tuple[BlockType, str | None]:
    """Give the narrowest type that is exact, else the closest one and why it is not."""
    if not spec.is_ordered:
        return F16, "groups in the order of activations (desc_act); GGUF has no g_idx"
    if not spec.scales_fit_half:
        return F16, "a scale that fp16 cannot hold"
    if spec.even_group % BLOCK:
        return F16, f"groups of {spec.group_size}, which is no multiple of {BLOCK}"
    if spec.can_recentre(4):
        return Q4_0, None
    if spec.bits <= 4 and spec.minima_fit_half:
        return Q4_1, None
    if spec.can_recentre(8) and (widen or spec.bits > 4):
        return Q8_0, None
    if spec.bits <= 4:
        return Q4_1, "asymmetric: Q4_1 rounds the minimum to fp16 (--widen: exact in Q8_0)"
    return F16, f"asymmetric in {spec.bits} bits; Q8_0 is symmetric"


def _plan(
    source: Source,
    specs: Mapping[str, CodedSpec],
    architecture: Architecture,
    kinds: Mapping[str, BlockType],
    reasons: Mapping[str, str],
    options: GgufOptions,
) -> list[_Entry]:
    """List the file's tensors in the source's order."""
    entries: list[_Entry] = []
    for name, spec in specs.items():
        shape: tuple[int, ...] = (spec.out_features, spec.in_features)
        part = "weight" if kinds[name] in PLAIN else "blocks"
        entries.append(
            _Entry(
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
                _Entry(name=bias, kind=F32, shape=spec.bias.shape, source=name, part="bias")
            )
    entries += [
        _plan_other(name, spec, architecture, options)
        for name, spec in source.others.items()
        if not _is_repeated(name, source, architecture) and not COMPUTED.fullmatch(name)
    ]
    entries += _repeat_embeddings(entries, source, architecture, options)
    entries += [
        _Entry(name=name, kind=F32, shape=tuple(factors.shape), source=name, part="factors")
        for name, factors in make_rope_factors(source.model_config).items()
    ]
    experts = [entry for entry in entries if entry.expert is not None]
    experts.sort(key=lambda entry: (entry.name, entry.expert))
    return [entry for entry in entries if entry.expert is None] + experts


def _is_repeated(name: str, source: Source, architecture: Architecture) -> bool:
    """Whether a tensor is a head that is tied to the embeddings, stored all the same."""
    is_head = architecture.to_gguf(name.removesuffix(".weight")) == HEAD
    return is_head and architecture.is_tied(source.model_config)


def _repeat_embeddings(
    entries: list[_Entry], source: Source, architecture: Architecture, options: GgufOptions
) -> list[_Entry]:
    """Give the head of a model that is tied, where llama.cpp asks for one all the same."""
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
) -> _Entry:
    module, _, suffix = name.rpartition(".")
    theirs = _translate(architecture, module)
    shape = spec.shape
    if len(shape) == 2 and architecture.is_turned(name):
        shape = shape[::-1]
    if len(shape) == 2 and shape[0] == 1:
        shape = shape[1:]  # the gate of a shared expert
    if len(shape) < 2 or theirs.rpartition(".")[2] in IN_FLOAT32:
        kind, how = F32, None
    else:
        choice = {EMBEDDING: options.embeddings, HEAD: options.head}.get(theirs, "keep")
        kind, how = _choose_plain(name, spec, choice)
    return _Entry(
        name=f"{theirs}.{suffix}",
        kind=kind,
        shape=shape,
        source=name,
        part="other",
        how=how,
        expert=find_expert(name),
    )


def _choose_plain(name: str, spec: TensorSpec, choice: str) -> tuple[BlockType, str | None]:
    """Keep a matrix's type, or take the chosen one."""
    if choice == "keep":
        return _KEPT.get(spec.dtype, F32), None
    kind = _CHOICES[choice]
    if spec.shape[-1] % kind.block:
        raise ConfigError(
            f"Cannot hold {name} in {kind.name}: its rows of {spec.shape[-1]} are no multiple of "
            f"{kind.block}. Use q8_0 or f16."
        )
    return kind, f"chosen: {kind.name}"


def _translate(architecture: Architecture, module: str) -> str:
    found = architecture.to_gguf(module)
    if found is None:
        raise ConfigError(
            f"Cannot write GGUF: llama.cpp's '{architecture.name}' has no place for {module}. "
            "Choose another format."
        )
    return found


def _make_tensors(
    source: Source,
    architecture: Architecture,
    entries: list[_Entry],
    rounded: list[RoundedTensor],
) -> Iterator[Tensor]:
    """Load and spell one entry after another, the next while one is being written."""

    def prepare(entry: _Entry) -> Tensor:
        return _make_tensor(source, architecture, entry, rounded)

    return run_ahead(prepare, entries)


def _make_tensor(
    source: Source, architecture: Architecture, entry: _Entry, rounded: list[RoundedTensor]
) -> Tensor:
    """Load and spell one tensor."""
    config = source.model_config
    if entry.part == "factors":
        return spell_plain(make_rope_factors(config)[entry.source], F32)
    module = entry.source if entry.part != "other" else entry.source.rpartition(".")[0]
    order = architecture.row_order(module, config, entry.shape[0])
    if entry.part == "other":
        tensor = source.load_other(entry.source)
        if tensor.dim() == 2 and architecture.is_turned(entry.source):
            tensor = tensor.t().contiguous()
        tensor = tensor if order is None else tensor[order]
        if architecture.norm_shift and entry.source.endswith("norm.weight"):
            tensor = tensor.float() + architecture.norm_shift
        return _spell(entry, tensor, rounded)
    linear = source.load_linear(entry.source)
    linear = linear if order is None else linear.take_rows(order)
    if entry.part == "bias":
        assert linear.bias is not None
        return spell_plain(linear.bias, F32)
    if entry.part == "weight":
        return _spell(entry, linear.dequantize(), rounded)
    bits = 8 if entry.kind == Q8_0 else 4
    held = linear.widen(bits) if entry.kind == Q4_1 else linear.recentre(bits)
    data = spell_blocks(held, entry.kind).view(-1)
    if entry.how is not None:
        rows = sample_rows(linear.out_features)
        shape = (len(rows), linear.in_features)
        again = read_plain(entry.name, data.view(entry.shape[0], -1)[rows], entry.kind, shape)
        weight = linear.take_rows(rows).dequantize()
        rounded.append(measure_rounding(entry.source, entry.how, weight, again))
    return data


def _spell(entry: _Entry, tensor: Tensor, rounded: list[RoundedTensor]) -> Tensor:
    data = spell_plain(tensor, entry.kind)
    if entry.how is not None:
        rows = sample_rows(entry.shape[0])
        shape = (len(rows), *entry.shape[1:])
        again = read_plain(entry.name, data.view(entry.shape[0], -1)[rows], entry.kind, shape)
        found = measure_rounding(entry.source, entry.how, tensor[rows], again)
        if found.relative_error > 0:
            rounded.append(found)
    return data


def _notes(source: Source, entries: list[_Entry]) -> tuple[str, ...]:
    """Say what embeddings and head would take in each type."""
    notes = []
    for entry in entries:
        module = entry.name.removesuffix(".weight")
        if module not in (EMBEDDING, HEAD) or entry.part != "other":
            continue
        values = source.load_other(entry.source)
        rows = values[sample_rows(len(values))].float()
        parts = []
        for choice, kind in _CHOICES.items():
            if entry.shape[-1] % kind.block:
                parts.append(f"{choice} not possible (rows of {entry.shape[-1]})")
                continue
            size = values.numel() // kind.block * kind.num_bytes
            shape = tuple(rows.shape)
            again = read_plain("", spell_plain(rows, kind), kind, shape)
            error = measure_rounding("", "", rows, again).relative_error
            parts.append(f"{choice} {size / 1e6:.1f} MB with an error of {error:.2%}")
        kept = f"{module} is {entry.kind.name}, {_bytes_of(entry) / 1e6:.1f} MB"
        notes.append(f"{kept}; as {', '.join(parts)}")
    return tuple(notes)


def _note_head(source: Source, entries: list[_Entry], options: GgufOptions) -> tuple[str, ...]:
    """Say where a choice for the head is none."""
    if options.head == "keep" or any(entry.name == f"{HEAD}.weight" for entry in entries):
        return ()
    return (
        f"the head is tied to the embeddings, which --embeddings chooses: --head {options.head} "
        "changed nothing",
    )


def _bytes_of(entry: _Entry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count // entry.kind.block * entry.kind.num_bytes
