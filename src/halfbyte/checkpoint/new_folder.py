"""Check that an output folder is new or empty."""

from __future__ import annotations

from pathlib import Path

from halfbyte.errors import ConfigError


def check_new_folder(output: Path) -> None:
    """Check that an output folder does not exist or is empty.

    Args:
        output: The folder.

    Raises:
        ConfigError: It is a file, or not empty.
    """
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"The output {output} exists and is not empty. Choose a new folder, or remove this one."
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"The output {output} is a file. Name a folder.")
