"""Verdicts of comparisons, and the check that a verdict belongs to a version.

A verdict given to this store counts: it allows ``promote``. One that came with a pulled version is
shown and does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.header import parse_json_object
from halfbyte.checkpoint.identity import digest_weights, is_weights
from halfbyte.errors import CheckpointError, StoreError
from halfbyte.store.backend import Backend
from halfbyte.store.blobs import blob_key
from halfbyte.store.log import History
from halfbyte.store.manifest import BaseModel, FileRecord, Manifest, Verdict

VERDICTS = ("pass", "fail", "inconclusive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict and the files that it is about."""

    verdict: str
    candidate_files: Mapping[str, str]
    """sha256 by name of the files that were judged; empty where the report does not name them."""
    base_files: Mapping[str, str]
    """The same for the model that they were compared with."""


def read_judgement(path: Path) -> Judgement:
    """Read a comparison's verdict from a file.

    Args:
        path: ``report.json`` of ``compare``, or JSON with a key "verdict"; other keys are ignored.

    Returns:
        The verdict and the files that it is about.

    Raises:
        StoreError: There is no such file, or it holds no valid verdict.
    """
    if not path.is_file():
        raise StoreError(f"There is no verdict file {path}. `halfbyte compare` writes one.")
    return parse_judgement(path.read_bytes(), str(path))


def parse_judgement(content: bytes, source: str) -> Judgement:
    """Parse a comparison's verdict.

    Args:
        content: JSON, as for :func:`read_judgement`.
        source: Where it comes from, for messages.

    Returns:
        The verdict and the files that it is about.

    Raises:
        StoreError: It holds no valid verdict.
    """
    try:
        report = parse_json_object(content, source)
    except CheckpointError as error:
        raise StoreError(str(error)) from error
    found = report.get("outcome", report.get("verdict"))
    if found not in VERDICTS:
        raise StoreError(
            f"The verdict of {source} is {str(found)[:40]!r}; allowed are {', '.join(VERDICTS)}."
        )
    return Judgement(
        verdict=str(found),
        candidate_files=_read_files(report, "candidate_files", source),
        base_files=_read_files(report, "base_files", source),
    )


def check_judgement(
    judgement: Judgement, source: str, files: Mapping[str, FileRecord], base: BaseModel
) -> None:
    """Refuse a verdict about another model, or against another base.

    Args:
        judgement: The verdict and the files that it is about.
        source: Where it comes from, for messages.
        files: The version's files.
        base: The version's base; compared where both digests are known.

    Raises:
        StoreError: A judged file is not in the version or has other content there, the version has
            weights that were not judged, or the bases differ.
    """
    judged = judgement.candidate_files
    stored = {name: record.sha256 for name, record in files.items()}
    weights = [name for name in stored if is_weights(name)] if judged else []
    for name in sorted({*judged, *weights}):
        if stored.get(name) == judged.get(name):
            continue
        if name not in stored:
            problem = "is not in this version"
        elif name not in judged:
            problem = "was not judged"
        else:
            problem = "has other content in this version"
        raise StoreError(
            f"{source} is not a verdict of this version: {name} {problem}. Compare the version "
            "itself: copy it out with `store get`, then run `halfbyte compare` on its base and "
            "that folder."
        )
    against = digest_weights(judgement.base_files) if judgement.base_files else None
    if against and base.digest and against != base.digest:
        raise StoreError(
            f"{source} compares with another base: its weights and config have digest "
            f"{against[:12]}, those of the version's base {base.digest[:12]}. Compare with that "
            "base, or add the version again with the right --base."
        )


def find_verdict(backend: Backend, history: History, manifest: Manifest) -> Verdict | None:
    """Find the newest verdict that this store was given for a version.

    Args:
        backend: The store.
        history: The log of the version's name.
        manifest: The version. Where it was pulled, the verdict in it is somebody else's claim.

    Returns:
        The verdict, and the digest of the report that holds it; None where the store has none.
    """
    entry = history.last_detail(manifest.version, "verdict")
    if entry is not None:
        return Verdict(verdict=entry.details["verdict"], sha256=entry.details["sha256"])
    first = manifest.verdict
    if first is None or history.records_origin(manifest.version):
        return None
    # The log is from before it recorded origins. Then the report decides: a pull does not bring it,
    # unless somebody put it among the version's files.
    came_along = first.sha256 in {record.sha256 for record in manifest.files.values()}
    is_kept = backend.exists(blob_key(first.sha256))
    return first if is_kept and not came_along else None


def summarize_verdict(backend: Backend, verdict: Verdict) -> bytes | None:
    """Reduce a verdict's report to what may be published: the verdict, and digests of files.

    The report itself holds questions and answers, which may be confidential.

    Args:
        backend: The store.
        verdict: From :func:`find_verdict`.

    Returns:
        JSON that :func:`parse_judgement` reads; None where the report does not name the files that
        it judged, so that nobody could check the summary.

    Raises:
        StoreError: The report is missing or damaged.
    """
    key = blob_key(verdict.sha256)
    content = backend.read(key)
    if hashlib.sha256(content).hexdigest() != verdict.sha256:
        raise StoreError(
            f"Cannot read the verdict's report {key}: its sha256 differs, so it is damaged. Remove "
            "it and attach the verdict again with `store judge`."
        )
    judgement = parse_judgement(content, key)
    if not judgement.candidate_files:
        return None
    return json.dumps(asdict(judgement), sort_keys=True, indent=2).encode()


def _read_files(report: Mapping[str, Any], key: str, source: str) -> Mapping[str, str]:
    found = report.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise StoreError(
            f"{key} of {source} must map file names to their sha256. Use the report as `halfbyte "
            "compare` wrote it."
        )
    return found
