"""Round the output head on the hidden states behind the last block."""

from __future__ import annotations

from torch import nn

from halfbyte.model.blocks import Stage, linear_tensors
from halfbyte.quantize.block_plan import plan_tasks
from halfbyte.quantize.block_walk import BlockWalk
from halfbyte.quantize.rounding import RoundedLinear
from halfbyte.quantize.run_states import BASE_CALIBRATION


def round_head(walk: BlockWalk, stream: str) -> tuple[list[RoundedLinear], list[str]]:
    """Round the output head, if the model has one that can be quantized.

    Args:
        walk: The walk of the run, after the last block.
        stream: Stream of the calibration text through the final blocks.

    Returns:
        The rounded head, or an empty list; and notes for the report.
    """
    work, end = walk.work, len(walk.work.weights.blocks.modules)
    model = work.weights.model
    head = model.get_output_embeddings()
    name = head_name(model)
    if name is None:
        return [], ["the head was not quantized: the model has no separate head"]
    tied = head.weight is model.get_input_embeddings().weight
    work.stages = [Stage.of(name)]
    exact = {name: linear_tensors(head)}
    tasks, skipped = plan_tasks("", model, exact, work.config, work.weights.disk_name)
    if not tasks:
        return [], [f"the head was not quantized: {skipped[0].reason}"]
    with work.stream.at(end, work.stages):
        passes = walk.passes(stream, end, keep_paused=False)
        base_passes = None
        if work.config.match_base:
            base_passes = walk.passes(BASE_CALIBRATION, end, keep_paused=False)
        rounded = work.round_block(model, tasks, passes, base_passes)
    note = "the head was untied from the embeddings, which stay unchanged"
    return rounded, [note] if tied else []


def head_name(model: nn.Module) -> str | None:
    """Return the name of a model's output head; None if it has no separate one."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((n for n, m in model.named_modules() if m is head and n), None)
