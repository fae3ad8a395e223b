from __future__ import annotations

import pytest

from halfbyte.store.store import Store


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    """The same store in a folder, and in fsspec's memory, which stands for a bucket."""
    if request.param == "folder":
        return Store(tmp_path / "store")
    return request.getfixturevalue("bucket")


@pytest.fixture
def bucket():
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return Store("memory://bucket/store")


@pytest.fixture
def local(tmp_path):
    return Store(tmp_path / "store")
