"""Write a GPTQ checkpoint for all consumers: dialect v1, both config files, checksums.

::

    pack_linear(codes, zeros, scales) -> tensors -> write_shard -> ShardDigest
    build_quantization_config         -> one dict -> write_configs
    ShardDigests                      -> write_index, write_checksums

Files are written atomically, and the output is deterministic.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.checkpoint.checksums import TENSOR_DIGITS, ShardDigest
from halfbyte.checkpoint.dynamic import Rule, build_dynamic
from halfbyte.checkpoint.header import DTYPES
from halfbyte.checkpoint.labels import CONFIG_SECTION, MODEL_CONFIG
from halfbyte.checkpoint.layout import FORMAT_V1, ZERO_OFFSETS
from halfbyte.errors import CheckpointError
from halfbyte.packing import pack_weight, pack_zeros
from halfbyte.quant_config import QuantConfig, Scheme

INDEX_FILE = "model.safetensors.index.json"
LABEL_FILE = "quantize_config.json"

MAX_PENDING_DIGEST_BYTES = 32_000_000
"""Tensor data that may be in memory while it waits for its digest."""

_HEADER_ALIGNMENT = 8
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def shard_name(number: int, count: int) -> str:
    """Return Transformers' name for shard ``number`` (from 1) of ``count``."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def pack_linear(
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    *,
    bits: int,
    g_idx: Tensor,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """Pack one linear into the tensors of the v1 dialect.

    Args:
        codes: 0..2**bits-1, shape [out, in], in the order of the weight's columns.
        zeros: 1..2**bits-1, shape [out, groups].
        scales: float [out, groups]; rounded to fp16.
        bits: 2, 3, 4 or 8.
        g_idx: Group of each input column, shape [in]; written even if it is trivial.
        bias: float [out], or None.

    Returns:
        qweight, qzeros, scales, g_idx and maybe bias, contiguous, on the device of the codes.

    Raises:
        CheckpointError: Codes or zeros are out of range, a scale is not finite in fp16, or the
            shapes are inconsistent.
    """
    _check_parts(codes, zeros, scales, g_idx)
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise CheckpointError(
            f"Cannot pack a linear: {int((~torch.isfinite(half)).sum())} of {half.numel()} scales "
            f"are not finite in fp16 (largest {float(scales.abs().max()):g}; the limit is 65504)."
        )
    tensors = {
        "qweight": pack_weight(codes, bits),
        "qzeros": pack_zeros(zeros, bits, ZERO_OFFSETS[FORMAT_V1]),
        "scales": half.t(),
        "g_idx": g_idx.to(torch.int32),
    }
    if bias is not None:
        tensors["bias"] = bias
    return {suffix: tensor.detach().contiguous() for suffix, tensor in tensors.items()}


def _check_parts(codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> None:
    out_features, in_features = codes.shape
    if (
        zeros.shape != scales.shape
        or zeros.shape[0] != out_features
        or g_idx.shape != (in_features,)
    ):
        raise CheckpointError(
            f"Cannot pack a linear: codes {list(codes.shape)}, zeros {list(zeros.shape)}, scales "
            f"{list(scales.shape)} and g_idx {list(g_idx.shape)} do not fit each other."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data. Unit: bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def spec_of(tensor: Tensor) -> TensorSpec:
    """Return the type and shape of a tensor."""
    return TensorSpec(dtype=tensor.dtype, shape=tuple(tensor.shape))


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> ShardDigest:
    """Write one safetensors file atomically.

    Args:
        path: The file; its folder must exist.
        tensors: By full name, on any device. The order does not matter.
        metadata: Strings for the header besides ``format: pt``, which Transformers requires.

    Returns:
        The digests for :func:`halfbyte.checkpoint.checksums.write_checksums`.

    Raises:
        CheckpointError: safetensors does not support the type of a tensor.
    """
    # Widest elements first, as in safetensors, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    specs = {name: spec_of(tensors[name]) for name in order}
    return stream_shard(path, specs, ((name, tensors[name]) for name in order), metadata)


def stream_shard(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    with_digests: bool = True,
    bypass_cache: bool = False,
) -> ShardDigest:
    """Write one safetensors file from an iterable of tensors.

    Args:
        path: The file; its folder must exist.
        specs: Types and shapes by full name, in the order of ``tensors``. Some programs need every
            tensor to start at a multiple of its element size: put odd sizes last.
        tensors: Names and tensors as in ``specs``, on any device. No reference is kept.
        metadata: Strings for the header besides ``format: pt``.
        with_digests: Whether to compute digests; otherwise they are empty.
        bypass_cache: See :func:`halfbyte.checkpoint.atomic.write_atomically`.

    Returns:
        The digests for :func:`halfbyte.checkpoint.checksums.write_checksums`.

    Raises:
        CheckpointError: A tensor differs from its spec, or safetensors does not support its type.
    """
    header = _make_header(specs, {"format": "pt", **(metadata or {})})
    file_digest = hashlib.sha256(header)
    digests: dict[str, str] = {}

    def digest_tensor(name: str, data: memoryview) -> None:
        digests[name] = hashlib.sha256(data).hexdigest()[:TENSOR_DIGITS]

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        # Digests are computed while this tensor is written and the next ones are produced. The file
        # digest has a thread of its own, so that it takes the tensors in order.
        pending: deque[tuple[int, list[Future[Any]]]] = deque()
        with ThreadPoolExecutor(1) as file_executor, ThreadPoolExecutor(1) as tensor_executor:
            for (name, tensor), expected in zip(tensors, specs, strict=True):
                if name != expected or spec_of(tensor) != specs[name]:
                    raise CheckpointError(
                        f"Cannot write {path}: got tensor {name} as {spec_of(tensor)}, but "
                        f"expected {expected} as {specs[expected]}."
                    )
                data = _view_bytes(tensor)
                digests[name] = ""
                if with_digests:
                    futures = [
                        file_executor.submit(file_digest.update, data),
                        tensor_executor.submit(digest_tensor, name, data),
                    ]
                    pending.append((len(data), futures))
                yield data
                # Limited by size, so that a linear's small tensors do not wait for its large one.
                while sum(size for size, _ in pending) > MAX_PENDING_DIGEST_BYTES:
                    for future in pending.popleft()[1]:
                        future.result()
            for _, futures in pending:
                for future in futures:
                    future.result()

    write_atomically(path, chunks(), bypass_cache=bypass_cache)
    tensor_bytes = sum(spec.num_bytes for spec in specs.values())
    return ShardDigest(
        file_name=path.name,
        sha256=file_digest.hexdigest() if with_digests else "",
        num_bytes=len(header) + tensor_bytes,
        tensor_bytes=tensor_bytes,
        tensors=digests,
    )


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write ``model.safetensors.index.json``.

    Args:
        folder: The checkpoint.
        weight_map: File name by tensor name.
        total_bytes: Size of all tensors, without headers.
    """
    content = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / INDEX_FILE, content)


def write_configs(
    folder: Path, model_config: Mapping[str, Any], quantization_config: Mapping[str, Any]
) -> None:
    """Write ``config.json`` and ``quantize_config.json`` with the same quantization config.

    Args:
        folder: The checkpoint.
        model_config: The base model's config; a quantization config in it is replaced.
        quantization_config: From :func:`build_quantization_config`.
    """
    section = dict(quantization_config)
    write_json(folder / MODEL_CONFIG, {**model_config, CONFIG_SECTION: section})
    write_json(folder / LABEL_FILE, section)


def build_quantization_config(
    config: QuantConfig,
    *,
    quantized: Mapping[str, Scheme],
    skipped: Mapping[str, str],
    module_groups: Sequence[Sequence[str]],
    version: str,
) -> dict[str, Any]:
    """Build the quantization config by which vLLM, GPTQModel and Transformers create modules.

    Args:
        config: The requested settings.
        quantized: Actual bits and group size of each linear, by full name on disk.
        skipped: Reason for each linear that stays in 16 bits, by full name.
        module_groups: Names inside a block ("self_attn.q_proj"), grouped by shared input, in
            execution order.
        version: Version of halfbyte.

    Returns:
        The dict for :func:`write_configs`.

    Raises:
        CheckpointError: Nothing is quantized, or a linear is both quantized and skipped.
    """
    _check_assignment(quantized, skipped)
    base = _choose_base(config, quantized)
    rules: dict[str, Rule] = {name: _list_settings(scheme) for name, scheme in quantized.items()}
    rules |= dict.fromkeys(skipped)
    groups, heads = _list_modules(quantized, module_groups)
    return {
        "bits": base.bits,
        "group_size": base.group_size,
        "desc_act": config.desc_act,
        "sym": base.symmetric,
        "quant_method": "gptq",
        "checkpoint_format": FORMAT_V1,
        "lm_head": bool(heads),
        "pack_dtype": "int32",
        "dynamic": build_dynamic(rules, dict(_list_settings(base))),
        "modules_in_block_to_quantize": [*groups, *([head] for head in heads)],
        "damp_percent": config.damping,
        "static_groups": not config.desc_act,
        "true_sequential": True,
        "meta": {"quantizer": [f"halfbyte:{version}"]},
    }


def _check_assignment(quantized: Mapping[str, Scheme], skipped: Mapping[str, str]) -> None:
    both = sorted(set(quantized) & set(skipped))
    if both or not quantized:
        found = f"{both[0]} is both quantized and skipped" if both else "no linear is quantized"
        raise CheckpointError(
            f"Cannot write the quantization config: {found}. Loosen the skip patterns, or choose a "
            "model whose layer sizes are multiples of 32."
        )


def _list_modules(
    quantized: Mapping[str, Scheme], module_groups: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[str]]:
    """Split the quantized linears into the groups inside blocks and the output heads.

    vLLM expects the heads in the same list, so the caller appends them.
    """
    groups = [
        kept
        for group in module_groups
        if (kept := [name for name in group if any(_has_suffix(q, name) for q in quantized)])
    ]
    names = [name for group in groups for name in group]
    heads = [q for q in quantized if not any(_has_suffix(q, name) for name in names)]
    return groups, heads


def _has_suffix(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _choose_base(config: QuantConfig, quantized: Mapping[str, Scheme]) -> Scheme:
    """Choose the requested settings if any linear has them, else the most frequent ones."""
    requested = Scheme(bits=config.bits, group_size=config.group_size, symmetric=config.symmetric)
    counts = Counter(quantized.values())
    return requested if requested in counts else counts.most_common(1)[0][0]


def _list_settings(scheme: Scheme) -> tuple[tuple[str, Any], ...]:
    """Return the settings of a linear by key, sorted."""
    return (
        ("bits", scheme.bits),
        ("group_size", scheme.group_size),
        ("sym", scheme.symmetric),
    )


def _make_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, spec in specs.items():
        if spec.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"Cannot write tensor {name}: safetensors does not support {spec.dtype}."
            )
        end = offset + spec.num_bytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _view_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, [text.encode()])
