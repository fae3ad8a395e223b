"""Write a model folder of safetensors files in another format, one linear at a time.

::

    specs -> per linear: exact, rounded, or dense -> names, types and shapes of all tensors
          -> shards, each header first -> one linear after another: load, encode, write
          -> digests, index, config, tokenizer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from halfbyte.checkpoint.checksums import ShardDigest, write_checksums
from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.labels import CONFIG_SECTION, MODEL_CONFIG
from halfbyte.checkpoint.output_folder import check_new_folder
from halfbyte.checkpoint.shards import SINGLE_FILE
from halfbyte.checkpoint.write import (
    LABEL_FILE,
    TensorSpec,
    shard_name,
    stream_shard,
    write_index,
    write_json,
)
from halfbyte.convert.card import write_card
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec
from halfbyte.convert.dense import DenseTarget
from halfbyte.convert.prefetch import prefetch
from halfbyte.convert.report import RoundedTensor, measure_rounding, sample_rows, sort_by_error
from halfbyte.convert.source import Source
from halfbyte.convert.target import FolderTarget
from halfbyte.errors import ConfigError
from halfbyte.version import __version__

SHARD_BYTES = 5_000_000_000
ALIGNMENT = 8
"""Alignment of tensors. Tensors of other sizes come last, so that all others are aligned.
Unit: bytes."""

EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in")
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The result of writing a model."""

    path: Path
    encodings: Mapping[str, str]
    """Representation of each linear, by name."""
    rounded: tuple[RoundedTensor, ...]
    num_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The target that encodes each linear."""

    target: FolderTarget
    fallback: FolderTarget
    specs: Mapping[str, CodedSpec]
    dense: Mapping[str, str]
    """Reason for each linear that becomes dense although the target is not, by name."""

    @property
    def coded(self) -> dict[str, CodedSpec]:
        """Linears encoded by the target, not by the fallback."""
        return {name: spec for name, spec in self.specs.items() if name not in self.dense}

    def target_of(self, name: str) -> FolderTarget:
        """Return the target that encodes a linear."""
        target = self.fallback if name in self.dense else self.target
        return target.for_module(name) if isinstance(target, DenseTarget) else target

    def explain_rounding(self, name: str) -> str | None:
        """Describe how a linear is rounded; None if it is exact."""
        rounding = self.target_of(name).find_rounding(self.specs[name])
        reason = self.dense.get(name)
        return f"{rounding} ({reason})" if rounding and reason else rounding


def write_folder(
    source: Source,
    specs: Mapping[str, CodedSpec],
    target: FolderTarget,
    output: Path,
    *,
    allow_error: bool,
    dense_dtype: torch.dtype = torch.float16,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write a model in a format based on safetensors files.

    Args:
        source: The model.
        specs: Properties of its linears.
        target: The format.
        output: A folder that does not exist or is empty.
        allow_error: Use the closest representation for linears that cannot be exact.
        dense_dtype: Type of linears that the target cannot represent at all.
        shard_bytes: Maximum size of a file, unless a single tensor is larger. Unit: bytes.

    Returns:
        What was written.

    Raises:
        ConfigError: A linear cannot be represented exactly and no error is allowed, or the output
            is not empty.
    """
    check_new_folder(output)
    fallback = DenseTarget.from_config(dense_dtype, source.model_config)
    plan = plan_linears(specs, target, allow_error=allow_error, fallback=fallback)
    with TemporaryDirectory() as aside:
        # Before the weights, so that an invalid tokenizer fails early.
        source.copy_companions(Path(aside))
        output.mkdir(parents=True, exist_ok=True)
        rounded: list[RoundedTensor] = []
        digests = _write_shards(source, plan, output, shard_bytes, rounded)
        _describe(source, plan, output, digests, Path(aside))
    return Written(
        path=output,
        encodings={
            name: describe_encoding(plan.target_of(name), spec) for name, spec in specs.items()
        },
        rounded=sort_by_error(rounded),
        num_bytes=sum(digest.num_bytes for digest in digests),
    )


def _write_shards(
    source: Source, plan: Plan, output: Path, shard_bytes: int, rounded: list[RoundedTensor]
) -> list[ShardDigest]:
    """Write the weights, with an index if there is more than one file."""
    shards = _split(source, plan, shard_bytes)
    metadata = {
        **plan.target.metadata(plan.coded),
        "converted_by": f"halfbyte {__version__}",
        "converted_from": source.format,
    }
    digests: list[ShardDigest] = []
    for number, units in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else shard_name(number, len(shards))
        specs_in_order, order = _lay_out(units)
        tensors = _make_tensors(source, plan, order, rounded)
        digests.append(
            stream_shard(
                output / name,
                specs_in_order,
                tensors,
                metadata,
                with_digests=plan.target.format == "gptq",
                bypass_cache=True,
            )
        )
    if len(digests) > 1:
        weight_map = {name: digest.file_name for digest in digests for name in digest.tensors}
        write_index(output, weight_map, sum(digest.tensor_bytes for digest in digests))
    return digests


def plan_linears(
    specs: Mapping[str, CodedSpec],
    target: FolderTarget,
    *,
    allow_error: bool,
    fallback: DenseTarget,
) -> Plan:
    """Decide how each linear is represented.

    Args:
        specs: Properties of the linears.
        target: The format.
        allow_error: Use the closest representation for linears that cannot be exact.
        fallback: Target for linears that the format cannot represent at all.

    Returns:
        The plan.

    Raises:
        ConfigError: Linears cannot be represented exactly and no error is allowed; names some of
            them and their number.
    """
    obstacles: dict[str, str] = {}
    for name, spec in specs.items():
        reason = target.find_obstacle(spec)
        is_embedding = name.rpartition(".")[2] in EMBEDDING_NAMES
        if is_embedding and target.format not in ("mlx", "hf"):
            reason = f"quantized embeddings; {target.format} quantizes only linears"
        if reason is not None:
            obstacles[name] = reason
    if not allow_error:
        check_exact(target.format, obstacles, len(specs))
    dense = {
        name: reason
        for name, reason in obstacles.items()
        if target.find_rounding(specs[name]) is None or "embeddings" in reason
    }
    if len(dense) == len(specs):
        raise ConfigError(
            f"Cannot convert to {target.format}: it can represent none of {len(specs)} linears "
            f"({next(iter(dense.values()))}). Use --to hf for dense weights."
        )
    return Plan(target=target, fallback=fallback, specs=specs, dense=dense)


def check_exact(format_name: str, obstacles: Mapping[str, str], number: int) -> None:
    """Check that a format represents all linears exactly.

    Args:
        format_name: The target format.
        obstacles: Reason for each linear that cannot be exact, by name.
        number: Number of all linears.

    Raises:
        ConfigError: There are obstacles; names some of them and their number.
    """
    if not obstacles:
        return
    first = [f"{name} has {reason}" for name, reason in list(obstacles.items())[:NAMES_SHOWN]]
    more = len(obstacles) - len(first)
    rest = f", and {more} more" if more else ""
    raise ConfigError(
        f"Cannot convert to {format_name} exactly: it cannot represent {len(obstacles)} of "
        f"{number} linears ({'; '.join(first)}{rest}). Add --allow-error to use the closest "
        "representation for these and measure the error, or choose another format."
    )


def describe_encoding(target: FolderTarget, spec: CodedSpec) -> str:
    """Describe the representation of a linear in a few words."""
    if isinstance(target, DenseTarget):
        return str(target.dtype).removeprefix("torch.")
    grid = "symmetric" if spec.is_symmetric else "asymmetric"
    return f"{spec.bits} bits, {grid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """A linear or another tensor of the source, and the tensors it is encoded as."""

    name: str
    is_linear: bool
    tensors: Mapping[str, TensorSpec]
    """Types and shapes by full name."""


def _split(source: Source, plan: Plan, shard_bytes: int) -> list[list[_Unit]]:
    """Distribute the tensors over shards, in the source's order."""
    units = [
        _Unit(
            name=name,
            is_linear=True,
            tensors={
                f"{name}.{suffix}": tensor
                for suffix, tensor in plan.target_of(name).list_tensors(spec).items()
            },
        )
        for name, spec in plan.specs.items()
    ]
    units += [
        _Unit(name=name, is_linear=False, tensors={name: spec})
        for name, spec in source.others.items()
    ]
    shards: list[list[_Unit]] = [[]]
    current_bytes = 0
    for unit in units:
        size = sum(spec.num_bytes for spec in unit.tensors.values())
        if shards[-1] and current_bytes + size > shard_bytes:
            shards.append([])
            current_bytes = 0
        shards[-1].append(unit)
        current_bytes += size
    return shards


def _lay_out(units: list[_Unit]) -> tuple[dict[str, TensorSpec], list[tuple[_Unit, list[str]]]]:
    """Order a file's tensors: as they are encoded, but odd sizes last, widest elements first."""
    specs = {name: spec for unit in units for name, spec in unit.tensors.items()}
    unaligned = [name for name, spec in specs.items() if spec.num_bytes % ALIGNMENT]
    unaligned.sort(key=lambda name: -specs[name].dtype.itemsize)
    order = [(unit, [name for name in unit.tensors if name not in unaligned]) for unit in units]
    owner = {name: unit for unit in units for name in unit.tensors}
    order += [(owner[name], [name]) for name in unaligned]
    order = [(unit, names) for unit, names in order if names]
    return {name: specs[name] for _, names in order for name in names}, order


def _make_tensors(
    source: Source,
    plan: Plan,
    order: list[tuple[_Unit, list[str]]],
    rounded: list[RoundedTensor],
) -> Iterator[tuple[str, Tensor]]:
    """Load, encode and measure the units in order; the next one while one is written."""
    units = [unit for unit, _ in order]
    first = {unit.name: number for number, unit in reversed(list(enumerate(units)))}

    def prepare(number: int) -> dict[str, Tensor]:
        unit = units[number]
        if not unit.is_linear:
            return {unit.name: source.load_other(unit.name)}
        linear = source.load_linear(unit.name)
        target = plan.target_of(unit.name)
        tensors = target.encode(linear)
        how = plan.explain_rounding(unit.name)
        if how is not None and first[unit.name] == number:
            rounded.append(_measure(unit.name, how, linear, target))
        return {f"{unit.name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    prepared = prefetch(prepare, range(len(units)))
    for (_, names), tensors in zip(order, prepared, strict=True):
        for name in names:
            yield name, tensors[name]


def _measure(name: str, how: str, linear: CodedLinear, target: FolderTarget) -> RoundedTensor:
    """Measure the rounding error on a sample of rows, as all rows are rounded alike."""
    sample = linear.take_rows(sample_rows(linear.out_features))
    decoded = target.decode(target.encode(sample), sample.describe())
    if isinstance(decoded, CodedLinear):
        decoded = decoded.dequantize()
    return measure_rounding(name, how, sample.dequantize(), decoded)


def _describe(
    source: Source, plan: Plan, output: Path, digests: list[ShardDigest], companions: Path
) -> None:
    """Write tokenizer, README, digests and configs; ``config.json`` last marks completion."""
    dense = [*plan.dense, *list_dense_linears(source.others)]
    config = plan.target.make_config(plan.coded, dense, source.model_config)
    section = config.get(CONFIG_SECTION, {})
    copy_companions(companions, output)
    _write_card(source, plan, output)
    if plan.target.format == "gptq":
        write_checksums(output, digests, section)
        write_json(output / LABEL_FILE, section)
    write_json(output / MODEL_CONFIG, config)


def _write_card(source: Source, plan: Plan, output: Path) -> None:
    """Write a README with the origin of the folder, and whether it is exact."""
    rounded = sum(plan.explain_rounding(name) is not None for name in plan.specs)
    how = "every weight is exact" if not rounded else f"{rounded} linears are rounded"
    text = (
        f"# {output.name}\n\nConverted from {source.format} to {plan.target.format} by halfbyte "
        f"{__version__}: {how}."
    )
    write_card(source.tokenizer_folder, output, text, plan.target.format)


def list_dense_linears(others: Mapping[str, TensorSpec]) -> list[str]:
    """List the unquantized tensors that may be linears: matrices in blocks, and heads.

    Args:
        others: The unquantized tensors.

    Returns:
        Module names.
    """
    return [
        name.removesuffix(".weight")
        for name, spec in others.items()
        if name.endswith(".weight")
        and len(spec.shape) == 2
        and (any(part.isdigit() for part in name.split(".")) or name.startswith("lm_head"))
    ]
