"""The output head, rounded on what reaches it behind the last block."""

from __future__ import annotations

from torch import nn

from halfbyte.model.blocks import InputGroup, Stage, linear_tensors
from halfbyte.quantize.block_plan import plan_tasks
from halfbyte.quantize.block_walk import BlockWalk
from halfbyte.quantize.rounding import RoundedLinear
from halfbyte.quantize.run_states import BASE_CALIBRATION


def round_head(walk: BlockWalk, stream: str) -> tuple[list[RoundedLinear], list[str]]:
    """Round the output head, where the model has one that can be.

    Args:
        walk: All blocks are done.
        stream: Of the calibration text, through the blocks as they are in the end.

    Returns:
        The rounded head, or nothing; and what is to be told of it.
    """
    work, end = walk.work, len(walk.work.weights.blocks.modules)
    model = work.weights.model
    head = model.get_output_embeddings()
    name = head_name(model)
    if name is None:
        return [], ["the head stays as it is: the model has none of its own"]
    tied = head.weight is model.get_input_embeddings().weight
    work.stages = [Stage(groups=(InputGroup(linears=(name,)),))]
    exact = {name: linear_tensors(head)}
    tasks, skipped = plan_tasks("", model, exact, work.config, work.weights.disk_name)
    if not tasks:
        return [], [f"the head stays as it is: {skipped[0].reason}"]
    with work.stream.at(end, work.stages):
        passages = walk.passages(stream, end, keep_paused=False)
        base_passages = None
        if work.config.match_base:
            base_passages = walk.passages(BASE_CALIBRATION, end, keep_paused=False)
        rounded = work.round_block(model, tasks, passages, base_passages)
    note = "the head was untied from the embeddings, which stay as they are"
    return rounded, [note] if tied else []


def head_name(model: nn.Module) -> str | None:
    """Give the head's name within a model; None where it has none of its own."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((n for n, m in model.named_modules() if m is head and n), None)
