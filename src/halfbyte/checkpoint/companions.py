"""Auxiliary files of a model folder: tokenizer, chat templates, generation config, license."""

from __future__ import annotations

import shutil
from pathlib import Path

from halfbyte.checkpoint.identity import MANIFEST_FILE, VERDICT_FILE
from halfbyte.checkpoint.safe_path import check_model_file
from halfbyte.errors import CheckpointError

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
NOT_COPIED = (
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "checksums.json",
    "quantization_report.json",
    MANIFEST_FILE,
    VERDICT_FILE,
)
EXTRA_TEMPLATES_FOLDER = "additional_chat_templates"
"""Folder of a model's chat templates other than the default one."""


def find_companions(folder: Path) -> list[Path]:
    """Find tokenizer, chat templates, generation config and license; never code or weights.

    Args:
        folder: A model folder.

    Returns:
        The files, sorted.

    Raises:
        CheckpointError: A file is a link that is broken or leaves the folder.
    """
    found: list[Path] = []
    for path in sorted([*folder.iterdir(), *(folder / EXTRA_TEMPLATES_FOLDER).glob("*.jinja")]):
        is_included = path.name.endswith(COPIED_SUFFIXES) or path.name.upper().startswith("LICENSE")
        is_excluded = path.name in NOT_COPIED or path.name.endswith(".index.json")
        if is_included and not is_excluded and not path.is_dir():
            found.append(check_model_file(folder, str(path.relative_to(folder))))
    return found


def copy_companions(source: Path, output: Path) -> None:
    """Copy the files that :func:`find_companions` finds.

    Args:
        source: Folder of the base model.
        output: Folder of the checkpoint.

    Raises:
        CheckpointError: A file cannot be copied, or is a link that is broken or leaves the folder.
    """
    for path in find_companions(source):
        place = output / path.relative_to(source)
        try:
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
        except OSError as error:
            raise CheckpointError(
                f"Cannot copy {path} to {output}: {error.strerror}. Free some space."
            ) from error
