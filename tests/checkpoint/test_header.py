from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.checkpoint.header import DTYPES, read_header
from halfbyte.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(folder: Path, header: Any, data_bytes: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return file


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        name: torch.zeros(3, 2).to(dtype)
        for name, dtype in DTYPES.items()
        if not name.startswith("F8")
    }
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "x.safetensors")
    assert set(infos) == set(tensors)
    for name, tensor in tensors.items():
        info = infos[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert info.num_bytes == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "JSON list; an object is needed"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        ({"__metadata__": {"n": 1}, "t": ENTRY}, "__metadata__ is not a map of strings"),
        ({"t": 3}, "tensor t does not have exactly the keys dtype, shape and data_offsets"),
        ({"t": ENTRY | {"extra": 1}}, "tensor t does not have exactly the keys"),
        ({"t": ENTRY | {"dtype": "F33"}}, "tensor t has the element type 'F33'; allowed are BOOL"),
        ({"t": ENTRY | {"dtype": ["F32"]}}, r"element type \['F32'\]"),
        ({"t": ENTRY | {"shape": [2, -3]}}, r"tensor t has the shape \[2, -3\], not a list"),
        ({"t": ENTRY | {"shape": [2, True]}}, r"shape \[2, True\]"),
        ({"t": ENTRY | {"shape": 6}}, "tensor t has the shape 6"),
        ({"t": ENTRY | {"data_offsets": [24, 0]}}, r"data offsets \[24, 0\], not \[begin, end\]"),
        ({"t": ENTRY | {"data_offsets": [0, 12, 24]}}, r"data offsets \[0, 12, 24\]"),
        ({"t": ENTRY | {"shape": [2, 4]}}, r"\[2, 4\] of F32, which is 32 bytes, but 24 bytes"),
        (
            {"a": ENTRY, "b": ENTRY},
            "tensor b starts at byte [0-9]+, overlaps the tensor before it; [0-9]+ was expected",
        ),
        (
            {"a": ENTRY | {"shape": [1], "data_offsets": [20, 24]}},
            "tensor a starts at byte [0-9]+, follows a gap",
        ),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [24, 48]}}, "tensor b ends at byte [0-9]+"),
        ({"t": ENTRY | {"shape": [], "data_offsets": [0, 4]}}, "its tensors end at byte"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(write(tmp_path, header))
    assert "x.safetensors" in str(caught.value)


def test_shapes_beyond_all_memory_are_refused_at_once(tmp_path):
    huge = ENTRY | {"shape": [10**4000, 10**4000]}
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(write(tmp_path, {"t": huge}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes, too few"),
        (b"12345678", "it has 8 bytes, too few"),
        (b"version https://git-lfs.github.com/spec/v1\n", "header of [0-9]+ bytes in a file of 43"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header of 9223372036854775808 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes in a file of 10"),
    ],
)
def test_files_that_are_no_safetensors_are_refused(tmp_path, content, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"Cannot read .*x\.safetensors: No such file"):
        read_header(tmp_path / "x.safetensors")
