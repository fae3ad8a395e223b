"""The last step before a checkpoint is described: train the whole model, write its shards again.

::

    finished shards -> student -> end_to_end.py -> better scales and gains
                    -> [rewrite shard, journal, run the probe through the block] x n
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.model.blockwise_backward import BlockChain
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights
from halfbyte.quantize.block_shard import rewrite_block
from halfbyte.quantize.end_to_end import EndToEndTuning, TuningState, WholeData
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.probe import Probe
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.report import EndToEndReport
from halfbyte.quantize.resources import RunSettings
from halfbyte.quantize.run_states import BASE_CALIBRATION, CALIBRATION, PROBE, TUNED, RunStates
from halfbyte.quantize.student import Student

STATE_FILE = "end-to-end.safetensors"
NOTE = "its scales were trained with the whole model's"


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTuning:
    """What came of training the whole model."""

    report: EndToEndReport | None = None
    outside: dict[str, Tensor] = field(default_factory=dict)
    """Changed tensors outside the blocks, by name on disk."""
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was kept."""
        return self.report is not None and self.report.kept_step > 0


def tune_whole(
    weights: ModelWeights,
    stream: BlockStream,
    states: RunStates,
    *,
    journal: Journal,
    batches: Sequence[Tensor],
    weights_of_tokens: Sequence[Tensor] | None,
    probe: Probe,
    settings: RunSettings,
    steps: int,
    seed: int,
    with_calibration: bool,
    progress: Progress,
) -> WholeTuning:
    """Train scales and norm gains, and write again what that changed.

    Args:
        weights: The base model; all blocks are finished and none is loaded.
        stream: Runs blocks.
        states: Of the run, behind the last block.
        journal: Gets the blocks' new entries.
        batches: Calibration ids.
        weights_of_tokens: How much the prediction behind each of them counts; None: all alike.
        probe: Goes through the blocks once more.
        settings: Of the run.
        steps: Training steps at most.
        seed: Orders the batches.
        with_calibration: Whether the calibration text goes through the blocks once more, too.
        progress: Told the held-out KL.

    Returns:
        What came of it.
    """
    device, end = weights.device, len(weights.blocks.modules)
    data = WholeData(
        ids=lambda batch: batches[batch].to(device),
        base=lambda batch: states.at(BASE_CALIBRATION, end).read(batch).to(device),
        num_batches=len(batches),
        weights=None if weights_of_tokens is None else weights_of_tokens.__getitem__,
    )
    if not data.check:
        return WholeTuning(notes=("not trained end to end: too little text to confirm it",))
    progress.phase("training scales and gains of the whole model")
    student = Student(
        weights,
        [journal.output / entry["shard"]["file_name"] for entry in journal.blocks],
        [[module["name"] for module in entry["modules"]] for entry in journal.blocks],
        dtype=settings.torch_dtype,
        resident=settings.keep_codes,
    )
    try:
        tuning = EndToEndTuning(
            BlockChain(stream, student.enter),
            student,
            data,
            journal.folder / STATE_FILE,
            steps=steps,
            seed=seed,
        )

        def on_look(state: TuningState) -> None:
            progress.tuned(state.step, steps, state.looks[-1][1], state.best)

        state = tuning.run(on_look)
        report = EndToEndReport(
            steps=state.step,
            kept_step=state.best_step,
            kl_before=state.looks[0][1],
            kl_after=state.best,
            looks=tuple(state.looks),
            stopped=state.stopped,
        )
        if not state.best_step:
            told = f"training end to end did not help: held-out KL stayed at {state.best:.4f}"
            return WholeTuning(report=report, notes=(told,))
        progress.phase("writing the trained scales")
        for index in range(end):
            changed, dequantized = student.export_block(index)
            entry = rewrite_block(journal.output, journal.blocks[index], changed, dequantized, NOTE)
            journal.replace_block(index, entry)
            with torch.no_grad(), student.enter(index), stream.at(index):
                states.run_probe(TUNED[PROBE], index, stream, probe.ids.to(device))
                if with_calibration:
                    _pass_on(states, index, stream, batches, device)
        return WholeTuning(report=report, outside=student.export_outside())
    finally:
        student.close()


def _pass_on(
    states: RunStates,
    index: int,
    stream: BlockStream,
    batches: Sequence[Tensor],
    device: torch.device,
) -> None:
    before, behind = (states.at(TUNED[CALIBRATION], index + k) for k in (0, 1))
    for batch, ids in enumerate(batches):
        hidden = before.read(batch).to(device) if index else None
        behind.write(batch, stream.run(ids.to(device), hidden))
