"""The entry point of quantization: from a Hugging Face model folder to a checkpoint.

Checks the input and output folders, locks the output folder, and starts a
:class:`halfbyte.quantize.run.Run`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from halfbyte.checkpoint.companions import find_companions
from halfbyte.checkpoint.output_folder import check_outside
from halfbyte.config_fields import check_config
from halfbyte.errors import CheckpointError
from halfbyte.machine.devices import resolve_device
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.calibration_source import CalibrationSource
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.progress import Progress, SilentProgress
from halfbyte.quantize.report import QuantizationReport, load_report
from halfbyte.quantize.run import Run
from halfbyte.quantize.source import (
    HubOptions,
    check_output,
    find_model,
)


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    config: QuantConfig | None = None,
    calibration: CalibrationConfig | None = None,
    resources: ResourceConfig | None = None,
    text: CalibrationSource = None,
    resume: bool = False,
    quality: bool = True,
    progress: Progress | None = None,
    hub: HubOptions | None = None,
) -> QuantizationReport:
    """Quantize a model folder into a standard GPTQ checkpoint.

    Args:
        model: A Hugging Face model folder, or the name of a model on the Hub.
        output: Folder of the checkpoint; it must be new, empty, or hold an unfinished run.
        config: How weights are rounded.
        calibration: Number, length and batch size of the calibration sequences.
        resources: Device, dtype and memory of the run.
        text: Calibration data; None: the built-in text.
        resume: Resume the unfinished run in ``output``.
        quality: Measure quality by running held-out text through both models.
        progress: Reports the progress of the run.
        hub: Which files of the model to use, and how to download them.

    Returns:
        The report, which is also saved in ``output``.

    Raises:
        ConfigError: A setting is wrong, or the output folder is in use.
        ModelError: The model cannot be streamed or quantized.
        CheckpointError: The model's files are damaged, or the disk is full.
        CalibrationError: The calibration text is unsuitable or too short.
        JournalError: The unfinished run in the folder has other inputs or options.
        VerificationError: The saved checkpoint does not reproduce the run's results.
    """
    check_config(config, QuantConfig)
    check_config(calibration, CalibrationConfig)
    check_config(resources, ResourceConfig)
    source, target = find_model(model, hub or HubOptions()), Path(output)
    check_outside(target, source)
    complete = check_output(target, resume=resume)
    find_companions(source)  # fails early if a file that is copied at the end is unusable
    device = resolve_device((resources or ResourceConfig()).device)
    progress = progress or SilentProgress()
    journal = Journal(target)
    run = Run(
        name=str(model),
        source=source,
        journal=journal,
        config=config or QuantConfig(),
        calibration=calibration or CalibrationConfig(),
        resources=resources or ResourceConfig(),
        device=device,
        progress=progress,
    )
    threads = torch.get_num_threads()
    try:
        if complete:
            return run.recall(load_report(target), text, quality=quality)
        target.mkdir(parents=True, exist_ok=True)
        with journal, torch.no_grad():
            return run.execute(text, resume=resume, quality=quality)
    except CheckpointError as error:
        if not journal.blocks:
            raise
        # Such as a full disk: the next attempt needs to do only the rest.
        raise CheckpointError(f"{error} Finished blocks are kept for --resume.") from error
    finally:
        torch.set_num_threads(threads)
        progress.finished()
