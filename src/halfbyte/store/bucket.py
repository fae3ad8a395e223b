"""A store in a bucket, through fsspec: S3 by s3fs, and whatever else has a driver.

Everything rests on one operation of the bucket, that of creating an object only where there is none
(S3: ``If-None-Match: *``). A driver or a server that does not know it overwrites without a word, so
it is tried out before the first entry is written.
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
"""Key of an object that is there to be found there."""


def open_backend(place: str | Path) -> Backend:
    """Choose by the place: a path is a folder, ``scheme://...`` is opened through fsspec.

    Args:
        place: Such as ``./store`` or ``s3://bucket/store``.

    Returns:
        The backend; a folder is made at the first write.
    """
    text = str(place)
    if "://" not in text or text.startswith("file://"):
        return FolderBackend(Path(text.removeprefix("file://")))
    return BucketBackend(text)


class BucketBackend:
    """An object store. It has no lock, and needs none for all but removing."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.place = url
        self._creates_exclusively = False
        try:
            # Listings are never remembered: others write too.
            self.files, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"Cannot use {url} as a store: {str(error).rstrip('.')}. Each kind of bucket has a "
                "driver to be installed; that of s3:// is s3fs."
            ) from error

    def is_there(self) -> bool:
        """Leave it to the first listing to tell: a bucket's folders exist once they hold a file."""
        return True

    def read(self, key: str) -> bytes:
        """Give a small file's content."""
        with self._driver(f"read {key}"):
            return bytes(self.files.cat_file(self._path(key)))

    def exists(self, key: str) -> bool:
        """Tell whether there is such a file."""
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
        """Create a file whole; False where there is one already with another content.

        A driver that gets no answer asks again, and then finds what it has created itself.
        """
        self._check_creating()
        return self._create(key, content) or self.read(key) == content

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Copy a local file that has this digest to a key, and read back what arrived."""
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
        """Copy a file out to a local path."""
        with self._driver(f"read {key}"):
            self.files.get_file(self._path(key), str(path))

    @contextlib.contextmanager
    def open_read(self, key: str) -> Iterator[Any]:
        """Open a file for reading bytes."""
        with self._driver(f"read {key}"), self.files.open(self._path(key), "rb") as handle:
            yield handle

    def delete(self, key: str) -> None:
        """Remove a file."""
        if self.exists(key):
            with self._driver(f"remove {key}"):
                self.files.rm_file(self._path(key))

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """Do nothing but refuse to be exclusive: a bucket has no lock."""
        if exclusive:
            raise StoreError(
                f"{self.place} is a bucket, which cannot be locked: removing from it is safe only "
                "while nobody writes. Say so with --nobody-writes."
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
            # S3 may answer 409 instead where two create at once, or its answer may have been lost.
            if self.exists(key):
                return False
            raise
        return True

    def _check_creating(self) -> None:
        """Refuse a bucket that overwrites what it was told to create, before it does."""
        if self._creates_exclusively:
            return
        self._create(PROBE, b"")
        if self._create(PROBE, uuid.uuid4().bytes):
            raise StoreError(
                f"Cannot write to {self.place}: it overwrites an object where it was told to "
                "create one only if there is none (S3: If-None-Match), so two writers would lose "
                "each other's entries. Use a bucket that knows this condition, or a folder."
            )
        self._creates_exclusively = True

    @contextlib.contextmanager
    def _driver(self, action: str) -> Iterator[None]:
        """Say what was being done where a driver fails: each has exceptions of its own."""
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except Exception as error:
            raise StoreError(
                f"Cannot {action} of {self.place}: {str(error) or type(error).__name__}. Check "
                "the address, the credentials and the network."
            ) from error
