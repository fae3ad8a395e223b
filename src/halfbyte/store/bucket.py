"""A store in a bucket, accessed through fsspec: S3 with s3fs, others with their own driver.

Everything relies on a conditional write: create an object only if there is none (S3:
``If-None-Match: *``). Drivers and servers that do not support it overwrite silently, so it is
tested before the first entry is written.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import StoreError
from halfbyte.store.backend import (
    Backend,
    FolderBackend,
    check_unchanged,
    digest_chunks,
)

PROBE = "create-check"
"""Key of the object that tests conditional writes."""


def open_backend(place: str | Path) -> Backend:
    """Open a path as a folder, and ``scheme://...`` through fsspec.

    Args:
        place: Such as ``./store`` or ``s3://bucket/store``.

    Returns:
        The backend; a folder is created by the first write.
    """
    text = str(place)
    if "://" not in text or text.startswith("file://"):
        return FolderBackend(Path(text.removeprefix("file://")))
    return BucketBackend(text)


class BucketBackend:
    """An object store. It has no lock, which only garbage collection would need."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.place = url
        self._creates_exclusively = False
        try:
            # No cached listings: other processes write too.
            self.files, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"Cannot use {url} as a store: {str(error).rstrip('.')}. Install the fsspec "
                "driver of this kind of bucket; for s3:// that is: pip install s3fs"
            ) from error

    def is_there(self) -> bool:
        """Return True: a folder in a bucket exists once it holds an object."""
        return True

    def read(self, key: str) -> bytes:
        """Read a small file."""
        with self._driver(f"read {key}"):
            return bytes(self.files.cat_file(self._path(key)))

    def exists(self, key: str) -> bool:
        """Return whether a key exists."""
        with self._driver(f"look for {key}"):
            return bool(self.files.exists(self._path(key)))

    def list(self, prefix: str) -> list[str]:
        """List the keys under a folder, sorted."""
        with self._driver(f"list {prefix}"):
            self.files.invalidate_cache()
            found = self.files.find(self._path(prefix))
        root = self.root.strip("/")
        return sorted(path.strip("/").removeprefix(root).strip("/") for path in found)

    def put_new(self, key: str, content: bytes) -> bool:
        """Create a file atomically; return False if the key exists with other content.

        The same content counts as created: a driver that retries after a lost response finds the
        object that its first request created.
        """
        self._check_conditional_writes()
        return self._create(key, content) or self.read(key) == content

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Copy a local file that has this digest to a key, then read it back to verify it."""
        if self.exists(key):
            return
        with self._driver(f"write {key}"):
            self.files.put_file(str(path), self._path(key))
        try:
            with self.open_read(key) as handle:
                check_unchanged(path, digest_chunks(handle), sha256)
        except StoreError:
            self.delete(key)
            raise

    def fetch(self, key: str, path: Path) -> None:
        """Copy a file to a local path."""
        with self._driver(f"read {key}"):
            self.files.get_file(self._path(key), str(path))

    @contextlib.contextmanager
    def open_read(self, key: str) -> Iterator[Any]:
        """Open a file for reading, in binary mode."""
        with self._driver(f"read {key}"), self.files.open(self._path(key), "rb") as handle:
            yield handle

    def delete(self, key: str) -> None:
        """Remove a file."""
        if self.exists(key):
            with self._driver(f"remove {key}"):
                self.files.rm_file(self._path(key))

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """Refuse an exclusive lock, which a bucket does not have; a shared one is a no-op."""
        if exclusive:
            raise StoreError(
                f"{self.place} is a bucket, which cannot be locked: removing from it is safe only "
                "while nobody else writes. Confirm that with --no-other-writers."
            )
        yield

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}"

    def _create(self, key: str, content: bytes) -> bool:
        try:
            with self._driver(f"create {key}"):
                self.files.pipe_file(self._path(key), content, mode="create")
        except FileExistsError:
            return False
        except StoreError:
            # Of two concurrent writers S3 may answer one with 409; or its response was lost.
            if self.exists(key):
                return False
            raise
        return True

    def _check_conditional_writes(self) -> None:
        """Refuse a bucket that overwrites an object instead of failing to create it."""
        if self._creates_exclusively:
            return
        self._create(PROBE, b"")
        if self._create(PROBE, uuid.uuid4().bytes):
            raise StoreError(
                f"Cannot write to {self.place}: it overwrites an object that it was told to "
                "create only if there is none (S3: If-None-Match), so two writers would lose each "
                "other's entries. Use a bucket that supports this condition, or a folder."
            )
        self._creates_exclusively = True

    @contextlib.contextmanager
    def _driver(self, action: str) -> Iterator[None]:
        """Turn a driver's exceptions, which differ by driver, into StoreError."""
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except Exception as error:
            raise StoreError(
                f"Cannot {action} of {self.place}: {str(error) or type(error).__name__}. Check "
                "the address, the credentials and the network."
            ) from error
