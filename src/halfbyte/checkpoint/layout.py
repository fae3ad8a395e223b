"""The GPTQ format: tensor names, shapes, dialects and config keys.

::

    <module>.qweight  int32  [in * bits / 32, out]      codes, packed along in
    <module>.qzeros   int32  [groups, out * bits / 32]  zero points, packed along out
    <module>.scales   fp16   [groups, out]
    <module>.g_idx    int32  [in]                       group of each input column
    <module>.bias     float  [out]                      where the layer has one
    <module>.offsets  fp32   [groups, out]              halfbyte's extension; see below

    weight[o, i] = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o]) + offsets[g_idx[i], o]

Two dialects differ in what ``qzeros`` stores: v1 (``checkpoint_format: "gptq"``) stores zero - 1,
v2 (``"gptq_v2"``) stores zero. Some files declare one and contain the other.

Offsets hold the part of a merged adapter that is constant within each group, like a zero point that
is not an integer. Other programs do not know them, and most would silently ignore them, so a
checkpoint with offsets declares the method "halfbyte", which the others reject.

Source:
    AutoGPTQ ``qlinear`` modules and GPTQModel 7 ``looper`` / ``utils``; mislabelled files: vLLM
    issue 38966.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from halfbyte.errors import CheckpointError
from halfbyte.quant_config import SUPPORTED_BITS

QUANTIZED_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of every quantized linear; some also have ``bias``."""

OFFSETS = "offsets"
LINEAR_SUFFIXES = (*QUANTIZED_SUFFIXES, "bias", OFFSETS)

METHOD = "gptq"
OWN_METHOD = "halfbyte"
METHODS = (METHOD, OWN_METHOD)
"""Supported values of ``quant_method``; the second is the first plus offsets."""

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
"""Separate files that may contain the quantization config, newest name first."""

FORMAT_V1 = "gptq"
FORMAT_V2 = "gptq_v2"
ZERO_OFFSETS = {FORMAT_V1: 1, FORMAT_V2: 0}

CONFIG_ALIASES = {
    "w_bit": "bits",
    "q_group_size": "group_size",
    "format": "checkpoint_format",
    "method": "quant_method",
}
"""Names of the same keys in older versions or other tools."""

PACK_MULTIPLE = 32
"""Both dimensions of a linear must be a multiple of this for every consumer to load it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayout:
    """Sizes of one quantized linear, inferred from its tensors on disk."""

    bits: int
    in_features: int
    out_features: int
    num_groups: int
    group_size: int
    """Nominal: the last group is smaller if this does not divide ``in_features``."""
    has_g_idx: bool
    has_bias: bool
    has_offsets: bool = False

    @property
    def is_ragged(self) -> bool:
        """Whether the last group is smaller than the others."""
        return self.in_features % self.group_size != 0


def infer_linear_layout(
    module: str, shapes: Mapping[str, tuple[int, ...]], declared_group_size: int | None
) -> LinearLayout:
    """Infer one linear's sizes from the shapes of its tensors; the config only breaks ties.

    The bits follow from the shapes of ``qzeros`` ([groups, out * bits / 32]) and ``scales``
    ([groups, out]), so mixed-precision checkpoints need no rules.

    Args:
        module: Full dotted module name; used in messages.
        shapes: Tensor shapes by suffix ("qweight", "qzeros", "scales", maybe "g_idx", "bias").
        declared_group_size: From the config; None if unknown, -1 for one group per row.

    Returns:
        The layout; all shapes are consistent.

    Raises:
        CheckpointError: A tensor is missing, or the shapes are inconsistent; names the tensor.
    """
    _check_matrices(module, shapes)
    word_rows, out_features = shapes["qweight"]
    num_groups, scale_columns = shapes["scales"]
    zero_rows, zero_columns = shapes["qzeros"]
    if scale_columns != out_features:
        raise CheckpointError(
            f"{module}.scales has {scale_columns} columns, but {module}.qweight has {out_features}."
        )
    if zero_rows != num_groups:
        raise CheckpointError(
            f"{module}.qzeros has {zero_rows} groups, but {module}.scales has {num_groups}."
        )
    bits = zero_columns * 32 // out_features
    if bits not in SUPPORTED_BITS or zero_columns * 32 != bits * out_features:
        raise CheckpointError(
            f"{module}.qzeros has {zero_columns} columns for {out_features} outputs, which is "
            f"{zero_columns * 32 / out_features:g} bits; allowed are {SUPPORTED_BITS}."
        )
    in_features, remainder = divmod(word_rows * 32, bits)
    if remainder or in_features < num_groups:
        raise CheckpointError(
            f"{module}.qweight has {word_rows} rows, which is not a whole number of {bits}-bit "
            f"inputs for {num_groups} groups."
        )
    optional = {
        "g_idx": (in_features,),
        "bias": (out_features,),
        OFFSETS: (num_groups, out_features),
    }
    for suffix, expected in optional.items():
        if suffix in shapes and tuple(shapes[suffix]) != expected:
            raise CheckpointError(
                f"{module}.{suffix} has shape {list(shapes[suffix])}; {list(expected)} is needed."
            )
    return LinearLayout(
        bits=bits,
        in_features=in_features,
        out_features=out_features,
        num_groups=num_groups,
        group_size=_infer_group_size(module, in_features, num_groups, declared_group_size),
        has_g_idx="g_idx" in shapes,
        has_bias="bias" in shapes,
        has_offsets=OFFSETS in shapes,
    )


def _check_matrices(module: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for suffix in ("qweight", "qzeros", "scales"):
        if suffix not in shapes:
            raise CheckpointError(
                f"Checkpoint has no {module}.{suffix}, only the layer's other tensors "
                f"({', '.join(sorted(shapes))}). It is incomplete; download or quantize it again."
            )
        if len(shapes[suffix]) != 2 or 0 in shapes[suffix]:
            raise CheckpointError(
                f"{module}.{suffix} has shape {list(shapes[suffix])}; a matrix is needed."
            )


def _infer_group_size(module: str, in_features: int, num_groups: int, declared: int | None) -> int:
    """Use the declared size if it gives this many groups; otherwise, find one that does."""
    if declared and declared > 0 and -(-in_features // declared) == num_groups:
        return declared
    if in_features % num_groups == 0:
        return in_features // num_groups
    # A ragged last group under a power-of-two size, as GPTQModel writes it.
    size = 1
    while -(-in_features // size) > num_groups:
        size *= 2
    if -(-in_features // size) == num_groups:
        return size
    raise CheckpointError(
        f"{module}.scales has {num_groups} groups for {in_features} inputs; no group size gives "
        f"that number, and the config declares {declared}."
    )
