"""End-to-end training as a stage of a run, after all blocks are written.

::

    finished shards -> student -> end_to_end.py -> trained scales and gains
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
from halfbyte.quantize.end_to_end import EndToEndData, EndToEndTuning, TuningState
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.probe import Probe
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.report import EndToEndReport
from halfbyte.quantize.resources import RunSettings
from halfbyte.quantize.run_states import BASE_CALIBRATION, CALIBRATION, PROBE, TUNED, RunStates
from halfbyte.quantize.student import Student

STATE_FILE = "end-to-end.safetensors"
NOTE = "its scales were trained end to end"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndResult:
    """The result of end-to-end training."""

    report: EndToEndReport | None = None
    outside: dict[str, Tensor] = field(default_factory=dict)
    """Changed tensors outside the blocks, by name on disk."""
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was kept."""
        return self.report is not None and self.report.kept_step > 0


def tune_end_to_end(
    weights: ModelWeights,
    stream: BlockStream,
    states: RunStates,
    *,
    journal: Journal,
    batches: Sequence[Tensor],
    token_weights: Sequence[Tensor] | None,
    probe: Probe,
    settings: RunSettings,
    steps: int,
    seed: int,
    with_calibration: bool,
    progress: Progress,
) -> EndToEndResult:
    """Train scales and norm gains, and rewrite the shards with them.

    Args:
        weights: The base model; all blocks are finished and none is loaded.
        stream: Runs blocks.
        states: Hidden states of the run, behind the last block.
        journal: Gets the blocks' new entries.
        batches: Calibration ids.
        token_weights: Weight of the prediction at each token, by batch; None: all equal.
        probe: Run through the trained blocks, to measure quality afterwards.
        settings: Resource settings of the run.
        steps: Maximum number of training steps.
        seed: Shuffles the batches.
        with_calibration: Whether to run the calibration text through the trained blocks too.
        progress: Shows the held-out KL.

    Returns:
        The result.
    """
    device, end = weights.device, len(weights.blocks.modules)
    data = EndToEndData(
        ids=lambda batch: batches[batch].to(device),
        base=lambda batch: states.at(BASE_CALIBRATION, end).read(batch).to(device),
        num_batches=len(batches),
        weights=None if token_weights is None else token_weights.__getitem__,
    )
    obstacle = data.find_obstacle()
    if obstacle is not None:
        return EndToEndResult(notes=(f"not trained end to end: {obstacle}",))
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

        def on_check(state: TuningState) -> None:
            progress.tuned(state.step, steps, state.checks[-1][1], state.best)

        state = tuning.run(on_check)
        report = _make_report(state)
        if not state.best_step:
            note = f"end-to-end training did not help: held-out KL stayed at {state.best:.4f}"
            return EndToEndResult(report=report, notes=(note,))
        progress.phase("writing the trained scales")
        probe_ids = probe.ids.to(device)
        for index in range(end):
            changed, dequantized = student.export_block(index)
            entry = rewrite_block(journal.output, journal.blocks[index], changed, dequantized, NOTE)
            journal.replace_block(index, entry)
            with torch.no_grad(), student.enter(index), stream.at(index):
                states.run_probe(TUNED[PROBE], index, stream, probe_ids)
                if with_calibration:
                    _run_calibration(states, index, stream, batches, device)
        return EndToEndResult(report=report, outside=student.export_outside())
    finally:
        student.close()


def _make_report(state: TuningState) -> EndToEndReport:
    return EndToEndReport(
        steps=state.step,
        kept_step=state.best_step,
        kl_before=state.checks[0][1],
        kl_after=state.best,
        looks=tuple(state.checks),
        stopped=state.stopped,
    )


def _run_calibration(
    states: RunStates,
    index: int,
    stream: BlockStream,
    batches: Sequence[Tensor],
    device: torch.device,
) -> None:
    """Run the calibration text through a trained block."""
    before, behind = (states.at(TUNED[CALIBRATION], index + k) for k in (0, 1))
    for batch, ids in enumerate(batches):
        hidden = before.read(batch).to(device) if index else None
        behind.write(batch, stream.run(ids.to(device), hidden))
