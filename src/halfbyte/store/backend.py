"""Storage backends of a store: a folder here, a bucket in ``bucket.py``. No file is overwritten.

Everything relies on :meth:`Backend.put_new`, which creates a file atomically or reports that it
exists.
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
    """Storage of immutable files under slash-separated keys."""

    place: str
    """The path or URL, for messages."""

    def is_there(self) -> bool:
        """Return whether the store exists, so that it can be read."""

    def read(self, key: str) -> bytes:
        """Read a small file."""

    def exists(self, key: str) -> bool:
        """Return whether a key exists."""

    def list(self, prefix: str) -> list[str]:
        """List the keys under a folder, sorted."""

    def put_new(self, key: str, content: bytes) -> bool:
        """Create a file atomically; return False, without a change, if the key exists."""

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Copy a local file that has this digest to a key; a no-op if the key exists."""

    def fetch(self, key: str, path: Path) -> None:
        """Copy a file to a local path."""

    def open_read(self, key: str) -> contextlib.AbstractContextManager[Any]:
        """Open a file for reading, in binary mode."""

    def delete(self, key: str) -> None:
        """Remove a file; a no-op if it does not exist."""

    def lock(self, *, exclusive: bool) -> contextlib.AbstractContextManager[None]:
        """Hold the store's lock: shared to write, exclusive to remove."""


def digest_chunks(source: IO[bytes], copy: IO[bytes] | None = None) -> str:
    """Return the sha256, in hex, of a stream; also write the stream to ``copy``."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    return digest.hexdigest()


def check_unchanged(path: Path, copied: str, sha256: str) -> None:
    """Raise StoreError if a file changed between taking its digest and copying it."""
    if copied != sha256:
        raise StoreError(
            f"{path} changed while it was added. Add it again once no other program writes to it."
        )


class FolderBackend:
    """A folder on one machine. A file is synced to disk, then hard-linked to its key."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, str(root)

    def is_there(self) -> bool:
        """Return whether the folder exists; the first write creates it."""
        return self.root.is_dir()

    def read(self, key: str) -> bytes:
        """Read a small file."""
        try:
            return (self.root / key).read_bytes()
        except OSError as error:
            raise StoreError(f"Cannot read {key} of {self.place}: {error.strerror}.") from error

    def exists(self, key: str) -> bool:
        """Return whether a key exists."""
        return (self.root / key).is_file()

    def list(self, prefix: str) -> list[str]:
        """List the keys under a folder, sorted."""
        base = self.root / prefix
        return sorted(p.relative_to(self.root).as_posix() for p in base.rglob("*") if p.is_file())

    def put_new(self, key: str, content: bytes) -> bool:
        """Create a file atomically; return False if the key exists."""
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
        """Copy a file to a local path."""
        shutil.copyfile(self.root / key, path)

    def open_read(self, key: str) -> contextlib.AbstractContextManager[Any]:
        """Open a file for reading, in binary mode."""
        return (self.root / key).open("rb")

    def delete(self, key: str) -> None:
        """Remove a file."""
        (self.root / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the store's lock (flock), which the system releases when the process ends."""
        with contextlib.ExitStack() as held:
            try:
                handle = held.enter_context(self._open_lock(exclusive=exclusive))
                fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            except OSError as error:
                raise StoreError(
                    f"Cannot lock {self.place}: {error.strerror or error}. Check the permissions, "
                    "and that its file system supports locks (flock)."
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
            return path.open()  # a read-only store can still be read

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
