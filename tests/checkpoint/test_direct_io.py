from __future__ import annotations

import errno
import fcntl
import os

import pytest

from halfbyte.checkpoint import direct_io
from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.errors import CheckpointError

BLOCK = 4096


def takes_direct(path):
    """Check whether the file system supports direct I/O."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 2 * BLOCK)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("size", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 99_999])
@pytest.mark.parametrize("chunk", [1, 700, 3 * BLOCK, 100_000])
def test_content_is_complete_for_any_sizes(tmp_path, size, chunk):
    if chunk == 1:
        size = min(size, 2 * BLOCK + 1)
    content = os.urandom(size)
    parts = [memoryview(content)[start : start + chunk] for start in range(0, size, chunk)]
    write_atomically(tmp_path / "x", [b"", *parts], bypass_cache=True)
    assert (tmp_path / "x").read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("small_buffers")
def test_only_whole_buffers_use_direct_io(tmp_path, monkeypatch):
    flags = []
    write = direct_io._write_all

    def note(handle, content):
        flags.append((len(content), bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)))
        write(handle, content)

    monkeypatch.setattr(direct_io, "_write_all", note)
    can = takes_direct(tmp_path / "probe")
    write_atomically(tmp_path / "x", [b"x" * (4 * BLOCK + 5)], bypass_cache=True)
    assert flags == [(2 * BLOCK, can), (2 * BLOCK, can), (5, False)]


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("without", ["the flag", "the system", "the write"])
def test_page_cache_is_used_without_direct_io(tmp_path, monkeypatch, without):
    content = os.urandom(9 * BLOCK + 1)
    with (tmp_path / "x").open("wb", buffering=0) as file:
        handle = file
        if without == "the system":
            monkeypatch.setattr(direct_io, "_DIRECT", 0)
        elif without == "the flag":
            monkeypatch.setattr(direct_io, "_set_direct", lambda handle, *, enabled: False)
        else:
            handle = RefusesDirect(file)
        direct_io.write_direct(handle, [content])
    assert (tmp_path / "x").read_bytes() == content


class RefusesDirect:
    """A file that rejects direct I/O with EINVAL, as some file systems do."""

    def __init__(self, file):
        self.file = file

    def fileno(self):
        return self.file.fileno()

    def write(self, content):
        if fcntl.fcntl(self.file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return self.file.write(content)


@pytest.mark.usefixtures("small_buffers")
def test_a_full_disk_is_noticed_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(handle, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io, "_write_all", fail)
    with pytest.raises(CheckpointError, match=r"Cannot write .*x: No space left on device"):
        write_atomically(tmp_path / "x", [b"x" * 9 * BLOCK], bypass_cache=True)
    assert list(tmp_path.iterdir()) == []
