"""Base and adapter -> one model, quantized again, that still does the adapter's task.

::

    base + adapter ──merge.py──> 16-bit folder
    16-bit folder + task's examples and built-in text ──halfbyte.quantize──> GPTQ checkpoint

Rounding can undo what an adapter learned. What keeps it is calibration on the task as it is asked:
every example a sequence of its own, beside the unrounded model. Behind one another, examples show
how the task is done, and codes that are right there are not right for the first answer. Where that
is not enough, ``end_to_end_steps`` trains scales and norm gains on the tokens of the answers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.identity import name_folder
from halfbyte.checkpoint.labels import read_labels
from halfbyte.errors import CheckpointError
from halfbyte.evaluate.loading import load_tokenizer, open_subject
from halfbyte.finetune.data import Example
from halfbyte.finetune.merge import merge, stored_dtype
from halfbyte.finetune.merge_check import (
    LONGEST,
    MergeReport,
    divide_examples,
    judging_examples,
    read_task,
    score_task,
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
"""In the work folder: the merge in 16 bits, while it is quantized."""
REQUANTIZING = {"match_base": True}
"""Settings of a merge that is quantized again, where no others are given."""


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
    """Merge an adapter and quantize the result, calibrated on the task's text.

    Args:
        base: As in :func:`merge`.
        adapter: As in :func:`merge`.
        output: Folder for the checkpoint; it must be new, empty, or hold an unfinished run.
        data: Examples of the task: half of the calibration text, trained on, and judged by; those
            that judge are kept apart from the rest.
        config: How to round; None: :func:`merging_config`.
        original: As in :func:`merge`.
        calibration: How much text; None: 128 sequences of 512 tokens.
        resources: What the run may use.
        resume: Go on with the unfinished run in ``output``. The merge is made again, the blocks
            that are done are not.
        progress: Told how far quantizing is.

    Returns:
        What it came to, with the scores of all three models.

    Raises:
        CheckpointError: ``config`` is None and ``base`` is not quantized.
        ConfigError: The output is in use.
        JournalError: It holds an unfinished run of something else, or ``resume`` was not given.
    """
    target = Path(output)
    check_output(target, resume=resume)
    config = config or merging_config(find_model(base))
    calibration = calibration or CalibrationConfig(length=512)
    resources = resources or ResourceConfig()
    # In the run's own folder: what a kill leaves there, the next run finds and replaces.
    work = target / WORK_FOLDER / MERGED_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    # The model card will name it.
    merged = work / f"{name_folder(base)}-merged"
    try:
        report = merge(base, adapter, merged, original=original, data=data, device=resources.device)
        release_memory()
        tokenizer = load_tokenizer(merged)
        fitted, _ = divide_examples(read_task(data, tokenizer, LONGEST))
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
        "quantized": score_task(subject.model, judging_examples(data, subject)),
    }
    values = {**asdict(report), "output": str(target), "quantized": True, "scores": scores}
    return MergeReport(**values)


def merging_config(folder: Path, **settings: Any) -> QuantConfig:
    """Give the settings to quantize a merge with: the base's scheme, and what keeps the task.

    Args:
        folder: The base.
        **settings: Fields of ``QuantConfig`` that are given.

    Returns:
        The config.

    Raises:
        CheckpointError: The base is not quantized, and no bits are given.
    """
    scheme = {} if "bits" in settings else scheme_of(folder)
    return QuantConfig(**{**scheme, **REQUANTIZING, **settings})


def scheme_of(folder: Path) -> dict[str, Any]:
    """Give the settings that a checkpoint was quantized with.

    Args:
        folder: The checkpoint.

    Returns:
        Its bits, groups, symmetry and order, as fields of ``QuantConfig``.

    Raises:
        CheckpointError: It is not quantized.
    """
    labels = read_labels(folder).raw
    if "bits" not in labels or "group_size" not in labels:
        raise CheckpointError(
            f"{folder} names no bits and group size, so its settings cannot be taken over. "
            "Give --bits and --group-size."
        )
    return {
        "bits": int(labels["bits"]),
        "group_size": int(labels["group_size"]),
        "symmetric": bool(labels.get("sym", True)),
        "desc_act": bool(labels.get("desc_act", False)),
        "ragged_groups": bool(labels.get("dynamic")),
    }


def task_calibration(
    examples: Sequence[Example], tokenizer: Any, calibration: CalibrationConfig
) -> list[dict[str, list[int]]]:
    """Make calibration sequences of which half are the task's and the rest the built-in text.

    Args:
        examples: Of the task. Each stays a sequence of its own, as it was trained and will be
            asked: behind another one, which shows how it is done, the task is an easier one.
        tokenizer: The model's.
        calibration: How many of what length; the task's may have as many tokens as the others.

    Returns:
        Token ids; the task's with labels.
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
