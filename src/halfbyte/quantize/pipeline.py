"""From a Hugging Face folder to a checkpoint, in one call.

Checks what is read and what may be written, takes the output folder for itself, and lets
:class:`halfbyte.quantize.run.Run` do the work.
"""

from __future__ import annotations

from pathlib import Path

import torch

from halfbyte.checkpoint.companions import find_companions
from halfbyte.machine.devices import resolve_device
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.calibration_source import CalibrationSource
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.progress import Progress, SilentProgress
from halfbyte.quantize.report import QuantizationReport, load_report
from halfbyte.quantize.run import Run
from halfbyte.quantize.source import (
    HubOptions,
    check_apart,
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
        model: A Hugging Face model folder, or a name on the Hub that is fetched there.
        output: Folder for the checkpoint; it must be new, empty, or hold an unfinished run.
        config: How weights are rounded.
        calibration: How much text, in what portions.
        resources: What the run may use.
        text: Calibration data; None: the built-in text.
        resume: Go on with the unfinished run in ``output``.
        quality: Run held-out text through both models beside the calibration text.
        progress: Told how far the run is.
        hub: Which files of the model are meant, and how to fetch them.

    Returns:
        The report, which also stands in ``output``.

    Raises:
        ConfigError: A setting is wrong, or the output folder is in use.
        ModelError: The model cannot be streamed or quantized.
        CheckpointError: The model's files are damaged, or the disk is full.
        CalibrationError: The text cannot support the maths.
        JournalError: The run in the folder belongs to other inputs or options.
        VerificationError: What was saved does not compute what was measured.
    """
    source, target = find_model(model, hub or HubOptions()), Path(output)
    check_apart(source, target)
    complete = check_output(target, resume=resume)
    find_companions(source)  # copied at the end of the run, refused at its beginning
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
    finally:
        torch.set_num_threads(threads)
        progress.finished()
