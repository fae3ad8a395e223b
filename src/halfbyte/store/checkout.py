"""Copy a version out of a store into a folder to load it from."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from halfbyte.checkpoint.identity import digest_file
from halfbyte.errors import StoreError
from halfbyte.machine.cache import cache_folder
from halfbyte.store.backend import TEMPORARY, FolderBackend
from halfbyte.store.blobs import blob_key, check_complete
from halfbyte.store.store import SHORT, Store

CHECKOUTS = "checkouts"


def checkout(store: Store, reference: str, output: Path | None = None) -> Path:
    """Copy a version's files into a folder, and verify each against its digest.

    Args:
        store: The store.
        reference: The version.
        output: A new folder. None: a shared folder, made once and reused; it is in the store, or in
            the user's cache if the store is a bucket or read-only.

    Returns:
        The folder.

    Raises:
        StoreError: A file is missing or damaged, or the output exists or cannot be written.
    """
    _, version = store.resolve(reference)
    if output is None:
        return _checkout_once(store, version)
    target = output.resolve()
    if target.exists():
        raise StoreError(f"The output {output} already exists. Choose a new folder.")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    _make_folder(store, version, partial, target)
    return output


def _checkout_once(store: Store, version: str) -> Path:
    """Return the shared folder of a version, and make it if it does not exist."""
    roots = [store.backend.root] if isinstance(store.backend, FolderBackend) else []
    roots.append(cache_folder())
    for root in roots:
        if (root / CHECKOUTS / version).is_dir():
            return root / CHECKOUTS / version
    root = roots[0] if os.access(roots[0], os.W_OK) else roots[-1]
    folder = root / CHECKOUTS / version
    _make_folder(store, version, root / TEMPORARY / uuid.uuid4().hex, folder, shared=True)
    return folder


def _make_folder(
    store: Store, version: str, partial: Path, folder: Path, *, shared: bool = False
) -> None:
    """Copy the files next to the folder, then rename, so that it is never incomplete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with store.backend.lock(exclusive=False):
            try:
                _copy_files(store, version, partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        # Another process may have made the same shared folder meanwhile.
        if not (shared and folder.is_dir()):
            raise StoreError(
                f"Cannot write {folder}: {error.strerror or error}. Free some space or choose "
                "another folder."
            ) from error


def _copy_files(store: Store, version: str, folder: Path) -> None:
    manifest = store.manifest(version)
    check_complete(store.backend, manifest)
    for path, record in manifest.files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        store.backend.fetch(blob_key(record.sha256), target)
        if digest_file(target) != record.sha256:
            raise StoreError(
                f"{path} of {version[:SHORT]} is damaged: its sha256 differs from the manifest's. "
                "Add or pull the version again."
            )
