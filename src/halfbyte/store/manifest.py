"""What a version is made of. Its digest names the version, so it is never edited, only followed.

::

    {"format": 1, "name": ..., "created": ISO time, "parent": version or null,
     "files": {path: {"sha256": ..., "bytes": ...}},
     "base": {"id", "revision", "digest"}, "recipe": {...}, "calibration": digest or null,
     "tools": {package: version}, "verdict": {"verdict", "sha256"} or null}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.header import parse_json_object
from halfbyte.errors import CheckpointError, StoreError

FORMAT = 1
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".npy", ".npz")
"""Reading or importing one can run any program."""
REPORT_FILE = "quantization_report.json"
CARD_FILE = "README.md"
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of a version."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The model that was quantized, as far as it is known."""

    id: str | None = None
    revision: str | None = None
    digest: str | None = None
    """sha256 over the names and digests of its weights and config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a comparison of base and quantized model came to."""

    verdict: str
    sha256: str
    """Of the file that says it, which the store keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a version is."""

    name: str
    created: str
    parent: str | None
    files: Mapping[str, FileRecord]
    base: BaseModel
    recipe: Mapping[str, Any]
    calibration: str | None
    tools: Mapping[str, str]
    verdict: Verdict | None

    @property
    def version(self) -> str:
        """The sha256 of the canonical form, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all files. Unit: bytes."""
        return sum(record.bytes for record in self.files.values())

    def to_bytes(self) -> bytes:
        """Give the canonical form: sorted keys, no spaces."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes, what: str) -> Manifest:
        """Read and check a manifest.

        Args:
            content: Its canonical form.
            what: For messages.

        Returns:
            The manifest.

        Raises:
            StoreError: It is damaged, or of a later format.
        """
        try:
            values = parse_json_object(content, what)
        except CheckpointError as error:
            raise StoreError(str(error)) from error
        if values.pop("format", None) != FORMAT or set(values) != {f.name for f in fields(cls)}:
            raise StoreError(f"{what} is no manifest of format {FORMAT}. The store is damaged.")
        try:
            verdict = values.pop("verdict")
            manifest = cls(
                **{
                    **values,
                    "files": {
                        _check_path(path): FileRecord(**record)
                        for path, record in values["files"].items()
                    },
                    "base": BaseModel(**values["base"]),
                    "verdict": None if verdict is None else Verdict(**verdict),
                }
            )
        except (TypeError, AttributeError) as error:
            raise StoreError(f"{what} is no manifest: {error}. The store is damaged.") from error
        if manifest.to_bytes() != content:
            raise StoreError(f"{what} is not in canonical form. The store is damaged.")
        return manifest


def _check_path(path: str) -> str:
    """Let a file of a version lie nowhere but in its folder."""
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or "\\" in path or ":" in path:
        raise StoreError(f"Refusing a manifest with the file {path[:80]!r}: it is no plain path.")
    return path


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of a model folder that go into a version.

    Args:
        folder: The model.

    Returns:
        Files by their path in the folder, sorted; hidden and unfinished ones are left out.

    Raises:
        StoreError: There is no folder or no weights in it, or a file that can run a program.
    """
    if not folder.is_dir():
        raise StoreError(f"Cannot add {folder}: there is no such folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.name.endswith(".partial"):
            raise StoreError(f"Cannot add {folder}: {relative} is unfinished. Let the run end.")
        if path.suffix in UNSAFE_SUFFIXES:
            raise StoreError(
                f"Refusing to add {folder}: {relative} can run a program when it is read. "
                "A version holds safetensors or GGUF weights; remove the file."
            )
        found[relative.as_posix()] = path
    if not any(name.endswith((".safetensors", ".gguf")) for name in found):
        raise StoreError(f"Cannot add {folder}: it has no .safetensors or .gguf file.")
    return found


def read_recipe(folder: Path) -> tuple[dict[str, Any], str | None, dict[str, str]]:
    """Read how a model was made: from its report, else from its config.

    Args:
        folder: The model.

    Returns:
        Recipe, digest of the calibration's token ids, versions of the tools.
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
    """Read which model was quantized from the front matter of the model card."""
    card = folder / CARD_FILE
    if not card.is_file():
        return BaseModel()
    from huggingface_hub.repocard import metadata_load

    try:
        front = metadata_load(card) or {}
    except ValueError:
        return BaseModel()
    base = front.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return BaseModel(id=base if isinstance(base, str) else None)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_json_object(path.read_bytes(), str(path))
    except CheckpointError as error:
        raise StoreError(str(error)) from error
