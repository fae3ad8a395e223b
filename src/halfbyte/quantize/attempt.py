"""One attempt at a quantization run, with fixed settings.

An attempt does whatever the journal does not record as finished::

    [block: load, round, write shard, save hidden states, journal] x n
        -> head, embeddings, norms -> index, configs, tokenizer -> reload and compare -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from halfbyte.checkpoint.checksums import ShardDigest
from halfbyte.machine.facts import installed_versions, machine_facts
from halfbyte.machine.memory import peak_memory_bytes
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.block_walk import BlockWalk
from halfbyte.quantize.block_work import BlockWork
from halfbyte.quantize.block_writer import BlockWriter
from halfbyte.quantize.calibration import CalibrationTokens
from halfbyte.quantize.end_to_end_stage import EndToEndResult, tune_end_to_end
from halfbyte.quantize.finish import (
    ModuleSummary,
    save_report,
    summarize_modules,
    write_descriptions,
    write_outside,
)
from halfbyte.quantize.head import head_name, round_head
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.meter import Meter
from halfbyte.quantize.mixed_precision import choose_bits
from halfbyte.quantize.probe import (
    KEPT_LOGITS,
    Probe,
    ProbeTrace,
    WindowLogits,
    compute_logits,
    measure_quality,
)
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.reload import check_bytes, check_outputs
from halfbyte.quantize.report import (
    CalibrationReport,
    QualityReport,
    QuantizationReport,
)
from halfbyte.quantize.resources import RunSettings
from halfbyte.quantize.rounding import RoundedLinear
from halfbyte.quantize.run_states import BASE_PROBE, CALIBRATION, PROBE, TUNED, RunStates
from halfbyte.quantize.token_gradients import measure_token_weights

WEIGHTS_FOLDER = "token-weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTask:
    """Inputs that all attempts of a run share."""

    name: str
    """The model's name as the user gave it."""
    journal: Journal
    config: QuantConfig
    seed: int
    tokens: CalibrationTokens
    probe: Probe
    progress: Progress
    meter: Meter
    notes: list[str]
    """For the report; appended to during the run."""
    start: float
    """``time.monotonic()`` when the run began."""


class Attempt:
    """One attempt at a run and its state."""

    def __init__(self, task: RunTask, settings: RunSettings, weights: ModelWeights) -> None:
        """Split the text into batches; no weights are loaded yet.

        Args:
            task: Inputs of the run.
            settings: Resource settings of this attempt.
            weights: The model, with no weights loaded.
        """
        self.task = task
        self.journal, self.config, self.progress = task.journal, task.config, task.progress
        self.tokens, self.probe, self.meter = task.tokens, task.probe, task.meter
        self.notes = task.notes
        self.settings = settings
        self.weights = weights
        self.num_blocks = len(weights.blocks.modules)
        torch.set_num_threads(settings.threads)
        self.batches = self.tokens.batches(settings.batch_size)
        self.stream = BlockStream(weights.model, weights.blocks, settings.torch_dtype)
        for index, entry in enumerate(self.journal.blocks):
            self.stream.output_sizes[index] = entry["output_size"]
        self._base_logits: WindowLogits | None = None
        """Of all windows, if the tail that computed them is about to change."""

    def run(self) -> QuantizationReport:
        """Do everything that is not finished yet.

        Returns:
            The report, which is also saved in the output folder.
        """
        with self.meter.timed("load"):
            self.weights.load_outside()
        with self._open_states() as states:
            if self.journal.blocks:
                states.check(len(self.journal.blocks), self.journal.blocks[-1]["states"])
            work = BlockWork(
                self.weights,
                self.stream,
                self.config,
                hessian_bytes=self.settings.hessian_bytes,
                on_linear=lambda rounded: self.progress.module_done(rounded.report),
                meter=self.meter,
            )
            if self.config.chooses_bits:
                self._choose_bits(work)
            if self.config.weigh_tokens:
                self._weigh_tokens(work)
            walk = BlockWalk(
                work=work,
                states=states,
                journal=self.journal,
                probe=self.probe,
                batches=self.batches,
                settings=self.settings,
                seed=self.task.seed,
            )
            # Listed before the first block's experts are split, which changes its parameters.
            kinds = self.weights.blocks.first_of_each_kind()
            with BlockWriter(self.journal, in_background=self.settings.hold_states) as writer:
                outside = None
                if not (self.config.lm_head or self.config.end_to_end_steps):
                    outside = writer.start(self._write_outside)
                for index in range(len(self.journal.blocks), self.num_blocks):
                    self.progress.block_started(index, self.num_blocks)
                    walk.quantize_block(index, writer)
                    if index == 0:
                        first_window = self.probe.ids[:1].to(self.weights.device)
                        self.stream.check_block_order(first_window)
                        walk.check_blocks(kinds[1:], first_window)
                with self.meter.timed("write"):
                    writer.wait()
                tuning = self._tune_end_to_end(states)
                return self._finish(walk, tuning, outside)

    def _write_outside(
        self, head: Sequence[RoundedLinear] = (), changed: Mapping[str, Tensor] | None = None
    ) -> ShardDigest:
        return write_outside(self.weights, self.journal.output, head, changed or {})

    def _choose_bits(self, work: BlockWork) -> None:
        """Choose the bits of every module, once per run."""
        with self.meter.timed("survey"):
            work.config, notes = choose_bits(
                self.weights,
                self.stream,
                work,
                self.config,
                batches=self.batches,
                seed=self.task.seed,
                folder=self.journal.folder,
                progress=self.progress,
            )
        self.notes += notes

    def _weigh_tokens(self, work: BlockWork) -> None:
        """Measure the weight of each calibration token, once per run."""
        with self.meter.timed("token weights"):
            work.token_weights = measure_token_weights(
                work,
                self.batches,
                self.tokens.weight_batches(self.settings.batch_size),
                seed=self.task.seed,
                folder=self.journal.folder / WEIGHTS_FOLDER,
                on_portion=self.progress.phase,
            )

    def _open_states(self) -> RunStates:
        return RunStates(
            self.journal.folder,
            self.batches,
            self.probe,
            num_blocks=self.num_blocks,
            token_shape=self.stream.token_shape,
            dtype=self.settings.torch_dtype,
            match_base=self.config.match_base,
            tuned=self._tuned_streams,
            on_device=self.settings.hold_states,
        )

    @property
    def _tuned_streams(self) -> tuple[str, ...]:
        if not self.config.end_to_end_steps:
            return ()
        return (PROBE, CALIBRATION) if self.config.lm_head else (PROBE,)

    def _tune_end_to_end(self, states: RunStates) -> EndToEndResult:
        """Train scales and norm gains of the whole model, if the config says so."""
        if not self.config.end_to_end_steps:
            return EndToEndResult()
        with self.meter.timed("end to end"):
            # Before training, which also changes the norm and head behind the last block.
            if states.has_base:
                self._keep_base_logits(states)
            return tune_end_to_end(
                self.weights,
                self.stream,
                states,
                journal=self.journal,
                batches=self.batches,
                token_weights=self.tokens.weight_batches(self.settings.batch_size),
                probe=self.probe,
                settings=self.settings,
                steps=self.config.end_to_end_steps,
                seed=self.task.seed,
                with_calibration=CALIBRATION in self._tuned_streams,
                progress=self.progress,
            )

    def _finish(
        self, walk: BlockWalk, tuning: EndToEndResult, outside: Callable[[], ShardDigest] | None
    ) -> QuantizationReport:
        """Measure quality, write the remaining files, verify the checkpoint, and report."""
        quantized = {PROBE: PROBE, CALIBRATION: CALIBRATION} | (TUNED if tuning.changed else {})
        head: list[RoundedLinear] = []
        if self.config.lm_head:
            if walk.states.has_base and self._base_logits is None:
                self._keep_base_logits(walk.states)
            self.progress.phase("quantizing the head")
            head, notes = round_head(walk, quantized[CALIBRATION])
            self.notes += notes
        summary = summarize_modules(self.journal.blocks, head)
        head_module = head_name(self.weights.model)
        names = summary.names if head_module is None else summary.names | {head_module}
        self.notes += [*tuning.notes, *self.config.unmatched_patterns(names)]
        self.progress.phase("measuring quality")
        logits = self._logits(walk.states, quantized[PROBE])
        quality = None
        with self.meter.timed("quality"):
            if walk.states.has_base:
                base_logits = self._base_logits or self._logits(walk.states, BASE_PROBE)
                quality = measure_quality(self.probe, base_logits, logits, self.weights.device)
            kept_logits = logits(0)[-KEPT_LOGITS:].clone()
        self._base_logits = None
        shards = self._write_rest(
            summary, head, outside or partial(self._write_outside, head, tuning.outside)
        )
        self._check(walk.states.trace, head, kept_logits)
        report = self._make_report(summary, quality, sum(s.num_bytes for s in shards))
        report = replace(report, end_to_end=tuning.report)
        save_report(report, self.weights.folder, self.journal.output)
        self.journal.remove()
        return report

    def _write_rest(
        self,
        summary: ModuleSummary,
        head: Sequence[RoundedLinear],
        outside: Callable[[], ShardDigest],
    ) -> list[ShardDigest]:
        """Write everything outside the blocks: remaining tensors, configs, index, tokenizer."""
        self.progress.phase("writing the tensors outside the blocks")
        blocks, output = self.journal.blocks, self.journal.output
        with self.meter.timed("write"):
            shards = [ShardDigest(**entry["shard"]) for entry in blocks]
            shards.append(outside())
            write_descriptions(
                self.weights, output, self.config, shards, blocks, summary, head=bool(head)
            )
        return shards

    def _check(self, trace: ProbeTrace, head: Sequence[RoundedLinear], kept_logits: Tensor) -> None:
        """Reload the checkpoint and compare it with the weights and logits computed here."""
        self.progress.phase("reloading and comparing")
        output, device, dtype = self.journal.output, self.weights.device, self.settings.torch_dtype
        with self.meter.timed("reload"):
            sums = {r.name: r.checksum for r in head}
            for entry in self.journal.blocks:
                sums |= entry["checksums"]
            check_bytes(output, sums, device)
            check_outputs(output, self.probe, trace, kept_logits, dtype, device)

    def _keep_base_logits(self, states: RunStates) -> None:
        logits = self._logits(states, BASE_PROBE)
        with self.meter.timed("quality"):
            kept = [logits(window).cpu() for window in range(len(self.probe.ids))]
        self._base_logits = kept.__getitem__

    def _logits(self, states: RunStates, stream: str) -> WindowLogits:
        """Return a function that computes a model's logits of a window with the tail as it is."""
        hidden = states.at(stream, self.num_blocks).read(0)
        return partial(compute_logits, self.stream, self.probe, hidden, self.weights.device)

    def _make_report(
        self, summary: ModuleSummary, quality: QualityReport | None, checkpoint_bytes: int
    ) -> QuantizationReport:
        numbers = sum(
            parameter.numel()
            for block in self.weights.blocks.modules
            for parameter in block.parameters()
            if parameter.dim() > 1
        )
        return QuantizationReport(
            model=self.task.name,
            output=str(self.journal.output),
            config=self.config.to_dict(),
            calibration=CalibrationReport(
                source=self.tokens.source,
                digest=self.tokens.digest,
                samples=len(self.tokens.sequences),
                length=max(len(s) for s in self.tokens.sequences),
                tokens=self.tokens.num_tokens,
            ),
            modules=summary.modules,
            skipped=summary.skipped,
            quality=quality,
            seconds=time.monotonic() - self.task.start,
            seconds_by_phase=dict(self.meter.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            checkpoint_bytes=checkpoint_bytes,
            bits_per_weight=summary.bits_per_weight,
            unquantized_share=1 - summary.num_weights / numbers,
            versions=installed_versions(),
            machine=machine_facts(),
            # Without duplicates: a second attempt repeats the notes of the first.
            notes=tuple(dict.fromkeys((*self.settings.reasons, *self.tokens.notes, *self.notes))),
            flops=dict(self.meter.flops),
            inputs=self.journal.header["inputs"],
        )
