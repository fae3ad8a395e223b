"""Where a store keeps its bytes: a folder here, a bucket in ``bucket.py``. Nothing is overwritten.

Both offer the same few operations; the one that everything rests on is :meth:`Backend.put_new`,
which creates a whole file or finds that there already is one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from halfbyte.checkpoint.atomic import sync_folder
from halfbyte.errors import StoreError

LOCK_FILE = "lock"
TEMPORARY = "tmp"
CHUNK_BYTES = 1 << 22


class Backend(Protocol):
    """A place for immutable files, by slash-separated keys."""

    place: str
    """For messages."""

    def is_there(self) -> bool:
        """Tell whether there is such a place to read from."""

    def read(self, key: str) -> bytes:
        """Give a small file's content."""

    def exists(self, key: str) -> bool:
        """Tell whether there is such a file."""

    def list(self, prefix: str) -> list[str]:
        """List the keys under a folder, sorted."""

    def put_new(self, key: str, content: bytes) -> bool:
        """Create a file whole; False where there is one already, which stays as it is."""

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Copy a local file that has this digest to a key; one that is there stays as it is."""

    def fetch(self, key: str, path: Path) -> None:
        """Copy a file out to a local path."""

    def open_read(self, key: str) -> contextlib.AbstractContextManager[Any]:
        """Open a file for reading bytes."""

    def delete(self, key: str) -> None:
        """Remove a file; one that is not there is no error."""

    def lock(self, *, exclusive: bool) -> contextlib.AbstractContextManager[None]:
        """Hold off whoever removes things, or, exclusively, everybody."""


def digest_chunks(source: IO[bytes], copy: IO[bytes] | None = None) -> str:
    """Give the sha256 in hex of what is read, and write it to the copy on the way."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest()


def check_unchanged(path: Path, copied: str, sha256: str) -> None:
    """Refuse a copy of a file that was written to after its digest was taken."""
    if copied != sha256:
        raise StoreError(f"{path} changed while it was added. Add it when nobody writes to it.")


class FolderBackend:
    """A folder on one machine. Files appear by an exclusive link, after their bytes are on disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, str(root)

    def is_there(self) -> bool:
        """Tell whether there is such a folder; the first write makes it."""
        return self.root.is_dir()

    def read(self, key: str) -> bytes:
        """Give a small file's content."""
        try:
            return (self.root / key).read_bytes()
        except OSError as error:
            raise StoreError(f"Cannot read {key} of {self.place}: {error.strerror}.") from error

    def exists(self, key: str) -> bool:
        """Tell whether there is such a file."""
        return (self.root / key).is_file()

    def list(self, prefix: str) -> list[str]:
        """List the keys under a folder, sorted."""
        base = self.root / prefix
        return sorted(p.relative_to(self.root).as_posix() for p in base.rglob("*") if p.is_file())

    def put_new(self, key: str, content: bytes) -> bool:
        """Create a file whole; False where there is one already."""
        with self._temporary() as temporary:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            return self._link(temporary, key)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Copy a local file that has this digest to a key."""
        with self._temporary() as temporary:
            with path.open("rb") as source, temporary.open("wb") as handle:
                copied = digest_chunks(source, handle)
                handle.flush()
                os.fsync(handle.fileno())
            check_unchanged(path, copied, sha256)
            self._link(temporary, key)

    def fetch(self, key: str, path: Path) -> None:
        """Copy a file out to a local path."""
        shutil.copyfile(self.root / key, path)

    def open_read(self, key: str) -> contextlib.AbstractContextManager[Any]:
        """Open a file for reading bytes."""
        return (self.root / key).open("rb")

    def delete(self, key: str) -> None:
        """Remove a file."""
        (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the store's lock, which the system lets go of when the process ends."""
        with contextlib.ExitStack() as held:
            try:
                handle = held.enter_context(self._open_lock(exclusive=exclusive))
                fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            except OSError as error:
                raise StoreError(
                    f"Cannot lock {self.place}: {error.strerror or error}. Check the permissions, "
                    "and that its file system has locks (flock)."
                ) from error
            yield

    def _open_lock(self, *, exclusive: bool) -> IO[str]:
        path = self.root / LOCK_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a")
        except OSError:
            if exclusive:
                raise
            return path.open()  # to read from a store that cannot be written to

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self.root / TEMPORARY / uuid.uuid4().hex
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"Cannot write into {self.place}: {error.strerror or error}. Free some space or "
                "check the permissions."
            ) from error

    def _link(self, temporary: Path, key: str) -> bool:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.chmod(0o444)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        sync_folder(target.parent)
        return True
