"""Merge an adapter and quantize the result, calibrated on the adapter's task.

::

    base + adapter ──merge.py──> 16-bit folder
    16-bit folder + task's examples and built-in text ──halfbyte.quantize──> GPTQ checkpoint

Rounding can undo what an adapter learned. To prevent that, calibration uses the task's examples,
matching the outputs of the unrounded model (``match_base``). Each example is a sequence of its own:
in a concatenated text, earlier examples would serve as demonstrations, which the real prompts lack.
If that is not enough, ``end_to_end_steps`` trains scales and norm gains on the answers' tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.identity import name_folder
from halfbyte.checkpoint.labels import read_labels
from halfbyte.checkpoint.output_folder import check_outside
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.evaluate.loading import load_tokenizer, open_subject
from halfbyte.finetune.data import Example
from halfbyte.finetune.merge import merge, stored_dtype
from halfbyte.finetune.merge_check import (
    MAX_TOKENS,
    MergeReport,
    held_out_examples,
    read_task,
    score_task,
    split_task_examples,
)
from halfbyte.finetune.third_party_output import quiet_libraries
from halfbyte.machine.memory import release_memory
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.calibration import load_calibration
from halfbyte.quantize.journal import KEPT_PREFIX, WORK_FOLDER
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.source import check_output, find_model

MERGED_FOLDER = f"{KEPT_PREFIX}merged"
"""In the work folder: the 16-bit merge, while it is quantized."""
REQUANTIZING = {"match_base": True}
"""Default settings for quantizing a merge."""


@quiet_libraries()
def merge_and_quantize(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    config: QuantConfig | None = None,
    original: str | Path | None = None,
    calibration: CalibrationConfig | None = None,
    resources: ResourceConfig | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge an adapter and quantize the result, calibrated on the task.

    Args:
        base: As in :func:`merge`.
        adapter: As in :func:`merge`.
        output: Folder for the checkpoint; it must be new, empty, or hold an unfinished run.
        data: Examples of the task. A fifth is held out for evaluation; the others are half of the
            calibration text.
        config: Quantization settings; None: :func:`merging_config`.
        original: As in :func:`merge`.
        calibration: Amount of calibration text; None: 128 sequences of 512 tokens.
        resources: Limits of the run.
        resume: Resume the unfinished run in ``output``. The merge is repeated, finished blocks are
            not.
        progress: Receives the progress of quantizing.

    Returns:
        The report, with the scores of all three models.

    Raises:
        CheckpointError: ``config`` is None and ``base`` is not quantized.
        ConfigError: The output is not empty.
        JournalError: It holds an unfinished run with other inputs, or ``resume`` was not given.
    """
    target = Path(output)
    check_outside(target, find_model(base if original is None else original))
    check_output(target, resume=resume)
    config = config or merging_config(find_model(base))
    calibration = calibration or CalibrationConfig(length=512)
    resources = resources or ResourceConfig()
    # In the run's work folder, so that the next run replaces what a killed one left.
    work = target / WORK_FOLDER / MERGED_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    # The model card uses this folder name.
    merged = work / f"{name_folder(base)}-merged"
    try:
        report = merge(base, adapter, merged, original=original, data=data, device=resources.device)
        release_memory()
        tokenizer = load_tokenizer(merged)
        fitted, _ = split_task_examples(read_task(data, tokenizer, MAX_TOKENS))
        text = task_calibration(fitted, tokenizer, calibration)
        quantize(
            merged,
            target,
            config=config,
            calibration=replace(calibration, samples=len(text)),
            resources=resources,
            text=text,
            resume=resume,
            progress=progress,
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    subject = open_subject(target, dtype=stored_dtype(target), device=resources.device)
    scores = {
        **report.scores,
        "quantized": score_task(subject.model, held_out_examples(data, subject)),
    }
    return replace(report, output=str(target), quantized=True, scores=scores)


def merging_config(folder: Path, **settings: Any) -> QuantConfig:
    """Return the settings to quantize a merge with: the base's scheme and ``REQUANTIZING``.

    Args:
        folder: The base.
        **settings: Fields of ``QuantConfig`` to override.

    Returns:
        The config.

    Raises:
        CheckpointError: The base is not quantized, and no bits are given.
    """
    scheme = {} if "bits" in settings else scheme_of(folder)
    return QuantConfig(**{**scheme, **REQUANTIZING, **settings})


def scheme_of(folder: Path) -> dict[str, Any]:
    """Return the settings that a checkpoint was quantized with.

    Args:
        folder: The checkpoint.

    Returns:
        Its bits, groups, symmetry and order, as fields of ``QuantConfig``.

    Raises:
        CheckpointError: It is not quantized, or damaged.
    """
    labels = read_labels(folder).raw
    if "bits" not in labels or "group_size" not in labels:
        raise CheckpointError(
            f"{folder} names no bits and group size, so its settings cannot be reused. Use --bits "
            "and --group-size."
        )
    linears = open_checkpoint(folder).linears.values()
    return {
        "bits": int(labels["bits"]),
        "group_size": int(labels["group_size"]),
        "symmetric": bool(labels.get("sym", True)),
        "desc_act": bool(labels.get("desc_act", False)),
        "ragged_groups": any(linear.is_ragged for linear in linears),
    }


def task_calibration(
    examples: Sequence[Example], tokenizer: Any, calibration: CalibrationConfig
) -> list[dict[str, list[int]]]:
    """Make calibration sequences: one half from the task, the other from the built-in text.

    Args:
        examples: Of the task. Each becomes a sequence of its own, as in training.
        tokenizer: The model's.
        calibration: Number and length of the sequences; the task's examples get half of the tokens.

    Returns:
        Token ids, with labels for the task's examples.
    """
    half = max(calibration.samples // 2, 1)
    rest = load_calibration(None, replace(calibration, samples=half), tokenizer, None).sequences
    room = half * calibration.length
    needed = sum(len(example.ids) for example in examples)
    chosen = examples[:: max(-(-needed // room), 1)]
    return [
        *({"input_ids": list(e.ids), "labels": list(e.labels)} for e in chosen),
        *({"input_ids": row.tolist()} for row in rest),
    ]
