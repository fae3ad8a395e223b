"""Manifest of a version: its files, base and recipe. Its digest is the version's name.

::

    {"format": 1, "name": ..., "created": ISO time, "parent": version or null,
     "files": {path: {"sha256": ..., "bytes": ...}},
     "base": {"id", "revision", "digest"}, "recipe": {...}, "calibration": digest or null,
     "tools": {package: version}, "verdict": {"verdict", "sha256"} or null}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from halfbyte.checkpoint.front_matter import read_front_matter
from halfbyte.checkpoint.header import parse_json_object
from halfbyte.errors import CheckpointError, StoreError
from halfbyte.store.members import check_member

FORMAT = 1
REPORT_FILE = "quantization_report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of a version."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The model that was quantized; unknown fields are None."""

    id: str | None = None
    revision: str | None = None
    digest: str | None = None
    """sha256 over the names and digests of its weights and config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of a comparison of base and quantized model."""

    verdict: str
    sha256: str
    """Digest of the report, which the store keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The immutable description of a version."""

    name: str
    created: str
    parent: str | None
    files: Mapping[str, FileRecord]
    base: BaseModel
    recipe: Mapping[str, Any]
    calibration: str | None
    tools: Mapping[str, str]
    verdict: Verdict | None

    def __post_init__(self) -> None:
        """Validate all fields: a manifest may come from outside."""
        _check_types(self)
        for record in (self.base, *self.files.values(), *filter(None, [self.verdict])):
            _check_types(record)
        what = f"{self.name[:80]}@{self.version[:12]}"
        for path in self.files:
            check_member(path, what)

    @property
    def version(self) -> str:
        """The sha256 of the canonical form, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all files. Unit: bytes."""
        return sum(record.bytes for record in self.files.values())

    def to_bytes(self) -> bytes:
        """Return the canonical form: JSON with sorted keys and no spaces."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes, what: str) -> Manifest:
        """Read and check a manifest.

        Args:
            content: Its canonical form.
            what: Its name, for messages.

        Returns:
            The manifest.

        Raises:
            StoreError: It is damaged, or its format is newer.
        """
        try:
            values = parse_json_object(content, what)
        except CheckpointError as error:
            raise StoreError(str(error)) from error
        if values.pop("format", None) != FORMAT or set(values) != {f.name for f in fields(cls)}:
            raise StoreError(
                f"{what} is no manifest of format {FORMAT}. It is damaged, or a newer version of "
                "halfbyte wrote it."
            )
        try:
            verdict = values.pop("verdict")
            manifest = cls(
                **{
                    **values,
                    "files": {
                        path: FileRecord(**record) for path, record in values["files"].items()
                    },
                    "base": BaseModel(**values["base"]),
                    "verdict": None if verdict is None else Verdict(**verdict),
                }
            )
        except (TypeError, AttributeError) as error:
            raise StoreError(f"{what} is no manifest: {error}. It is damaged.") from error
        if manifest.to_bytes() != content:
            raise StoreError(f"{what} is not in canonical form. It is damaged.")
        return manifest


def _check_types(record: Any) -> None:
    """Check the fields of a dataclass against their declared types."""
    for name, kind in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not isinstance(value, Mapping if get_origin(kind) is Mapping else kind):
            raise TypeError(f"{name} is {str(value)[:40]!r}")
        if name == "sha256" and not re.fullmatch("[0-9a-f]{64}", str(value)):
            raise TypeError(f"sha256 is {str(value)[:80]!r}")


def read_recipe(folder: Path) -> tuple[dict[str, Any], str | None, dict[str, str]]:
    """Read how a model was quantized: from its report, else from its config.

    Args:
        folder: The model.

    Returns:
        The recipe, the digest of the calibration token ids, and the versions of the tools.
    """
    report = _read(folder / REPORT_FILE)
    if report:
        calibration = report.get("calibration") or {}
        return (
            dict(report.get("config") or {}),
            calibration.get("digest"),
            dict(report.get("versions") or {}),
        )
    config = _read(folder / "config.json")
    section = config.get("quantization_config") or config.get("quantization") or {}
    return dict(section), None, {}


def read_base(folder: Path) -> BaseModel:
    """Read the base model from the front matter of the model card."""
    base = read_front_matter(folder).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return BaseModel(id=base if isinstance(base, str) else None)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path.read_bytes(), str(path))
    except CheckpointError as error:
        raise StoreError(str(error)) from error
