"""Write a GGUF file: metadata and tokenizer, then one tensor after another.

Linears become Q4_0 if (code - zero) is in -8..7, or Q8_0 if it is in -128..127; both are exact.
Other matrices keep their type, and vectors become F32, also exactly. The types of embeddings and
head can be chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from halfbyte.checkpoint.output_folder import check_new_folder
from halfbyte.convert.coded_linear import CodedSpec
from halfbyte.convert.folder import Written
from halfbyte.convert.gguf_architecture import EMBEDDING, HEAD, Architecture, find_architecture
from halfbyte.convert.gguf_blocks import decode_plain, encode_blocks, encode_plain
from halfbyte.convert.gguf_file import F32, Q4_1, Q8_0, write_gguf_file
from halfbyte.convert.gguf_hyperparameters import list_limitations
from halfbyte.convert.gguf_metadata import build_metadata
from halfbyte.convert.gguf_plan import (
    CHOICES,
    Entry,
    GgufOptions,
    choose_types,
    make_table,
    plan_entries,
)
from halfbyte.convert.gguf_positions import make_rope_factors
from halfbyte.convert.gguf_tokenizer import list_tokenizer_limitations
from halfbyte.convert.prefetch import prefetch
from halfbyte.convert.report import RoundedTensor, measure_rounding, sample_rows, sort_by_error
from halfbyte.convert.source import Source
from halfbyte.errors import ConfigError


def write_gguf(
    source: Source, specs: Mapping[str, CodedSpec], output: Path, options: GgufOptions
) -> Written:
    """Write a model as one GGUF file.

    Args:
        source: The model.
        specs: Properties of its linears.
        output: The file, or a folder for ``model.gguf``.
        options: Options.

    Returns:
        What was written.

    Raises:
        ConfigError: llama.cpp does not support the architecture or a tensor, a linear cannot be
            represented exactly and no error is allowed, or the output exists.
    """
    path = output if output.suffix == ".gguf" else output / "model.gguf"
    if path == output and path.exists():
        raise ConfigError(f"The output {output} exists. Choose another name, or remove it.")
    if path != output:
        check_new_folder(output)
    architecture = find_architecture(source.model_config)
    kinds, reasons = choose_types(specs, options)
    entries = plan_entries(source, specs, architecture, kinds, reasons, options)
    table = make_table(entries)
    pairs = build_metadata(source, specs, architecture, kinds, options.pre_tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded: list[RoundedTensor] = []
    tensors = _make_tensors(source, architecture, entries, rounded)
    size = write_gguf_file(path, pairs, table, tensors)
    return Written(
        path=path,
        encodings={name: kind.name for name, kind in kinds.items()},
        rounded=sort_by_error(rounded),
        num_bytes=size,
        notes=(
            *list_limitations(architecture, source.model_config),
            *list_tokenizer_limitations(source.tokenizer_folder, source.model_config),
            *_describe_type_choices(source, entries),
            *_note_unused_head_option(entries, options),
        ),
    )


def _make_tensors(
    source: Source,
    architecture: Architecture,
    entries: list[Entry],
    rounded: list[RoundedTensor],
) -> Iterator[Tensor]:
    """Load and encode the entries in order; the next one while one is written."""

    def prepare(entry: Entry) -> Tensor:
        return _make_tensor(source, architecture, entry, rounded)

    return prefetch(prepare, entries)


def _make_tensor(
    source: Source, architecture: Architecture, entry: Entry, rounded: list[RoundedTensor]
) -> Tensor:
    """Load and encode one tensor."""
    config = source.model_config
    if entry.part == "factors":
        return encode_plain(make_rope_factors(config)[entry.source], F32)
    module = entry.source if entry.part != "other" else entry.source.rpartition(".")[0]
    order = architecture.row_order(module, config, entry.shape[0])
    if entry.part == "other":
        tensor = source.load_other(entry.source)
        if tensor.dim() == 2 and architecture.is_transposed(entry.source):
            tensor = tensor.t().contiguous()
        tensor = tensor if order is None else tensor[order]
        if architecture.norm_shift and entry.source.endswith("norm.weight"):
            tensor = tensor.float() + architecture.norm_shift
        return _encode(entry, tensor, rounded)
    linear = source.load_linear(entry.source)
    linear = linear if order is None else linear.take_rows(order)
    if entry.part == "bias":
        assert linear.bias is not None
        return encode_plain(linear.bias, F32)
    if entry.part == "weight":
        return _encode(entry, linear.dequantize(), rounded)
    bits = 8 if entry.kind == Q8_0 else 4
    converted = linear.widen(bits) if entry.kind == Q4_1 else linear.recenter(bits)
    data = encode_blocks(converted, entry.kind).view(-1)
    if entry.how is not None:
        rows = sample_rows(linear.out_features)
        decoded = _decode_rows(entry, data, rows)
        weight = linear.take_rows(rows).dequantize()
        rounded.append(measure_rounding(entry.source, entry.how, weight, decoded))
    return data


def _encode(entry: Entry, tensor: Tensor, rounded: list[RoundedTensor]) -> Tensor:
    data = encode_plain(tensor, entry.kind)
    if entry.how is not None:
        rows = sample_rows(entry.shape[0])
        decoded = _decode_rows(entry, data, rows)
        measured = measure_rounding(entry.source, entry.how, tensor[rows], decoded)
        if measured.relative_error > 0:
            rounded.append(measured)
    return data


def _decode_rows(entry: Entry, data: Tensor, rows: Tensor) -> Tensor:
    """Decode some rows of an encoded tensor."""
    shape = (len(rows), *entry.shape[1:])
    return decode_plain(entry.name, data.view(entry.shape[0], -1)[rows], entry.kind, shape)


def _describe_type_choices(source: Source, entries: list[Entry]) -> tuple[str, ...]:
    """Describe the size and error of embeddings and head in each type."""
    notes = []
    for entry in entries:
        module = entry.name.removesuffix(".weight")
        if module not in (EMBEDDING, HEAD) or entry.part != "other":
            continue
        values = source.load_other(entry.source)
        rows = values[sample_rows(len(values))].float()
        parts = []
        for choice, kind in CHOICES.items():
            if entry.shape[-1] % kind.block:
                parts.append(f"{choice} not possible (rows of {entry.shape[-1]})")
                continue
            size = kind.count_bytes(values.shape)
            shape = tuple(rows.shape)
            decoded = decode_plain("", encode_plain(rows, kind), kind, shape)
            error = measure_rounding("", "", rows, decoded).relative_error
            parts.append(f"{choice} {size / 1e6:.1f} MB with an error of {error:.2%}")
        kept = f"{module} is {entry.kind.name}, {entry.num_bytes / 1e6:.1f} MB"
        notes.append(f"{kept}; as {', '.join(parts)}")
    return tuple(notes)


def _note_unused_head_option(entries: list[Entry], options: GgufOptions) -> tuple[str, ...]:
    """Note that the option for the head has no effect, if the head is tied."""
    if options.head == "keep" or any(entry.name == f"{HEAD}.weight" for entry in entries):
        return ()
    return (
        f"--head {options.head} has no effect: the head is tied to the embeddings, whose type is "
        "set by --embeddings",
    )
