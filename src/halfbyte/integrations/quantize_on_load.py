"""Quantizes a model while Transformers loads it, as ``GPTQConfig`` with a dataset asks for.

::

    from_pretrained(model, quantization_config=GPTQConfig(bits=4, dataset=[...]))
        ──quantize_for_loading──> checkpoint in a temporary folder ──> its files are loaded instead

The model is quantized from its files, one block at a time, before Transformers creates it; so it is
never in memory whole.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import quantization_config as stock

from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import ConfigError
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.calibration_source import fit_to_rows
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.source import find_model

logger = logging.getLogger("halfbyte")

STOCK_DAMPING = inspect.signature(stock.GPTQConfig).parameters["damp_percent"].default
"""Transformers' default, for which halfbyte's own is used."""


def quantize_for_loading(model: str, settings: Any) -> Path:
    """Quantize a model into a temporary folder.

    Args:
        model: Folder of the unquantized model, or its name on the Hub.
        settings: Transformers' ``GPTQConfig``, with a dataset.

    Returns:
        The folder of the checkpoint, whose parent folder the caller deletes.

    Raises:
        ConfigError: A setting is not supported.
        CalibrationError: The dataset is unsuitable or too short.
    """
    if settings.modules_in_block_to_quantize is not None:
        raise ConfigError(
            "GPTQConfig has modules_in_block_to_quantize, which halfbyte does not support. Leave "
            "it out, or quantize into a folder with halfbyte.quantize(..., "
            "config=QuantConfig(skip=...)) and load that."
        )
    damping = settings.damp_percent
    config = QuantConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.sym,
        desc_act=settings.desc_act,
        **({} if damping == STOCK_DAMPING else {"damping": damping}),
    )
    text, calibration = _read_dataset(settings)
    scratch = Path(tempfile.mkdtemp(prefix="halfbyte-"))
    logger.warning(
        "Quantizing %s into a temporary folder while loading it. To do this only once: "
        "save_pretrained, or halfbyte quantize.",
        model,
    )
    try:
        quantize(
            model,
            scratch / "model",
            config=config,
            calibration=calibration,
            resources=ResourceConfig(device="cuda" if torch.cuda.is_available() else "cpu"),
            text=text,
            quality=False,
        )
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return scratch / "model"


def check_quantized_files(model: str, names: Sequence[str]) -> None:
    """Check that the files that :func:`quantize_for_loading` read are those that were asked for.

    Transformers does not tell a quantizer which revision, subfolder, variant or cache to use, but
    later which files these gave.

    Args:
        model: As given to :func:`quantize_for_loading`.
        names: The files that Transformers has resolved.

    Raises:
        ConfigError: They are others.
    """
    folder = find_model(model)
    quantized = {file.resolve() for file in TensorFiles.open(folder).files}
    if {Path(name).resolve() for name in names} != quantized:
        raise ConfigError(
            f"Cannot quantize {model} while loading it: the files of {folder} were quantized, but "
            f"{names[0]} was asked for, by a revision, subfolder, variant or cache_dir. Give the "
            "folder that holds it, without these arguments."
        )


def _read_dataset(settings: Any) -> tuple[list[Any] | None, CalibrationConfig]:
    """Return calibration data and how it is cut."""
    length = settings.model_seqlen or CalibrationConfig().length
    if isinstance(settings.dataset, str):
        logger.warning(
            "GPTQConfig names the dataset '%s', which is not downloaded: halfbyte's built-in "
            "calibration text is used. To use others, pass a list of texts.",
            settings.dataset,
        )
        return None, CalibrationConfig(length=length)
    texts = list(settings.dataset)
    if settings.tokenizer is None or isinstance(settings.tokenizer, str):
        return texts, CalibrationConfig(length=length)
    tokenize = settings.tokenizer
    rows = [tokenize(text)["input_ids"] if isinstance(text, str) else text for text in texts]
    items, calibration = fit_to_rows(rows, CalibrationConfig())
    return items, replace(calibration, length=min(calibration.length, length))
