"""What stands beside the weights of a model and goes with it: tokenizer, template, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from halfbyte.checkpoint.identity import MANIFEST_FILE
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
)
EXTRA_TEMPLATES_FOLDER = "additional_chat_templates"
"""The folder of the chat templates that a model has beside its own."""


def find_companions(folder: Path) -> list[Path]:
    """Find tokenizer, chat templates, generation settings and licence; never code, never weights.

    Args:
        folder: A model's.

    Returns:
        The files, sorted.

    Raises:
        CheckpointError: One is a link to nowhere or out of the folder.
    """
    found: list[Path] = []
    for path in sorted([*folder.iterdir(), *(folder / EXTRA_TEMPLATES_FOLDER).glob("*.jinja")]):
        named = path.name.endswith(COPIED_SUFFIXES) or path.name.upper().startswith("LICENSE")
        left = path.name in NOT_COPIED or path.name.endswith(".index.json")
        if named and not left and not path.is_dir():
            found.append(check_model_file(folder, str(path.relative_to(folder))))
    return found


def copy_companions(source: Path, output: Path) -> None:
    """Copy what :func:`find_companions` finds.

    Args:
        source: The base model's folder.
        output: The checkpoint's.

    Raises:
        CheckpointError: A file cannot be copied, or is a link to nowhere or out of the folder.
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
