"""Content-addressed storage: files under the digest of their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from halfbyte.checkpoint.identity import digest_file
from halfbyte.errors import StoreError
from halfbyte.store.backend import Backend, digest_chunks
from halfbyte.store.manifest import FileRecord, Manifest


def blob_key(digest: str) -> str:
    """Return the key of a blob."""
    return f"blobs/{digest[:2]}/{digest}"


def put_blob(backend: Backend, path: Path) -> FileRecord:
    """Store a file under its digest, and verify the copy."""
    try:
        record = FileRecord(sha256=digest_file(path), bytes=path.stat().st_size)
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error.strerror or error}.") from error
    if not backend.exists(blob_key(record.sha256)):
        backend.put_file(blob_key(record.sha256), path, record.sha256)
    return record


def put_bytes(backend: Backend, content: bytes) -> FileRecord:
    """Store a small file under its digest."""
    digest = hashlib.sha256(content).hexdigest()
    backend.put_new(blob_key(digest), content)
    return FileRecord(sha256=digest, bytes=len(content))


def verify_blob(backend: Backend, record: FileRecord, what: str) -> None:
    """Compare a blob with its digest.

    Args:
        backend: Where it is.
        record: Its expected digest.
        what: The file and its version, for messages.

    Raises:
        StoreError: It is missing, or its digest differs.
    """
    key = blob_key(record.sha256)
    if not backend.exists(key):
        raise StoreError(f"{what} is missing from the store. Add or pull the version again.")
    with backend.open_read(key) as handle:
        found = digest_chunks(handle)
    if found != record.sha256:
        raise StoreError(
            f"{what} is not as it was added: its sha256 differs, so it is damaged. Remove the blob "
            f"{key} and add the version again."
        )


def check_complete(backend: Backend, manifest: Manifest) -> None:
    """Check that all blobs of a version exist, without reading them.

    Args:
        backend: Where they are.
        manifest: The version.

    Raises:
        StoreError: A blob is missing; names the file.
    """
    for path, record in manifest.files.items():
        if not backend.exists(blob_key(record.sha256)):
            raise StoreError(
                f"{path} of {manifest.version[:12]} is missing from the store. Add or pull the "
                "version again."
            )
