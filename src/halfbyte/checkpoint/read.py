"""Read and validate a GPTQ checkpoint of any dialect, one linear at a time.

::

    folder -> TensorFiles (headers) + QuantizationLabels -> LinearLayout per module
           -> load_linear(name): tensors + zero_offset -> dequantize(name): float32 [out, in]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.checksums import verify_checksums
from halfbyte.checkpoint.dialect import (
    ZeroDialect,
    detect_zero_dialect,
    infer_group_size,
    make_trivial_g_idx,
)
from halfbyte.checkpoint.dynamic import resolve_dynamic
from halfbyte.checkpoint.labels import QuantizationLabels, read_labels
from halfbyte.checkpoint.layout import (
    LINEAR_SUFFIXES,
    OFFSETS,
    QUANTIZED_SUFFIXES,
    LinearLayout,
    infer_linear_layout,
)
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import CheckpointError
from halfbyte.kernels.torch_reference import dequantize_weight

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)

ALLOWED_DTYPES: Mapping[str, tuple[torch.dtype, ...]] = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": FLOAT_TYPES,
    "g_idx": (torch.int32, torch.int64),
    "bias": FLOAT_TYPES,
    OFFSETS: (torch.float32,),
}

_LABEL_TYPES: Mapping[str, type] = {"bits": int, "group_size": int, "sym": bool}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInfo:
    """Properties of one quantized linear that are read from its small tensors, not the weights."""

    layout: LinearLayout
    """With the group size from ``g_idx``, if there is one."""
    zeros: ZeroDialect
    has_trivial_groups: bool
    """Whether the groups are contiguous and in order, so that ``g_idx`` is redundant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """The tensors of one quantized linear as on disk, and how to interpret them."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    """int32 [in]; created if the file has none."""
    bias: Tensor | None
    offsets: Tensor | None
    """float32 [groups, out]."""
    layout: LinearLayout
    zero_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: headers and config are validated, no weight is in memory."""

    folder: Path
    files: TensorFiles
    labels: QuantizationLabels
    linears: Mapping[str, LinearLayout]
    """Every quantized module, in the order of the files."""
    notes: tuple[str, ...]
    """Contradictions between config and tensors, and which of the two was used."""

    def load_info(self, name: str) -> LinearInfo:
        """Read and validate a linear's zeros and groups, not its weights.

        Args:
            name: A module of :attr:`linears`.

        Returns:
            Its properties.

        Raises:
            CheckpointError: There is no such module, or a value is out of range; names the tensor.
        """
        layout = self._get_layout(name)
        wanted = ["qzeros", *(["g_idx"] if layout.has_g_idx else [])]
        return self._make_info(name, self._load(name, wanted))

    def load_linear(self, name: str) -> PackedLinear:
        """Read and validate one quantized linear.

        Args:
            name: A module of :attr:`linears`.

        Returns:
            Its tensors, copied into memory.

        Raises:
            CheckpointError: There is no such module, or a value is out of range; names the tensor.
        """
        layout = self._get_layout(name)
        optional = {
            "g_idx": layout.has_g_idx,
            "bias": layout.has_bias,
            OFFSETS: layout.has_offsets,
        }
        tensors = self._load(name, [s for s in LINEAR_SUFFIXES if optional.get(s, True)])
        info = self._make_info(name, tensors)
        for suffix in ("scales", "bias", OFFSETS):
            if suffix in tensors and not bool(torch.isfinite(tensors[suffix]).all()):
                bad = int((~torch.isfinite(tensors[suffix])).sum())
                raise CheckpointError(
                    f"{name}.{suffix} has {bad} of {tensors[suffix].numel()} values that are "
                    "infinite or not a number. The file is damaged; download or quantize it again."
                )
        g_idx = tensors.get("g_idx")
        return PackedLinear(
            qweight=tensors["qweight"],
            qzeros=tensors["qzeros"],
            scales=tensors["scales"],
            g_idx=make_trivial_g_idx(info.layout) if g_idx is None else g_idx.to(torch.int32),
            bias=tensors.get("bias"),
            offsets=tensors.get(OFFSETS),
            layout=info.layout,
            zero_offset=info.zeros.zero_offset,
        )

    def dequantize(self, name: str, device: torch.device | None = None) -> Tensor:
        """Read one linear and dequantize its weight.

        Args:
            name: A module of :attr:`linears`.
            device: Device of the result; None for the CPU.

        Returns:
            float32 [out, in].

        Raises:
            CheckpointError: There is no such module, or a value is out of range; names the tensor.
        """
        linear = self.load_linear(name)
        g_idx = linear.g_idx.to(device)
        weight = dequantize_weight(
            linear.qweight.to(device),
            linear.qzeros.to(device),
            linear.scales.to(device),
            g_idx,
            bits=linear.layout.bits,
            zero_offset=linear.zero_offset,
            group_size=linear.layout.group_size,
            dtype=torch.float32,
        )
        if linear.offsets is not None:
            weight = weight + linear.offsets.to(device).t()[:, g_idx.long()]
        return weight.contiguous()

    def verify(self) -> int:
        """Compare every byte with the digests in ``checksums.json``.

        Returns:
            The number of tensors compared.

        Raises:
            CheckpointError: There are no digests, or one differs; names file and tensor.
        """
        return verify_checksums(self.files, self.labels.raw)

    def _get_layout(self, name: str) -> LinearLayout:
        if name not in self.linears:
            raise CheckpointError(
                f"Checkpoint {self.folder} has no quantized module {name}; it has "
                f"{len(self.linears)} others, such as {next(iter(self.linears))}."
            )
        return self.linears[name]

    def _load(self, name: str, suffixes: list[str]) -> dict[str, Tensor]:
        tensors = self.files.load([f"{name}.{suffix}" for suffix in suffixes])
        return {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes}

    def _make_info(self, name: str, tensors: Mapping[str, Tensor]) -> LinearInfo:
        """Validate a linear's groups and zeros against its layout and the config."""
        layout = self.linears[name]
        trivial = True
        if "g_idx" in tensors:
            size = infer_group_size(name, tensors["g_idx"], layout.num_groups)
            # Shapes and config may be ambiguous for a ragged layer, but only for some sizes.
            if size != layout.group_size and layout.in_features % size and size.bit_count() != 1:
                raise CheckpointError(
                    f"{name}.g_idx divides {layout.in_features} columns into groups of {size}; "
                    f"according to the config and the shapes they have {layout.group_size}. The "
                    "file is damaged; download or quantize it again."
                )
            layout = replace(layout, group_size=size)
            trivial = torch.equal(tensors["g_idx"].to(torch.int32), make_trivial_g_idx(layout))
        zeros = detect_zero_dialect(
            name,
            tensors["qzeros"],
            layout.bits,
            declared_offset=self.labels.zero_offset,
            declared_symmetric=_find_label(self.labels, name, "sym", self.labels.symmetric),
        )
        if not zeros.is_symmetric and "checkpoint_format" in self.labels.disagreements:
            raise CheckpointError(
                f"Cannot determine how {name}.qzeros is stored: "
                f"{self.labels.disagreements['checkpoint_format']}, and asymmetric zeros fit both. "
                "Correct the wrong file."
            )
        return LinearInfo(layout=layout, zeros=zeros, has_trivial_groups=trivial)


def open_checkpoint(folder: str | Path, weights_file: str | None = None) -> Checkpoint:
    """Open a GPTQ checkpoint: find its files, read headers and config, validate every shape.

    Args:
        folder: Folder of the safetensors files and usually ``config.json``.
        weights_file: As in :meth:`TensorFiles.open`.

    Returns:
        The checkpoint; tensors are read on demand.

    Raises:
        CheckpointError: It is not a GPTQ checkpoint, is of an unsupported dialect, or a file is
            missing or damaged; names the tensor.
    """
    folder = Path(folder)
    files = TensorFiles.open(folder, weights_file)
    labels = read_labels(folder)
    shapes = _collect_shapes(files)
    if not shapes:
        raise CheckpointError(
            f"{folder} has no quantized linear among its {len(files.infos)} tensors (no .qweight). "
            f"It is an unquantized model. Quantize it with: halfbyte quantize {folder} -o OUT"
        )
    linears = {
        module: infer_linear_layout(
            module, found, _find_label(labels, module, "group_size", labels.group_size)
        )
        for module, found in shapes.items()
    }
    _check_order(labels, linears)
    notes = (*labels.notes, *_compare_bits(labels, linears))
    return Checkpoint(
        folder=folder,
        files=files,
        labels=labels,
        linears=MappingProxyType(linears),
        notes=notes,
    )


def _collect_shapes(files: TensorFiles) -> dict[str, dict[str, tuple[int, ...]]]:
    """Collect the shapes of each quantized module; reject unexpected types and tensors."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in files.infos.items():
        module, _, suffix = name.rpartition(".")
        is_packed = f"{module}.qweight" in files.infos
        if suffix not in (LINEAR_SUFFIXES if is_packed else QUANTIZED_SUFFIXES):
            if is_packed:
                raise _make_unknown_tensor_error(files, module, suffix)
            continue
        if info.dtype not in ALLOWED_DTYPES[suffix]:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in ALLOWED_DTYPES[suffix])
            raise CheckpointError(
                f"{name} has the element type {str(info.dtype).removeprefix('torch.')}; allowed "
                f"are {allowed}. The file is damaged or not in GPTQ format."
            )
        shapes.setdefault(module, {})[suffix] = info.shape
    return shapes


def _make_unknown_tensor_error(files: TensorFiles, module: str, suffix: str) -> CheckpointError:
    what = (
        f"there is also {module}.qweight, and it is unclear which of the two is valid"
        if suffix == "weight"
        else f"a GPTQ linear has {', '.join(LINEAR_SUFFIXES)}, but no '{suffix}'"
    )
    return CheckpointError(
        f"Cannot read {module}.{suffix} of {files.folder}: {what}. The file is damaged, or its "
        "format is not supported; download it again, or remove the tensor."
    )


def _find_label(labels: QuantizationLabels, module: str, key: str, default: Any) -> Any:
    """Return the label of one module; an override of the wrong type is ignored."""
    value = (resolve_dynamic(labels.dynamic, module) or {}).get(key, default)
    return value if type(value) is _LABEL_TYPES[key] else default


def _check_order(labels: QuantizationLabels, linears: Mapping[str, LinearLayout]) -> None:
    """Reject act-order without the tensor that contains the order."""
    for module, layout in linears.items():
        if labels.desc_act and not layout.has_g_idx and layout.num_groups > 1:
            raise CheckpointError(
                f"Checkpoint has no {module}.g_idx, but {labels.source} says desc_act: true: the "
                f"order of its {layout.num_groups} groups is unknown. The file is incomplete; "
                "download it again, or correct desc_act."
            )


def _compare_bits(labels: QuantizationLabels, linears: Mapping[str, LinearLayout]) -> list[str]:
    """Note linears with other bits than the config says; reject a config that fits none."""
    if labels.bits is None:
        return []
    differing = [
        module
        for module, layout in linears.items()
        if _find_label(labels, module, "bits", labels.bits) != layout.bits
    ]
    if not differing:
        return []
    first = differing[0]
    if len(differing) == len(linears):
        raise CheckpointError(
            f"{labels.source} says {labels.bits} bits, but {first}.qzeros and all other linears "
            f"have a different width ({first}: {linears[first].bits} bits). The config or the "
            "tensors belong to another model; download both again."
        )
    return [
        f"{len(differing)} of {len(linears)} linears have other bits than {labels.source} says "
        f"({first}: {linears[first].bits}). The shapes are used."
    ]
