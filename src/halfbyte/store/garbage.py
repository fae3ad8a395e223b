"""Garbage collection: remove versions that no alias needs, and blobs that no version needs."""

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


def collect_garbage(store: Store, *, keep: int = KEEP, no_other_writers: bool = False) -> Collected:
    """Remove unneeded versions and blobs under an exclusive lock.

    A version is removed from its log first, then its manifest and blobs. If the process is killed
    in between, the next run collects what is left.

    Args:
        store: The store.
        keep: How many of the newest versions of each model to keep, beside those that an alias
            points to or can roll back to.
        no_other_writers: For a bucket, which has no lock: the caller guarantees that nobody writes.

    Returns:
        What was removed.

    Raises:
        StoreError: A version to keep cannot be read. Nothing is removed.
    """
    if no_other_writers and not isinstance(store.backend, FolderBackend):
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
    """Return the digests of the blobs that a version needs."""
    try:
        manifest = store.manifest(version)
    except StoreError as error:
        raise StoreError(
            f"Cannot collect garbage: {name}@{version[:SHORT]} is to be kept, and its manifest, "
            f"which lists its files, cannot be read. {error} To give the version up, move its "
            "aliases to others and lower --keep."
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
    """Remove temporary files of killed processes, and checkouts of removed versions.

    Safe under the exclusive lock; a process that has a checkout's files open keeps them.
    """
    if not isinstance(store.backend, FolderBackend):
        return
    temporary = store.backend.root / TEMPORARY
    temporary.mkdir(exist_ok=True)
    for path in (store.backend.root / CHECKOUTS).glob("*"):
        if path.name not in needed:
            # Rename first: a partly deleted folder must not pass for the version.
            path.rename(temporary / uuid.uuid4().hex)
    for path in temporary.glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
