from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.helpers.stores import add

from halfbyte.errors import StoreError
from halfbyte.store.backend import FolderBackend
from halfbyte.store.checkout import checkout
from halfbyte.store.garbage import collect_garbage


def test_checkout_equals_the_folder_and_is_reused(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add(store, tmp_path)
    folder = checkout(store, "m")
    place = "store" if isinstance(store.backend, FolderBackend) else "cache/halfbyte"
    assert folder.parent == tmp_path / place / "checkouts"
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "model0" / "model.safetensors"
    ).read_bytes()
    stamp = folder.stat().st_mtime_ns
    assert checkout(store, "m") == folder
    assert folder.stat().st_mtime_ns == stamp
    assert isinstance(folder, Path)
    with pytest.raises(StoreError, match=r"exists. Choose a new folder"):
        checkout(store, "m", folder)


@pytest.mark.parametrize("output", [".", "/", "a/..", "taken"])
def test_checkout_requires_a_new_folder(local, tmp_path, monkeypatch, output):
    add(local, tmp_path)
    (tmp_path / "here" / "taken").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(StoreError, match=r"exists. Choose a new folder"):
        checkout(local, "m", Path(output))
    assert [path.name for path in Path().iterdir()] == ["taken"]


def test_checkout_fails_if_the_folder_appears_meanwhile(local, tmp_path, monkeypatch):
    add(local, tmp_path)
    output = tmp_path / "out"

    def fetch(key, path):
        output.mkdir(exist_ok=True)
        (output / "other").write_bytes(b"")
        FolderBackend.fetch(local.backend, key, path)

    monkeypatch.setattr(local.backend, "fetch", fetch)
    with pytest.raises(StoreError, match=r"Cannot write .*out: Directory not empty"):
        checkout(local, "m", output)
    assert not list(tmp_path.glob(".out*"))


def test_read_only_store_can_be_read(local, tmp_path, monkeypatch):
    add(local, tmp_path)
    real = Path.open

    def open_read_only(path, mode="r", *args, **options):
        if "r" not in mode and path.is_relative_to(local.backend.root):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_read_only)
    monkeypatch.setattr(os, "access", lambda path, mode: path != local.backend.root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "halfbyte" / "checkouts" / local.resolve("m")[1]
    assert checkout(local, "m") == folder
    assert checkout(local, "m") == folder
    assert (checkout(local, "m", tmp_path / "out") / "config.json").is_file()
    with pytest.raises(StoreError, match=r"Cannot write into .*: Read-only file system"):
        add(local, tmp_path, 1)
    with pytest.raises(StoreError, match=r"Cannot lock .*: Read-only file system"):
        collect_garbage(local)
