"""One run: walks a model block by block and calls the other files in their order.

::

    text -> tokens -> plan -> [block: load, round, write shard, pass hidden states on, journal] x n
         -> head, embeddings, norms -> index, configs, tokenizer -> reload and compare -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.checksums import ShardDigest
from halfbyte.model.blocks import (
    InputGroup,
    Stage,
    linear_weight,
)
from halfbyte.model.hidden import HiddenStates
from halfbyte.model.stream import BlockStream, Passages
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.block_shard import gather_block
from halfbyte.quantize.block_tuning import TuningData, tune_rounded
from halfbyte.quantize.block_work import BlockWork, Meter
from halfbyte.quantize.block_writer import BlockWriter
from halfbyte.quantize.calibration import CalibrationSource, CalibrationTokens
from halfbyte.quantize.choose_bits import choose_bits
from halfbyte.quantize.device_ways import find_slow_ways
from halfbyte.quantize.fingerprint import fingerprint_model
from halfbyte.quantize.finish import (
    count_packed_bits,
    save_report,
    write_descriptions,
    write_outside,
)
from halfbyte.quantize.hardware import release_memory
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.probe import (
    KEPT_LOGITS,
    Probe,
    measure_quality,
    run_tail,
)
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.provenance import installed_versions, machine_facts, peak_memory_bytes
from halfbyte.quantize.reload import check_bytes, check_outputs
from halfbyte.quantize.report import (
    CalibrationReport,
    ModuleReport,
    QualityReport,
    QuantizationReport,
    SkippedModule,
)
from halfbyte.quantize.resources import RunSettings, resolve_resources
from halfbyte.quantize.rounding import RoundedLinear
from halfbyte.quantize.run_text import read_text
from halfbyte.quantize.source import check_something_to_do
from halfbyte.quantize.states import BASE, CALIBRATION, FULL, PROBE, TUNED, RunStates
from halfbyte.quantize.whole_tuning import WholeTuning, tune_whole
from halfbyte.version import __version__

JOURNAL_VERSION = 2


class Run:
    """One run: what it was given, and where it stands."""

    def __init__(
        self,
        *,
        name: str,
        source: Path,
        journal: Journal,
        config: QuantConfig,
        calibration: CalibrationConfig,
        resources: ResourceConfig,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Read names and shapes of the model; nothing is loaded or written yet.

        Args:
            name: What the user called the model.
            source: Its folder.
            journal: Of the output folder, locked.
            config: How weights are rounded.
            calibration: How much text.
            resources: What the run may use.
            device: Where to compute.
            progress: Told how far the run is.
        """
        self.name = name
        self.journal = journal
        self.config = config
        self.calibration = calibration
        self.resources = resources
        self.progress = progress
        self.start = time.monotonic()
        self.meter = Meter()
        self.weights = ModelWeights(source, device)
        self.num_blocks = len(self.weights.blocks.modules)
        self.tokens: CalibrationTokens
        self.probe: Probe
        self.settings: RunSettings
        self.stream: BlockStream
        self.batches: list[Tensor] = []
        self.notes: list[str] = []
        self._rounded: list[RoundedLinear] = []
        self._base_logits: list[Tensor] = []

    def execute(
        self, text: CalibrationSource, *, resume: bool, quality: bool
    ) -> QuantizationReport:
        """Do everything that is not done yet.

        Args:
            text: Calibration data.
            resume: Go on with an unfinished run, where there is one.
            quality: Measure what quantizing costs, on held-out text.

        Returns:
            The report, which also stands in the output folder.
        """
        check_something_to_do(self.weights, self.config)
        self.tokens, self.probe = read_text(
            text,
            self.weights,
            self.calibration,
            folder=self.journal.folder,
            dtype=self.resources.dtype,
            quality=quality,
            progress=self.progress,
            meter=self.meter,
        )
        if quality and self.probe.note:
            self.notes.append(self.probe.note)
        self._begin(resume)
        with self.meter.timed("load"):
            self.weights.load_outside()
        with self._open_states() as states:
            if self.journal.blocks:
                states.check(len(self.journal.blocks), self.journal.blocks[-1]["states"])
            work = BlockWork(
                self.weights,
                self.stream,
                self.config,
                keep_paused=self.settings.keep_paused,
                hessian_bytes=self.settings.hessian_bytes,
                on_linear=self._on_linear,
                meter=self.meter,
            )
            if self.config.chooses_bits:
                self._choose_bits(work)
            with BlockWriter(self.journal, beside=self.settings.hold_states) as writer:
                outside = None
                if not (self.config.lm_head or self.config.end_to_end_steps):
                    outside = writer.begin(self._write_outside)
                for index in range(len(self.journal.blocks), self.num_blocks):
                    self.progress.block_started(index, self.num_blocks)
                    self._do_block(index, work, states, writer)
                with self.meter.timed("write"):
                    writer.wait()
                tuning = self._tune_whole(states)
                return self._finish(work, states, tuning, outside)

    def _write_outside(
        self, head: Sequence[RoundedLinear] = (), changed: Mapping[str, Tensor] | None = None
    ) -> ShardDigest:
        return write_outside(self.weights, self.journal.output, head, changed or {})

    def _choose_bits(self, work: BlockWork) -> None:
        """Give every module its bits, once for a run."""
        with self.meter.timed("survey"):
            work.config, notes = choose_bits(
                self.weights,
                self.stream,
                work,
                self.config,
                batches=self.batches,
                seed=self.calibration.seed,
                folder=self.journal.folder,
                progress=self.progress,
            )
        self.notes += notes

    def _begin(self, resume: bool) -> None:
        """Take the settings of the journal, or plan and start one."""
        inputs = {
            "model": fingerprint_model(self.weights.files),
            "config": self.config.to_dict(),
            "calibration": {**self.calibration.to_dict(), "digest": self.tokens.digest},
            "resources": {"device": self.resources.device, "dtype": self.resources.dtype},
            "probe": {"held_out": self.probe.is_held_out, "windows": list(self.probe.shape)},
            "versions": {"halfbyte": __version__, "torch": torch.__version__},
        }
        if resume and self.journal.exists:
            self.journal.load()
        if self.journal.header:
            self.journal.check_same(inputs)
            self.settings = RunSettings.from_dict(self.journal.header["settings"])
            done = len(self.journal.blocks)
            self._note_slow_ways()
            self.progress.started(
                (f"resuming behind block {done} of {self.num_blocks}", *self.notes)
            )
        else:
            lengths = [len(sequence) for sequence in self.tokens.sequences]
            plan = resolve_resources(
                self.weights, self.resources, self.calibration, self.config, lengths
            )
            self.settings = plan.settings
            self._note_slow_ways()
            self.progress.started((*plan.lines(), *self.tokens.notes, *self.notes))
            header = {"version": JOURNAL_VERSION, "inputs": inputs}
            self.journal.start({**header, "settings": self.settings.to_dict()})
        torch.set_num_threads(self.settings.threads)
        self.batches = self.tokens.batches(self.settings.batch_size)
        model, blocks = self.weights.model, self.weights.blocks
        self.stream = BlockStream(model, blocks, self.settings.torch_dtype)
        for index, entry in enumerate(self.journal.blocks):
            self.stream.output_sizes[index] = entry["output_size"]

    def _note_slow_ways(self) -> None:
        device, dtype = self.weights.device, self.settings.torch_dtype
        self.notes += find_slow_ways(device, dtype, symmetric=self.config.symmetric)

    def _open_states(self) -> RunStates:
        return RunStates(
            self.journal.folder,
            self.batches,
            self.probe,
            num_blocks=self.num_blocks,
            width=int(self.weights.config.get_text_config().hidden_size),
            dtype=self.settings.torch_dtype,
            match_base=self.config.match_base,
            tuned=self._tuned_streams,
            held=self.settings.hold_states,
        )

    @property
    def _tuned_streams(self) -> tuple[str, ...]:
        if not self.config.end_to_end_steps:
            return ()
        return (PROBE, CALIBRATION) if self.config.lm_head else (PROBE,)

    def _do_block(
        self, index: int, work: BlockWork, states: RunStates, writer: BlockWriter
    ) -> None:
        before, behind = states.at(CALIBRATION, index), states.at(CALIBRATION, index + 1)
        probe_ids = self._to_device(self.probe.ids)

        def load(batch: int, states: HiddenStates = before) -> tuple[Tensor, Tensor | None]:
            ids = self._to_device(self.batches[batch])
            return ids, None if index == 0 else self._to_device(states.read(batch))

        with self.meter.timed("load"):
            block, exact = work.load(index)
            if self.settings.hold_states and index + 1 < self.num_blocks:
                self.weights.fetch_block(index + 1)
        work.find_stages(index, block, load)
        if states.has_base:
            with self.meter.timed("quality"), self.stream.at(index):
                states.run_probe(BASE, index, self.stream, probe_ids)
        tasks, skipped = work.plan_tasks(f"{self.weights.blocks.name(index)}.", block, exact)
        self._rounded = []
        with self.stream.at(index, work.stages):
            keep = self.settings.keep_paused
            passages = Passages(self.stream, len(self.batches), load, keep_paused=keep)
            base_passages = None
            if self.config.match_base:
                full = partial(load, states=states.at(FULL, index))
                base_passages = Passages(self.stream, len(self.batches), full, keep_paused=keep)
            work.round_block(block, tasks, passages, base_passages)
            with self.meter.timed("forward and Hessians"), work.base_weights(block):
                if base_passages is not None:
                    for batch in range(len(self.batches)):
                        states.at(FULL, index + 1).write(batch, base_passages.finish(batch))
            if self.config.tune_steps and self._rounded:
                passages.close()
                wanted = states.at(FULL, index + 1)
                data = TuningData(
                    run=lambda batch: self.stream.run(*load(batch)),
                    wanted=lambda batch: self._to_device(wanted.read(batch)),
                    num_batches=len(self.batches),
                )
                with self.meter.timed("tune"):
                    self._rounded = tune_rounded(
                        block,
                        self._rounded,
                        exact,
                        data,
                        steps=self.config.tune_steps,
                        seed=self.calibration.seed + index,
                    )
            with self.meter.timed("forward and Hessians"):
                for batch in range(len(self.batches)):
                    behind.write(batch, passages.finish(batch))
        with self.meter.timed("quality"), self.stream.at(index):
            states.run_probe(PROBE, index, self.stream, probe_ids)
        with self.meter.timed("write"):
            shard = gather_block(
                self.weights,
                self.journal.output,
                index,
                rounded=self._rounded,
                exact=exact,
                split_experts=work.split_experts,
            )
            # Saving states takes the place of older ones, which a line not yet there may need.
            writer.wait()
            facts = {
                "skipped": [[s.name, s.reason] for s in skipped],
                "stages": [[list(g.linears) for g in stage.groups] for stage in work.stages],
                "output_size": self.stream.output_sizes[index],
                "states": states.save(index + 1),
            }
            writer.submit(lambda: {**shard.write(), **facts})
        self._rounded = []
        self.weights.drop_block(index)
        release_memory()

    def _tune_whole(self, states: RunStates) -> WholeTuning:
        """Train scales and gains of the whole model, where that was asked for."""
        if not self.config.end_to_end_steps:
            return WholeTuning()
        with self.meter.timed("end to end"):
            # Before training, since that changes what is behind the last block, too.
            if states.has_base:
                self._base_logits = self._logits(states.at(BASE, self.num_blocks))
            return tune_whole(
                self.weights,
                self.stream,
                states,
                journal=self.journal,
                batches=self.batches,
                weights_of_tokens=self.tokens.weight_batches(self.settings.batch_size),
                probe=self.probe,
                settings=self.settings,
                steps=self.config.end_to_end_steps,
                seed=self.calibration.seed,
                with_calibration=CALIBRATION in self._tuned_streams,
                progress=self.progress,
            )

    def _finish(
        self,
        work: BlockWork,
        states: RunStates,
        tuning: WholeTuning,
        outside: Callable[[], ShardDigest] | None,
    ) -> QuantizationReport:
        end = self.num_blocks
        base_logits = self._base_logits
        if states.has_base and not base_logits:
            base_logits = self._logits(states.at(BASE, end))
        quantized = {PROBE: PROBE, CALIBRATION: CALIBRATION} | (TUNED if tuning.changed else {})
        head, notes = self._round_head(work, states, quantized[CALIBRATION])
        notes += [*tuning.notes, *self.config.unmatched_patterns(self._linear_names())]
        self.progress.phase("measuring quality")
        logits = self._logits(states.at(quantized[PROBE], end))
        quality = None
        if base_logits:
            quality = measure_quality(self.probe, base_logits, logits, self.weights.device)
        kept_logits = logits[0][-KEPT_LOGITS:].clone()
        del base_logits, logits
        self.progress.phase("writing what is outside the blocks")
        blocks, output = self.journal.blocks, self.journal.output
        shards = [ShardDigest(**entry["shard"]) for entry in blocks]
        with self.meter.timed("write"):
            if outside is None:
                outside = partial(self._write_outside, head, tuning.outside)
            shards.append(outside())
            write_descriptions(self.weights, output, self.config, shards, blocks, head)
        self.progress.phase("reloading and comparing")
        with self.meter.timed("reload"):
            sums = {name: found for entry in blocks for name, found in entry["checksums"].items()}
            device = self.weights.device
            check_bytes(output, sums | {r.name: r.checksum for r in head}, device)
            dtype = self.settings.torch_dtype
            check_outputs(output, self.probe, states.trail, kept_logits, dtype, device)
        report = self._make_report(head, quality, sum(s.num_bytes for s in shards), notes)
        report = replace(report, end_to_end=tuning.report)
        save_report(report, self.weights.folder, output)
        self.journal.remove()
        return report

    def _round_head(
        self, work: BlockWork, states: RunStates, stream: str
    ) -> tuple[list[RoundedLinear], list[str]]:
        """Round the output head on what reaches it, where that was asked for."""
        if not self.config.lm_head:
            return [], []
        self.progress.phase("quantizing the head")
        model = self.weights.model
        head = model.get_output_embeddings()
        name = next((n for n, m in model.named_modules() if m is head and n), None)
        if name is None:
            return [], ["the head stays as it is: the model has none of its own"]
        tied = head.weight is model.get_input_embeddings().weight
        work.stages = [Stage(groups=(InputGroup(linears=(name,)),))]
        tasks, skipped = work.plan_tasks("", model, {name: linear_weight(head)})
        if not tasks:
            return [], [f"the head stays as it is: {skipped[0].reason}"]

        def load(batch: int, name: str = stream) -> tuple[Tensor, Tensor | None]:
            hidden = states.at(name, self.num_blocks).read(batch)
            return self._to_device(self.batches[batch]), self._to_device(hidden)

        self._rounded = []
        with self.stream.at(self.num_blocks, work.stages):
            count = len(self.batches)
            passages = Passages(self.stream, count, load, keep_paused=False)
            base_passages = None
            if self.config.match_base:
                full = partial(load, name=FULL)
                base_passages = Passages(self.stream, count, full, keep_paused=False)
            work.round_block(model, tasks, passages, base_passages)
        note = "the head was untied from the embeddings, which stay as they are"
        return self._rounded, [note] if tied else []

    def _logits(self, states: HiddenStates) -> list[Tensor]:
        """Run the tail on every probe window; logits [tokens, vocabulary], on the CPU if large."""
        hidden = self._to_device(states.read(0))
        found = []
        with self.meter.timed("quality"), self.stream.at(self.num_blocks):
            # One window at a time: logits are as wide as the vocabulary.
            windows = zip(torch.split(self.probe.ids, 1), torch.split(hidden, 1), strict=True)
            for ids, window in windows:
                logits = run_tail(self.stream, self._to_device(ids), window)[0]
                found.append(logits if self.settings.hold_states else logits.cpu())
        return found

    def _make_report(
        self,
        head: list[RoundedLinear],
        quality: QualityReport | None,
        checkpoint_bytes: int,
        notes: list[str],
    ) -> QuantizationReport:
        blocks = self.journal.blocks
        modules = [_build_module(m) for entry in blocks for m in entry["modules"]]
        counts = [tuple(entry["packed_bits"]) for entry in blocks]
        counts += [count_packed_bits(r.tensors) for r in head]
        skipped = [SkippedModule(name=n, reason=r) for e in blocks for n, r in e["skipped"]]
        return QuantizationReport(
            model=self.name,
            output=str(self.journal.output),
            config=self.config.to_dict(),
            calibration=CalibrationReport(
                source=self.tokens.source,
                digest=self.tokens.digest,
                samples=len(self.tokens.sequences),
                length=max(len(s) for s in self.tokens.sequences),
                tokens=self.tokens.num_tokens,
            ),
            modules=(*modules, *(r.report for r in head)),
            skipped=tuple(skipped),
            quality=quality,
            seconds=time.monotonic() - self.start,
            seconds_by_phase=dict(self.meter.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            checkpoint_bytes=checkpoint_bytes,
            bits_per_weight=sum(b for b, _ in counts) / max(sum(n for _, n in counts), 1),
            versions=installed_versions(),
            machine=machine_facts(),
            notes=(*self.settings.reasons, *self.tokens.notes, *self.notes, *notes),
            flops=dict(self.meter.flops),
        )

    def _linear_names(self) -> set[str]:
        """Every linear of the blocks, and the head, by its name on disk."""
        model = self.weights.model
        names = {n for n, m in model.named_modules() if m is model.get_output_embeddings()}
        for entry in self.journal.blocks:
            names.update(module["name"] for module in entry["modules"])
            names.update(name for name, _ in entry["skipped"])
        return names

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.weights.device)

    def _on_linear(self, result: RoundedLinear) -> None:
        self._rounded.append(result)
        self.progress.module_done(result.report)


def _build_module(values: Mapping[str, Any]) -> ModuleReport:
    return ModuleReport(**{**values, "notes": tuple(values["notes"])})
