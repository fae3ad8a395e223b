"""Checksums of a checkpoint, to detect damaged files and name the damaged tensor.

``checksums.json``::

    {"version": 1,
     "quantization_config": SHA-256 of the config as canonical JSON,
     "files": {"model-00001-of-00002.safetensors": {
         "sha256": digest of the whole file, as sha256sum prints it,
         "tensors": {name: first 16 hex digits of the SHA-256 of its data}}}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.checkpoint.header import TensorInfo, parse_json_object
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import CheckpointError

CHECKSUMS_FILE = "checksums.json"
CHECKSUMS_VERSION = 1
TENSOR_DIGITS = 16

_CHUNK_BYTES = 1 << 22
VERIFY_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Number of files read in parallel: computing a digest takes longer than reading the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDigest:
    """Sizes and digests of one shard."""

    file_name: str
    sha256: str
    num_bytes: int
    """Size of the whole file."""
    tensor_bytes: int
    """Size of the tensors alone."""
    tensors: Mapping[str, str]
    """First 16 hex digits of the SHA-256 of each tensor's data, by name."""


def write_checksums(
    folder: Path, shards: Iterable[ShardDigest], quantization_config: Mapping[str, Any]
) -> None:
    """Write ``checksums.json``.

    Args:
        folder: The checkpoint.
        shards: What :func:`halfbyte.checkpoint.write.write_shard` returned for each shard.
        quantization_config: The one in the config files.
    """
    content = {
        "version": CHECKSUMS_VERSION,
        "quantization_config": digest_config(quantization_config),
        "files": {
            shard.file_name: {
                "sha256": shard.sha256,
                "tensors": dict(sorted(shard.tensors.items())),
            }
            for shard in sorted(shards, key=lambda shard: shard.file_name)
        },
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(folder / CHECKSUMS_FILE, [text.encode()])


def digest_config(quantization_config: Mapping[str, Any]) -> str:
    """Compute a config's SHA-256, independent of whitespace and key order."""
    text = json.dumps(quantization_config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def verify_checksums(files: TensorFiles, quantization_config: Mapping[str, Any]) -> int:
    """Compare every byte of a checkpoint with ``checksums.json``.

    Args:
        files: The open checkpoint.
        quantization_config: The one in its config files.

    Returns:
        The number of tensors compared.

    Raises:
        CheckpointError: There is no ``checksums.json``, it belongs to other files, or a digest
            differs; names the file and the tensor.
    """
    recorded = _read_checksums(files.folder)
    if digest_config(quantization_config) != recorded["quantization_config"]:
        raise CheckpointError(
            f"The quantization config of {files.folder} was changed after writing: its digest "
            f"differs from {CHECKSUMS_FILE}. Restore config.json, or download it again."
        )
    names = {file.name for file in files.files}
    if names != set(recorded["files"]):
        odd = sorted(names ^ set(recorded["files"]))
        raise CheckpointError(
            f"Cannot verify {files.folder}: {CHECKSUMS_FILE} does not list the same weight files "
            f"as the folder ({', '.join(odd[:3])}). Download the checkpoint again."
        )
    with ThreadPoolExecutor(min(len(files.files), VERIFY_THREADS)) as pool:
        # In order, so that the first of several damaged files is named.
        for _ in pool.map(lambda f: _verify_file(files, f, recorded["files"][f.name]), files.files):
            pass
    return len(files.infos)


def _read_checksums(folder: Path) -> dict[str, Any]:
    path = folder / CHECKSUMS_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"Cannot verify {folder}: it has no {CHECKSUMS_FILE}, which only halfbyte writes. "
            "Compare the files with the checksums on the download page instead."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    recorded = parse_json_object(text, str(path))
    files = recorded.get("files")
    if (
        recorded.get("version") != CHECKSUMS_VERSION
        or not isinstance(recorded.get("quantization_config"), str)
        or not isinstance(files, dict)
        or not all(_is_file_record(record) for record in files.values())
    ):
        raise CheckpointError(
            f"Cannot use {path}: it is not a list of digests of version {CHECKSUMS_VERSION}. "
            "The file is damaged; download it again."
        )
    return recorded


def _is_file_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("sha256"), str)
        and isinstance(record.get("tensors"), dict)
    )


def _verify_file(files: TensorFiles, file: Path, recorded: Mapping[str, Any]) -> None:
    digest = hashlib.sha256()
    for chunk in _read_range(file, 0, None):
        digest.update(chunk)
    if digest.hexdigest() == recorded["sha256"]:
        return
    for info in files.infos.values():
        if info.file == file and _digest_tensor(info) != recorded["tensors"].get(info.name):
            raise CheckpointError(
                f"Tensor {info.name} of {file} was changed after writing: its SHA-256 differs from "
                f"{CHECKSUMS_FILE}. The file is damaged; download or quantize it again."
            )
    raise CheckpointError(
        f"The header of {file} was changed after writing: the SHA-256 of the file differs from "
        f"{CHECKSUMS_FILE}, those of its tensors do not. Download or quantize it again."
    )


def _digest_tensor(info: TensorInfo) -> str:
    digest = hashlib.sha256()
    for chunk in _read_range(info.file, info.offset, info.num_bytes):
        digest.update(chunk)
    return digest.hexdigest()[:TENSOR_DIGITS]


def _read_range(file: Path, start: int, num_bytes: int | None) -> Iterator[bytes]:
    try:
        with file.open("rb") as handle:
            handle.seek(start)
            remaining = num_bytes
            while remaining is None or remaining > 0:
                size = _CHUNK_BYTES if remaining is None else min(remaining, _CHUNK_BYTES)
                chunk = handle.read(size)
                if not chunk:
                    return
                remaining = None if remaining is None else remaining - len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {file}: {error.strerror or error}. Check the disk and the permissions."
        ) from error
