"""Output folders: check that one is new or empty, and make its files readable."""

from __future__ import annotations

import stat
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


def share_weights(folder: Path) -> None:
    """Make the weights in a folder readable by whoever may read the folder.

    safetensors writes its files for their owner only, whatever the umask; another user, such as
    that of a service, could then not load the model.

    Args:
        folder: Where ``save_pretrained`` has written.
    """
    readers = folder.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    for path in folder.glob("*.safetensors"):
        path.chmod(stat.S_IMODE(path.stat().st_mode) | readers)
