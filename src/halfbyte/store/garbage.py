"""Remove versions that no alias needs, and blobs that no version needs."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass

from halfbyte.errors import StoreError
from halfbyte.store.backend import TEMPORARY, FolderBackend
from halfbyte.store.checkout import CHECKOUTS
from halfbyte.store.store import SHORT, Store

KEEP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What garbage collection removed."""

    versions: tuple[str, ...]
    blobs: int
    num_bytes: int


def collect_garbage(store: Store, *, keep: int = KEEP, nobody_writes: bool = False) -> Collected:
    """Remove what is not needed, while nobody else adds or promotes.

    A version is first removed from its log, then its manifest and blobs: killed at any point, what
    is left is collected the next time.

    Args:
        store: The store.
        keep: For each model, also keep this many of the newest versions; and what each alias
            pointed to before, so that it can be rolled back.
        nobody_writes: For a bucket, which has no lock: you know that nobody writes.

    Returns:
        What was removed.

    Raises:
        StoreError: A version that is needed cannot be read; nothing is removed then.
    """
    if nobody_writes and not isinstance(store.backend, FolderBackend):
        return _collect(store, keep)
    with store.backend.lock(exclusive=True):
        return _collect(store, keep)


def _collect(store: Store, keep: int) -> Collected:
    unneeded: list[tuple[str, str]] = []
    needed: set[str] = set()
    blobs: set[str] = set()
    for name in store.names():
        history = store.history(name)
        versions = history.versions
        kept = set(versions[-keep:] if keep > 0 else [])
        for alias in history.aliases:
            kept |= set(history.past_of(alias)[-2:])
        for version in versions:
            if version in kept:
                needed.add(version)
                blobs |= _list_blobs(store, name, version)
            else:
                unneeded.append((name, version))
        blobs |= {entry.details["sha256"] for entry in history.entries if "sha256" in entry.details}
    for name, version in unneeded:
        store.append(name, version, "remove", reason="garbage collection")
    for key in store.backend.list("manifests"):
        if key.removeprefix("manifests/").removesuffix(".json") not in needed:
            store.backend.delete(key)
    count, size = _delete_blobs(store, blobs)
    _clear_leftovers(store, needed)
    removed = tuple(version for _, version in unneeded)
    return Collected(versions=removed, blobs=count, num_bytes=size)


def _list_blobs(store: Store, name: str, version: str) -> set[str]:
    """List the digests that a version needs; of one that cannot be read nobody knows them."""
    try:
        manifest = store.manifest(version)
    except StoreError as error:
        raise StoreError(
            f"Cannot collect garbage: which files {name}@{version[:SHORT]} needs cannot be read. "
            f"{error} To let the version go, move its aliases and leave it out with --keep."
        ) from error
    verdict = {manifest.verdict.sha256} if manifest.verdict else set()
    return {record.sha256 for record in manifest.files.values()} | verdict


def _delete_blobs(store: Store, needed: set[str]) -> tuple[int, int]:
    count = size = 0
    for key in store.backend.list("blobs"):
        if key.rpartition("/")[2] in needed:
            continue
        with store.backend.open_read(key) as handle:
            size += handle.seek(0, os.SEEK_END)
        store.backend.delete(key)
        count += 1
    return count, size


def _clear_leftovers(store: Store, needed: set[str]) -> None:
    """Remove what killed processes left, and checkouts of removed versions.

    Nobody else writes while the lock is exclusive; a model that is loaded keeps its files.
    """
    if not isinstance(store.backend, FolderBackend):
        return
    temporary = store.backend.root / TEMPORARY
    temporary.mkdir(exist_ok=True)
    for path in (store.backend.root / CHECKOUTS).glob("*"):
        if path.name not in needed:
            # Out of the way at once: half a folder under its name would pass for the version.
            path.rename(temporary / uuid.uuid4().hex)
    for path in temporary.glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
