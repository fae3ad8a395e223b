"""Output folders: check that one is new and outside of the models read; share its files."""

from __future__ import annotations

import stat
from pathlib import Path

from halfbyte.errors import ConfigError


def check_outside(output: Path, *models: Path) -> None:
    """Check that an output is not written into a model's folder: it would become part of it.

    Args:
        output: The folder or file to write.
        *models: Folders of the models that are read.

    Raises:
        ConfigError: It is one of these folders or inside one.
    """
    for model in models:
        if output.resolve().is_relative_to(model.resolve()):
            raise ConfigError(
                f"The output {output} is inside the model's own folder {model}, which must stay "
                "unchanged. Choose a folder outside of it."
            )


def check_new_folder(output: Path, *models: Path) -> None:
    """Check that an output folder does not exist or is empty, and is outside of what is read.

    Args:
        output: The folder.
        *models: Folders of the models that are read.

    Raises:
        ConfigError: It is a file, not empty, or inside a model's folder.
    """
    check_outside(output, *models)
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
