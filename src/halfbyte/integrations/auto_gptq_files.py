"""Weights files for AutoGPTQ's classes: which one to read, and where a checkpoint may be saved."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any
from weakref import finalize

from halfbyte.checkpoint.labels import read_quantization_config
from halfbyte.checkpoint.shards import INDEX_SUFFIX, SINGLE_FILE
from halfbyte.errors import ConfigError

logger = logging.getLogger("halfbyte")


def find_weights_file(folder: Path, basename: str | None) -> str | None:
    """Find the weights that ``model_basename`` names.

    Args:
        folder: A checkpoint.
        basename: Name of the file without ``.safetensors``; None: AutoGPTQ's own name if there is
            such a file, which it can save beside an unquantized ``model.safetensors``.

    Returns:
        The name of the file or its index; None for the folder's usual weights. A name that matches
        no file is reported and not used, because many repositories have renamed theirs.
    """
    if basename is None:
        found = [path.name for path in folder.glob("gptq_model*.safetensors")]
        return found[0] if len(found) == 1 else None
    stem = basename.removesuffix(".safetensors")
    for name in (f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}"):
        if (folder / name).is_file():
            return name
    logger.warning(
        "model_basename is '%s', but %s has no %s.safetensors: its usual weights are read.",
        basename,
        folder,
        stem,
    )
    return None


def prepare_target(target: Path) -> None:
    """Create a folder to save into; check that this overwrites no unquantized model.

    Args:
        target: The folder; may exist.

    Raises:
        ConfigError: It is a file, or holds the weights of an unquantized model.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"Cannot save to {target}: it is a file. Name a folder.")
    weights = [name for name in (SINGLE_FILE, f"model{INDEX_SUFFIX}") if (target / name).is_file()]
    if weights and not read_quantization_config(target):
        raise ConfigError(
            f"Cannot save to {target}: it holds an unquantized model ({weights[0]}), whose files "
            "would be overwritten. Choose another folder."
        )
    target.mkdir(parents=True, exist_ok=True)


def move_out_of_scratch(source: Path, target: Path, scratch: finalize[..., Any]) -> None:
    """Move a checkpoint out of its temporary folder, in place of an earlier one in the target.

    If this fails, the temporary folder is kept: it may hold hours of work.

    Args:
        source: The checkpoint.
        target: Folder to move its files to.
        scratch: Deletes the temporary folder.

    Raises:
        ConfigError: As in :func:`prepare_target`.
        OSError: A file cannot be moved.
    """
    try:
        prepare_target(target)
        # A single file of an earlier checkpoint would be read instead of the new shards.
        (target / SINGLE_FILE).unlink(missing_ok=True)
        for path in source.rglob("*"):
            if path.is_file():
                place = target / path.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.move(path, place)
    except (ConfigError, OSError):
        scratch.detach()
        logger.warning("The quantized model was not saved; it stays in %s.", source)
        raise
    scratch()
