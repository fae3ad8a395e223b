"""What a comparison came to, and whether it was one of this very version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.header import parse_json_object
from halfbyte.checkpoint.identity import digest_weights, is_weights
from halfbyte.errors import CheckpointError, StoreError
from halfbyte.store.backend import Backend
from halfbyte.store.blobs import blob_key
from halfbyte.store.log import History
from halfbyte.store.manifest import BaseModel, FileRecord, Manifest

VERDICTS = ("pass", "fail", "inconclusive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a file says of a model."""

    verdict: str
    candidate_files: Mapping[str, str]
    """sha256 by name of what was judged; empty where the file does not say."""
    base_files: Mapping[str, str]
    """The same of what it was compared with."""


def read_judgement(path: Path) -> Judgement:
    """Read a comparison's verdict.

    Args:
        path: ``report.json`` of ``compare``, or JSON with a key "verdict"; other keys are kept and
            not looked at.

    Returns:
        "pass", "fail" or "inconclusive", and of what.

    Raises:
        StoreError: There is no such file, or no such verdict in it.
    """
    if not path.is_file():
        raise StoreError(f"There is no verdict file {path}.")
    try:
        report = parse_json_object(path.read_bytes(), str(path))
    except CheckpointError as error:
        raise StoreError(str(error)) from error
    found = report.get("outcome", report.get("verdict"))
    if found not in VERDICTS:
        raise StoreError(
            f"The verdict of {path} is {str(found)[:40]!r}; allowed are {', '.join(VERDICTS)}."
        )
    return Judgement(
        verdict=str(found),
        candidate_files=_read_files(report, "candidate_files", path),
        base_files=_read_files(report, "base_files", path),
    )


def check_judgement(
    judgement: Judgement, path: Path, files: Mapping[str, FileRecord], base: BaseModel
) -> None:
    """Refuse a verdict that was given of another model, or against another base.

    Args:
        judgement: What the file says.
        path: For messages.
        files: Of the version.
        base: Of the version; compared where both digests are known.

    Raises:
        StoreError: A file that was judged is not in the version or has other bytes there, the
            version has weights that were not judged, or the bases differ.
    """
    judged = judgement.candidate_files
    own = {name: record.sha256 for name, record in files.items()}
    missed = [name for name in own if is_weights(name)] if judged else []
    for name in sorted({*judged, *missed}):
        if own.get(name) != judged.get(name):
            found = "has other bytes there"
            if name not in own or name not in judged:
                found = "is not in it" if name not in own else "was not there"
            raise StoreError(
                f"{path} is no verdict of this version: {name} {found}. Compare the version "
                "itself: `store get` it, then `halfbyte compare` its base with that folder."
            )
    against = digest_weights(judgement.base_files) if judgement.base_files else None
    if against and base.digest and against != base.digest:
        raise StoreError(
            f"{path} compares with another base: its weights and config have digest "
            f"{against[:12]}, those of the version's base {base.digest[:12]}. Compare with that "
            "base, or add the version again with the right --base."
        )


def find_verdict(backend: Backend, history: History, manifest: Manifest) -> str | None:
    """Find the last verdict that a store was given of a version.

    Args:
        backend: The store.
        history: The log of the version's name.
        manifest: The version. Where it was pulled, the verdict in it is what somebody else says.

    Returns:
        The verdict; None where the store was given none.
    """
    late, first = history.verdict_of(manifest.version), manifest.verdict
    if late or first is None or history.tells_origin(manifest.version):
        return late
    # Then the verdict's file says it: none was pulled, unless somebody put it among the version's.
    came_along = first.sha256 in {record.sha256 for record in manifest.files.values()}
    is_kept = backend.exists(blob_key(first.sha256))
    return first.verdict if is_kept and not came_along else None


def _read_files(report: Mapping[str, Any], key: str, path: Path) -> Mapping[str, str]:
    found = report.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise StoreError(
            f"{key} of {path} must map file names to their sha256. Take the report as `halfbyte "
            "compare` wrote it."
        )
    return found
