"""Read and validate the header of a safetensors file, without reading the data.

::

    8 bytes   length of the header, little-endian
    n bytes   JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest  data; the tensors tile it without gap or overlap

Source:
    The safetensors format description, https://github.com/huggingface/safetensors (README,
    "Format"); the 100 MB limit on the header is that library's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_SIZE = 2**48
MAX_DIMENSIONS = 32
LENGTH_BYTES = 8

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The element types of safetensors that are whole bytes and exist in torch, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a safetensors file, as its header describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    """First byte, from the start of the file."""
    num_bytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and validate the header of a safetensors file; the data is not read.

    Args:
        file: An existing file.

    Returns:
        Its tensors by name, in the order of their data.

    Raises:
        CheckpointError: The file cannot be read, is truncated, or its header is invalid; names the
            file and the tensor.
    """
    entries, _, data_start, file_bytes = _read_entries(file)
    infos = [_read_entry(file, name, entry, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.num_bytes))
    _check_tiling(file, infos, data_start, file_bytes)
    return {info.name: info for info in infos}


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Args:
        file: An existing file.

    Returns:
        The strings of ``__metadata__`` by key.

    Raises:
        CheckpointError: The file cannot be read or its header is damaged.
    """
    return _read_entries(file)[1]


def _read_entries(file: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """Return the tensors' entries, the metadata, the offset of the data and the file size."""
    try:
        with file.open("rb") as handle:
            file_bytes = handle.seek(0, 2)
            handle.seek(0)
            header_bytes = int.from_bytes(handle.read(LENGTH_BYTES), "little")
            _check_header_length(file, file_bytes, header_bytes)
            text = handle.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {file}: {error.strerror or error}. Check the path and its permissions."
        ) from error
    entries = parse_json_object(text, f"the header of {file}")
    metadata = entries.pop("__metadata__", None)
    _check_metadata(file, metadata)
    return entries, metadata or {}, LENGTH_BYTES + header_bytes, file_bytes


def parse_json_object(text: bytes | str, what: str) -> dict[str, Any]:
    """Parse JSON that must be one object without duplicate keys.

    Args:
        text: The JSON.
        what: Name of the text in messages, such as "the header of x.safetensors".

    Returns:
        The object.

    Raises:
        CheckpointError: It is not JSON, not an object, or has a duplicate key.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {what}: it is not valid JSON ({str(error) or 'nested too deeply'}). "
            "The file is damaged; download or write it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"Cannot read {what}: it is a JSON {type(value).__name__}; an object is needed. "
            "The file is damaged; download or write it again."
        )
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"duplicate key '{key}'")
        values[key] = value
    return values


def _check_header_length(file: Path, file_bytes: int, header_bytes: int) -> None:
    if file_bytes < LENGTH_BYTES + 2:
        raise CheckpointError(
            f"Cannot read {file}: it has {file_bytes} bytes, too few for a safetensors file. "
            "The download is incomplete, or it is a Git LFS pointer; download it again."
        )
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise CheckpointError(
            f"Cannot read {file}: it declares a header of {header_bytes} bytes in a file of "
            f"{file_bytes}. It is truncated or not a safetensors file (a Git LFS pointer, an error "
            "page); download it again."
        )


def _check_metadata(file: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"Cannot read {file}: its __metadata__ is not a map of strings. "
            "The file is damaged; download or write it again."
        )


def _read_entry(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    """Validate one tensor's entry: its keys, dtype, shape and size."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _make_error(
            file, name, "does not have exactly the keys dtype, shape and data_offsets"
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"Cannot read {file}: tensor {name} has the element type {_shorten(entry['dtype'])}; "
            f"allowed are {', '.join(DTYPES)}. Convert the checkpoint, or download it again."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise _make_error(file, name, f"has the shape {_shorten(shape)}, not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _make_error(file, name, f"has the data offsets {_shorten(offsets)}, not [begin, end]")
    num_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise _make_error(
            file,
            name,
            f"has shape {_shorten(shape)} of {entry['dtype']}, which is {num_bytes} bytes, "
            f"but {offsets[1] - offsets[0]} bytes of data",
        )
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=file,
        offset=data_start + offsets[0],
        num_bytes=num_bytes,
    )


def _check_tiling(file: Path, infos: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """Check that the tensors cover the data exactly, without gaps or overlaps."""
    position = data_start
    for info in infos:
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "follows a gap"
            raise _make_error(
                file, info.name, f"starts at byte {info.offset}, {kind}; {position} was expected"
            )
        position += info.num_bytes
        if position > file_bytes:
            raise CheckpointError(
                f"Cannot read {file}: tensor {info.name} ends at byte {position}, but the file has "
                f"{file_bytes} bytes. The download is incomplete; download it again."
            )
    if position != file_bytes:
        raise CheckpointError(
            f"Cannot read {file}: its tensors end at byte {position}, but the file has "
            f"{file_bytes} bytes. The file is damaged; download or write it again."
        )


def _are_sizes(value: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python. The upper bounds keep the
    # product of a forged shape small enough to compute and to print.
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)
    )


def _make_error(file: Path, name: str, finding: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot read {file}: tensor {name} {finding}. "
        "The header is damaged; download or write the file again."
    )


def _shorten(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long for Python to print
        return "of absurd size"
    return text if len(text) <= 80 else text[:77] + "..."
