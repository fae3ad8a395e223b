"""A version as a folder that models are loaded from."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from halfbyte.checkpoint.identity import digest_file
from halfbyte.errors import StoreError
from halfbyte.machine.cache import cache_folder
from halfbyte.store.backend import TEMPORARY, FolderBackend
from halfbyte.store.blobs import blob_key
from halfbyte.store.store import SHORT, Store

CHECKOUTS = "checkouts"


def checkout(store: Store, reference: str, output: Path | None = None) -> Path:
    """Give a folder with a version's files, each compared with its digest as it is copied.

    Args:
        store: The store.
        reference: The version.
        output: A new folder; None: one inside the store, of a bucket one in the user's cache, made
            once and used again.

    Returns:
        The folder.

    Raises:
        StoreError: A file is damaged, or the output exists.
    """
    _, version = store.resolve(reference)
    if output is None:
        root = store.backend.root if isinstance(store.backend, FolderBackend) else cache_folder()
        output = root / CHECKOUTS / version
        if output.is_dir():
            return output
        partial = root / TEMPORARY / uuid.uuid4().hex
    else:
        partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    if output.exists():
        raise StoreError(f"The output {output} exists. Choose a new folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with store.backend.lock(exclusive=False):
        try:
            _copy_files(store, version, partial)
            _rename(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return output


def _copy_files(store: Store, version: str, folder: Path) -> None:
    for path, record in store.manifest(version).files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        store.backend.fetch(blob_key(record.sha256), target)
        if digest_file(target) != record.sha256:
            raise StoreError(
                f"{path} of {version[:SHORT]} is damaged: its sha256 differs from the manifest's. "
                "Add or pull the version again."
            )


def _rename(partial: Path, output: Path) -> None:
    """Let the folder appear whole; that another process made the same meanwhile is as good."""
    try:
        partial.rename(output)
    except OSError as error:
        if not output.is_dir():
            raise StoreError(f"Cannot write {output}: {error.strerror or error}.") from error
