"""Read and write GGUF files; the header is validated before any tensor is read.

::

    4 bytes "GGUF", u32 version, u64 number of tensors, u64 number of pairs
    pairs    string key, u32 type, value            strings: u64 length, UTF-8
    tensors  string name, u32 dimensions, u64 each (innermost first), u32 type, u64 offset
    padding to the alignment, then the data, each tensor at a multiple of the alignment

Source:
    ggml ``docs/gguf.md``; block sizes: ``ggml-common.h``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.errors import CheckpointError

MAGIC = b"GGUF"
VERSION = 3
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """A tensor type of GGUF."""

    name: str
    number: int
    block: int
    """Number of weights per block."""
    num_bytes: int
    """Size of a block. Unit: bytes."""

    def count_bytes(self, shape: Sequence[int]) -> int:
        """Return the size of a tensor of this type. Unit: bytes."""
        return math.prod(shape) // self.block * self.num_bytes


F32 = BlockType(name="F32", number=0, block=1, num_bytes=4)
F16 = BlockType(name="F16", number=1, block=1, num_bytes=2)
Q4_0 = BlockType(name="Q4_0", number=2, block=32, num_bytes=18)
Q4_1 = BlockType(name="Q4_1", number=3, block=32, num_bytes=20)
Q8_0 = BlockType(name="Q8_0", number=8, block=32, num_bytes=34)
Q6_K = BlockType(name="Q6_K", number=14, block=256, num_bytes=210)
BF16 = BlockType(name="BF16", number=30, block=1, num_bytes=2)
TYPES: Mapping[int, BlockType] = {
    kind.number: kind for kind in (F32, F16, Q4_0, Q4_1, Q8_0, Q6_K, BF16)
}

_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _I32, _FLOAT, _BOOL = 4, 5, 6, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of a GGUF file, as described in its header."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch."""
    offset: int
    """First byte, from the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Size of its data. Unit: bytes."""
        return self.kind.count_bytes(self.shape)

    def part(self, number: int) -> GgufTensor:
        """Return one slice along the outermost dimension, such as one expert."""
        one = replace(self, shape=self.shape[1:])
        return replace(one, offset=self.offset + number * one.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """An open GGUF file: the header is validated, no tensor is in memory."""

    path: Path
    pairs: Mapping[str, Any]
    """The metadata."""
    tensors: Mapping[str, GgufTensor]

    def load(self, name: str) -> Tensor:
        """Read one tensor's bytes.

        Args:
            name: The tensor.

        Returns:
            uint8 [bytes].

        Raises:
            CheckpointError: The file has no such tensor, changed, or cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} has no tensor {name}. It is incomplete; download it again."
            )
        return self.read(self.tensors[name])

    def read(self, info: GgufTensor) -> Tensor:
        """Read the bytes of a tensor, or of a slice of one.

        Args:
            info: From :attr:`tensors`, or :meth:`GgufTensor.part` of one.

        Returns:
            uint8 [bytes].

        Raises:
            CheckpointError: The file changed, or cannot be read.
        """
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        view, position = data.numpy().data, 0
        try:
            with self.path.open("rb", buffering=0) as handle:
                handle.seek(info.offset)
                while position < len(view):
                    count = handle.readinto(view[position:])
                    if not count:
                        raise CheckpointError(
                            f"Cannot read {info.name} of {self.path}: it ends after {position} of "
                            f"{len(view)} bytes. The file changed while it was open."
                        )
                    position += count
        except OSError as error:
            raise CheckpointError(f"Cannot read {self.path}: {error.strerror or error}.") from error
        return data


class _Cursor:
    """Reads a header sequentially; checks every length against the remaining bytes."""

    def __init__(self, path: Path, handle: BinaryIO) -> None:
        self.path, self.handle, self.position = path, handle, 0
        self.file_bytes = handle.seek(0, 2)
        handle.seek(0)

    @property
    def remaining(self) -> int:
        """Maximum size of the rest of the header. Unit: bytes."""
        return min(self.file_bytes, MAX_HEADER_BYTES) - self.position

    def make_error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"Cannot read {self.path}: {what}. The file is truncated or damaged; download it again."
        )

    def read_bytes(self, count: int) -> bytes:
        data = self.handle.read(count) if count <= self.remaining else b""
        if len(data) < count:
            raise self.make_error(
                f"its header needs {count} more bytes at byte {self.position}, past the end of the "
                f"file ({self.file_bytes} bytes)"
            )
        self.position += count
        return data

    def read_number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.read_bytes(struct.calcsize(f"<{code}")))[0]

    def read_count(self, what: str, min_bytes: int) -> int:
        """Read the number of items that follow, each of at least ``min_bytes`` bytes."""
        count = int(self.read_number("Q"))
        if count * min_bytes > self.remaining:
            raise self.make_error(f"it declares {count} {what} with {self.remaining} bytes left")
        return count

    def read_text(self) -> str:
        raw = self.read_bytes(self.read_count("characters", 1))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.make_error(f"a string before byte {self.position} is not UTF-8") from error

    def read_value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.read_number(_SCALARS[kind])
        if kind == _STRING:
            return self.read_text()
        if kind != _ARRAY:
            raise self.make_error(f"byte {self.position} declares a value of unknown type {kind}")
        inner = int(self.read_number("I"))
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            count = self.read_count("values", size)
            data = self.read_bytes(count * size)
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", data))
        if inner != _STRING:
            raise self.make_error(f"byte {self.position} declares an array of unknown type {inner}")
        return [self.read_text() for _ in range(self.read_count("strings", 8))]


def open_gguf(path: Path) -> GgufFile:
    """Read and validate the header of a GGUF file; the data is not read.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        CheckpointError: The file cannot be read, is truncated, or its header is invalid.
    """
    try:
        with path.open("rb") as handle:
            return _read_header(_Cursor(path, handle))
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror or error}. Check the path and its permissions."
        ) from error


def _read_header(cursor: _Cursor) -> GgufFile:
    if cursor.remaining < len(MAGIC) or cursor.read_bytes(len(MAGIC)) != MAGIC:
        raise cursor.make_error("it does not begin with 'GGUF'")
    version = cursor.read_number("I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"Cannot read {cursor.path}: it is GGUF version {version}; versions {VERSIONS} in "
            "little-endian order are supported. Convert it again with a current llama.cpp."
        )
    num_tensors = cursor.read_count("tensors", 24)
    num_pairs = cursor.read_count("pairs", 13)
    pairs = _read_pairs(cursor, num_pairs)
    return GgufFile(path=cursor.path, pairs=pairs, tensors=_read_table(cursor, num_tensors, pairs))


def _read_pairs(cursor: _Cursor, number: int) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for _ in range(number):
        key = cursor.read_text()
        if key in pairs:
            raise cursor.make_error(f"the key '{key[:80]}' is duplicated")
        try:
            pairs[key] = cursor.read_value(int(cursor.read_number("I")))
        except struct.error as error:
            raise cursor.make_error(f"the value of '{key[:80]}' is invalid") from error
    return pairs


def _read_table(cursor: _Cursor, number: int, pairs: Mapping[str, Any]) -> dict[str, GgufTensor]:
    alignment = pairs.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment % 8:
        raise cursor.make_error(f"its alignment is {str(alignment)[:40]}")
    raw = []
    for _ in range(number):
        name, dimensions = cursor.read_text(), int(cursor.read_number("I"))
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise cursor.make_error(f"tensor {name[:80]} has {dimensions} dimensions")
        shape = tuple(int(cursor.read_number("Q")) for _ in range(dimensions))[::-1]
        raw.append((name, shape, int(cursor.read_number("I")), int(cursor.read_number("Q"))))
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    position = start
    for name, shape, kind, offset in sorted(raw, key=lambda entry: entry[3]):
        info = _check_tensor(cursor, name, shape, kind, start + offset)
        if name in tensors:
            raise cursor.make_error(f"tensor {name[:80]} is duplicated")
        if info.offset != position:
            raise cursor.make_error(
                f"tensor {name[:80]} starts at byte {info.offset}, {position} was expected"
            )
        if info.offset + info.num_bytes > cursor.file_bytes:
            raise cursor.make_error(
                f"tensor {name[:80]} ends at byte {info.offset + info.num_bytes} of "
                f"{cursor.file_bytes}"
            )
        position = start + -(-(offset + info.num_bytes) // alignment) * alignment
        tensors[name] = info
    if tensors and cursor.file_bytes > position:
        raise cursor.make_error(f"its tensors end at byte {position} of {cursor.file_bytes}")
    return {name: tensors[name] for name, *_ in raw}


def _check_tensor(
    cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GgufTensor:
    if kind not in TYPES:
        known = ", ".join(found.name for found in TYPES.values())
        raise CheckpointError(
            f"Cannot read {cursor.path}: tensor {name[:80]} has GGUF type {kind}; the "
            f"supported types are {known}. Convert it to one of them first, for example with "
            "llama-quantize."
        )
    count = 1
    for size in shape:
        count *= size
        if count > 2**48 or size == 0:
            raise cursor.make_error(f"tensor {name[:80]} has the shape {str(shape)[:80]}")
    if shape[-1] % TYPES[kind].block:
        raise cursor.make_error(
            f"tensor {name[:80]} has rows of {shape[-1]}, not a multiple of {TYPES[kind].block}"
        )
    return GgufTensor(name=name, kind=TYPES[kind], shape=shape, offset=offset)


def write_gguf_file(
    path: Path,
    pairs: Mapping[str, Any],
    table: Sequence[tuple[str, BlockType, tuple[int, ...]]],
    data: Iterable[Tensor],
) -> int:
    """Write a GGUF file atomically from an iterable of tensors.

    Args:
        path: The file; its folder must exist.
        pairs: Metadata: strings, integers, floats, bools, and lists of one of these.
        table: Name, type and shape (outermost dimension first) of each tensor, in order.
        data: Bytes of each tensor, uint8, in the same order, in one or more pieces.

    Returns:
        Size of the file. Unit: bytes.

    Raises:
        CheckpointError: A tensor does not have the size given in the table, or the disk is full.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(table), len(pairs)))
    for key, value in pairs.items():
        header += _pack_text(key) + _pack_value(value)
    offset = 0
    for name, kind, shape in table:
        header += _pack_text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        header += struct.pack("<IQ", kind.number, offset)
        size = kind.count_bytes(shape)
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    header += bytes(-len(header) % ALIGNMENT)

    def chunks() -> Iterator[bytes | memoryview]:
        yield bytes(header)
        pieces = iter(data)
        for name, kind, shape in table:
            size = kind.count_bytes(shape)
            written = 0
            while written < size and (piece := next(pieces, None)) is not None:
                written += piece.numel()
                if written <= size:
                    yield piece.contiguous().flatten().numpy().data
            if written != size:
                raise CheckpointError(
                    f"Cannot write {path}: got {written} bytes for tensor {name}, but expected "
                    f"{size}."
                )
            yield bytes(-size % ALIGNMENT)
        assert next(pieces, None) is None

    write_atomically(path, chunks(), bypass_cache=True)
    return len(header) + offset


def _pack_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _pack_value(value: Any) -> bytes:
    if isinstance(value, list):
        first = value[0]
        if isinstance(first, str):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(
                _pack_text(text) for text in value
            )
        kind = _find_kind(first, inside=True)
        packed = struct.pack(f"<{len(value)}{_SCALARS[kind]}", *value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + packed
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _pack_text(value)
    kind = _find_kind(value)
    return struct.pack(f"<I{_SCALARS[kind]}", kind, value)


def _find_kind(value: object, *, inside: bool = False) -> int:
    """Return the type of a value: integers are u32, or i32 in lists, as llama.cpp expects."""
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _I32 if inside else _U32
    return _FLOAT
