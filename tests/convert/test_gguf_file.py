from __future__ import annotations

import struct
import tracemalloc

import pytest
import torch

from halfbyte.convert.gguf_file import F16, F32, Q4_0, open_gguf, write_gguf_file

PAIRS = {
    "general.architecture": "llama",
    "a.count": 7,
    "a.rate": 0.5,
    "a.flag": True,
    "a.texts": ["x", "", "zwei"],
    "a.numbers": [1, -2],
    "a.floats": [0.25],
}
TABLE = [("one", F32, (3,)), ("two", Q4_0, (2, 64)), ("three", F16, (2, 2))]
DATA = [torch.arange(size, dtype=torch.uint8) for size in (12, 72, 8)]


def write(path):
    write_gguf_file(path, PAIRS, TABLE, DATA)
    return path


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path / "x.gguf")
    file = open_gguf(path)
    assert dict(file.pairs) == PAIRS
    assert [(t.name, t.kind, t.shape) for t in file.tensors.values()] == TABLE
    for (name, *_), data in zip(TABLE, DATA, strict=True):
        assert torch.equal(file.load(name), data)
        assert file.tensors[name].offset % 32 == 0


def test_the_gguf_package_reads_the_same(tmp_path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(write(tmp_path / "x.gguf"))
    found = {key: field.contents() for key, field in reader.fields.items() if key in PAIRS}
    assert found == PAIRS
    assert [tensor.name for tensor in reader.tensors] == ["one", "two", "three"]
    assert reader.tensors[1].data.tobytes() == bytes(DATA[1].tolist())


def test_files_of_the_gguf_package_are_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint64("a.long", 2**40)
    writer.add_int8("a.small", -3)
    writer.add_array("a.texts", ["x", "y"])
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    writer.add_tensor("t", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x.gguf")
    assert file.pairs["a.long"] == 2**40
    assert file.pairs["a.small"] == -3
    assert file.pairs["a.texts"] == ["x", "y"]
    assert torch.equal(file.load("t").view(torch.float32).view(2, 3), values)


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (0, b"GGML", "does not begin with 'GGUF'"),
        (4, struct.pack("<I", 1), "GGUF version 1; versions"),
        (4, struct.pack(">I", 3), "GGUF version 50331648"),
        (8, struct.pack("<Q", 2**60), "1152921504606846976 tensors with"),
        (16, struct.pack("<Q", 2**40), "1099511627776 pairs with"),
        (24, struct.pack("<Q", 2**63), "9223372036854775808 characters with"),
        (24 + 8, b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, place, new, message):
    path = write(tmp_path / "x.gguf")
    content = bytearray(path.read_bytes())
    content[place : place + len(new)] = new
    path.write_bytes(content)
    with pytest.raises(Exception, match=message) as error:
        open_gguf(path)
    assert type(error.value).__name__ == "CheckpointError"


@pytest.mark.parametrize("kept", [0, 3, 10, 100, -25, -33])
def test_cut_files_are_refused(tmp_path, kept):
    path = write(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(Exception, match="truncated or damaged") as error:
        open_gguf(path)
    assert type(error.value).__name__ == "CheckpointError"


def test_other_types_are_named_by_number(tmp_path):
    path = write(tmp_path / "x.gguf")
    content = path.read_bytes()
    entry = b"two" + struct.pack("<I", 2) + struct.pack("<QQ", 64, 2)
    place = content.index(entry) + len(entry)
    path.write_bytes(content[:place] + struct.pack("<I", 12) + content[place + 4 :])
    with pytest.raises(Exception, match="tensor two has GGUF type 12; the supported types are F32"):
        open_gguf(path)


def test_a_tensor_of_another_size_is_not_written(tmp_path):
    with pytest.raises(Exception, match="got 13 bytes for tensor one, but expected 12"):
        write_gguf_file(tmp_path / "x.gguf", PAIRS, TABLE, [torch.zeros(13, dtype=torch.uint8)])
    assert not (tmp_path / "x.gguf").exists()


def test_only_the_header_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf_file(path, {}, [("one", F16, (4096, 4096))], [torch.zeros(2**25, dtype=torch.uint8)])
    tracemalloc.start()
    open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
