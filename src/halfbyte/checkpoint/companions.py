"""What stands beside the weights of a model and goes with it: tokenizer, template, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from halfbyte.errors import CheckpointError

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
NOT_COPIED = (
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "checksums.json",
    "quantization_report.json",
)


def copy_companions(source: Path, output: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence; never code, never weights.

    Args:
        source: The base model's folder.
        output: The checkpoint's.

    Raises:
        CheckpointError: A file cannot be copied.
    """
    for path in sorted(source.iterdir()):
        named = path.name.endswith(COPIED_SUFFIXES) or path.name.upper().startswith("LICENSE")
        left = path.name in NOT_COPIED or path.name.endswith(".index.json")
        if not path.is_file() or not named or left:
            continue
        try:
            shutil.copyfile(path, output / path.name)
        except OSError as error:
            raise CheckpointError(
                f"Cannot copy {path} to {output}: {error.strerror}. Free some space."
            ) from error
