"""Train an adapter on a frozen base model and write it in PEFT's format.

::

    folder ──> base, frozen ──PEFT──> + adapter ──Transformers' Trainer──> best adapter ──> folder

Transformers' Trainer provides the loop, the optimizers and the saved state of a run. This module
prepares its inputs, resumes unfinished runs and writes the results.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.identity import digest_files
from halfbyte.checkpoint.output_folder import check_outside, share_weights
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import ConfigError, DataError, ModelError
from halfbyte.evaluate.loading import Subject
from halfbyte.finetune.adapter import attach_adapter, check_adapter, require_peft
from halfbyte.finetune.base import check_packing, load_required_tokenizer, open_base
from halfbyte.finetune.config import QALORA, AdapterConfig, TrainConfig
from halfbyte.finetune.data import Example, Examples, collate, pack, read_examples, split_examples
from halfbyte.finetune.groups import all_constant, equalize_columns, tie_columns
from halfbyte.finetune.progress import SilentTrainProgress, TrainProgress
from halfbyte.finetune.report import REPORT_FILE, TrainReport, save_report
from halfbyte.finetune.third_party_output import quiet_libraries
from halfbyte.finetune.trainer import DivergedError, make_trainer, read_history
from halfbyte.machine.facts import installed_versions, machine_facts
from halfbyte.machine.memory import peak_memory_bytes
from halfbyte.quantize.fingerprint import fingerprint_model
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.source import COMPLETE, check_output, check_same_inputs, find_model

STEPS_FOLDER = "steps"
"""Folder for the Trainer's checkpoints, in the work folder."""
BASE_LOSS = "validation_before"
"""Key of the base's held-out loss in the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """Training and held-out examples, and the rows that they are packed into."""

    training: Examples
    validation: Examples | None
    training_rows: list[list[Example]]
    validation_rows: list[list[Example]] | None

    @property
    def num_held_out(self) -> int:
        """Number of held-out examples."""
        return 0 if self.validation is None else len(self.validation.examples)

    @property
    def digests(self) -> dict[str, str | None]:
        """Digests of both parts, by which --resume recognizes the data."""
        held_out = None if self.validation is None else self.validation.digest
        return {"data": self.training.digest, "validation": held_out}

    def describe(self, path: Path) -> dict[str, Any]:
        """Return what the report says about the data."""
        return {
            "file": str(path),
            "examples": len(self.training.examples),
            "rows": len(self.training_rows),
            "tokens": self.training.num_tokens,
            "counted_tokens": self.training.num_counted,
            "validation_examples": self.num_held_out,
        }


@quiet_libraries()
def finetune(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    validation: str | Path | None = None,
    adapter: AdapterConfig | None = None,
    config: TrainConfig | None = None,
    start_from: str | Path | None = None,
    resume: bool = False,
    progress: TrainProgress | None = None,
) -> TrainReport:
    """Train an adapter.

    Args:
        model: A model folder, quantized or not, or a name on the Hub.
        output: Folder for the adapter; it must be new, empty, or hold an unfinished run.
        data: JSON lines; see :mod:`halfbyte.finetune.data`.
        validation: Held-out data, also JSON lines; None: a share of ``data``.
        adapter: Settings of the adapter; those of ``start_from`` take precedence.
        config: Settings of the training.
        start_from: Folder of an adapter to start from, such as one of ``halfbyte repair``.
        resume: Resume the unfinished run in ``output``; it ends with the same adapter, on a CPU bit
            for bit.
        progress: Receives the progress of the run.

    Returns:
        The report, which is also written to ``output``.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: A setting is invalid, or the output folder is not empty.
        DataError: The data cannot be read, or has no token that the loss counts.
        ModelError: The model cannot be loaded, or the training diverged.
        JournalError: The run in the folder has other inputs or settings.
    """
    require_peft("Fine-tuning")
    adapter, config = adapter or AdapterConfig(), config or TrainConfig()
    progress, output = progress or SilentTrainProgress(), Path(output)
    folder = find_model(model)
    check_outside(output, folder)
    complete = check_output(output, resume=resume, report_file=REPORT_FILE)
    start = time.monotonic()
    if start_from is not None:
        check_adapter(start_from)
    # The data first, so that an error in it shows before a large model is loaded.
    tokenizer = load_required_tokenizer(folder)
    examples = _read_data(tokenizer, data, validation, config)
    inputs = {
        "model": fingerprint_model(TensorFiles.open(folder)),
        **examples.digests,
        "adapter": adapter.to_dict(),
        "config": config.to_dict(),
        "start_from": None if start_from is None else digest_files(Path(start_from)),
    }
    if complete:
        finished = TrainReport.load(output)
        check_same_inputs(output, finished.inputs, inputs)
        progress.started((COMPLETE,), finished.steps, finished.steps)
        progress.finished()
        return finished
    subject = open_base(folder, tokenizer, config)
    _check_ids(subject, examples, data)
    output.mkdir(parents=True, exist_ok=True)
    with Journal(output) as journal:
        threads = torch.get_num_threads()
        # The number of threads changes the order of sums, so a resumed run uses the same.
        header: dict[str, Any] = {"inputs": inputs, "threads": threads}
        if journal.exists and _load(journal):
            journal.check_same(inputs)
            header = journal.header
        torch.set_num_threads(header["threads"])
        try:
            run = _Run(str(model), output, subject, examples, adapter, config, journal, progress)
            return run.execute(start_from, header, Path(data), start)
        finally:
            torch.set_num_threads(threads)
            progress.finished()


class _Run:
    """One run, from the loaded base to the written adapter."""

    def __init__(
        self,
        name: str,
        output: Path,
        subject: Subject,
        data: _Data,
        adapter: AdapterConfig,
        config: TrainConfig,
        journal: Journal,
        progress: TrainProgress,
    ) -> None:
        self.name, self.output, self.subject, self.data = name, output, subject, data
        self.adapter, self.config = adapter, config
        self.journal, self.progress = journal, progress

    def execute(
        self, start_from: str | Path | None, header: Mapping[str, Any], path: Path, start: float
    ) -> TrainReport:
        from transformers import set_seed

        config, steps_folder = self.config, self.journal.folder / STEPS_FOLDER
        if config.packing:
            check_packing(self.subject)
        set_seed(config.seed)
        model = attach_adapter(self.subject.model, self.adapter, start_from)
        if self.adapter.variant == QALORA:
            _check_start(model, start_from)
            tie_columns(model)
        if not self.journal.header:
            # Only now, so that an adapter that does not fit leaves no unfinished run.
            shutil.rmtree(steps_folder, ignore_errors=True)
            self.journal.start(header)
        if config.checkpointing:
            # Gradient checkpointing does not work with a KV cache.
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": False})
        steps = count_steps(len(self.data.training_rows), config)
        padding = self._padding
        trainer = make_trainer(
            model,
            self.data.training_rows,
            self.data.validation_rows,
            lambda rows: collate(rows, padding),
            config=config,
            steps=steps,
            folder=steps_folder,
            device=self.subject.input_device,
            progress=self.progress,
        )
        done = _find_saved(steps_folder)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.progress.started(self._plan(trained, steps), steps, done or 0)
        try:
            before = self._evaluate_base(trainer)
            # Evaluating the base or resuming must not change the dropout.
            set_seed(config.seed)
            saved = None if done is None else str(steps_folder / f"checkpoint-{done}")
            trainer.train(resume_from_checkpoint=saved)
            _check_finite_parameters(model, trainer.state.global_step)
        except DivergedError as error:
            raise self._describe_divergence(error) from error
        return self._finish(trainer, model, trained, before, path, start)

    def _describe_divergence(self, error: DivergedError) -> ModelError:
        """Make the error for a run that diverged, with advice."""
        dtype = self.subject.dtype_name
        other = "" if dtype == "float32" else f", or with --dtype float32 (it is {dtype})"
        advice = f"with a lower --learning-rate (it is {self.config.learning_rate:g}){other}"
        if not error.steps:
            advice = f"on another base{other}: this one does not compute finite values by itself"
        return ModelError(
            f"Training {self.name} failed: {error}. No adapter was written. Remove {self.output} "
            f"and train {advice}."
        )

    @property
    def _padding(self) -> int:
        tokenizer = self.subject.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(token for token in ids if token is not None)

    def _plan(self, trained: int, steps: int) -> tuple[str, ...]:
        data = self.data
        return (
            f"{len(data.training.examples)} examples in {len(data.training_rows)} rows, "
            f"{data.training.num_counted:,} of {data.training.num_tokens:,} tokens counted; "
            f"{data.num_held_out} held out",
            *data.training.notes,
            f"{trained:,} parameters to train, {steps} steps, in {self.subject.dtype_name}",
        )

    def _evaluate_base(self, trainer: Any) -> float | None:
        """Return the held-out loss before training; a resumed run has it in its journal."""
        if self.data.validation is None:
            return None
        for entry in self.journal.blocks:
            if BASE_LOSS in entry:
                return float(entry[BASE_LOSS])
        loss = float(trainer.evaluate()["eval_loss"])
        self.journal.add_block({BASE_LOSS: loss})
        return loss

    def _finish(
        self, trainer: Any, model: Any, trained: int, before: float | None, path: Path, start: float
    ) -> TrainReport:
        state = trainer.state
        history = read_history(state.log_history)
        # The name that the user gave; PEFT would write the folder in this machine's cache.
        model.peft_config["default"].base_model_name_or_path = self.name
        if self.adapter.variant == QALORA:
            equalize_columns(model)
        model.save_pretrained(self.output)
        share_weights(self.output)
        kept = state.best_global_step if self.data.validation is not None else state.global_step
        report = TrainReport(
            model=self.name,
            output=str(self.output),
            adapter=self.adapter.to_dict(),
            config=self.config.to_dict(),
            data=self.data.describe(path),
            trained_parameters=trained,
            adapter_bytes=(self.output / "adapter_model.safetensors").stat().st_size,
            steps=state.global_step,
            kept_step=kept,
            stopped_early=state.global_step < state.max_steps,
            validation_before=before,
            validation_after=state.best_metric if self.data.validation is not None else None,
            history=history,
            notes=self.data.training.notes,
            seconds=time.monotonic() - start,
            peak_memory_bytes=peak_memory_bytes(),
            versions=installed_versions(),
            machine=machine_facts(),
            inputs=self.journal.header["inputs"],
        )
        save_report(report, self.output)
        self.journal.remove()
        return report


def _check_finite_parameters(model: Any, steps: int) -> None:
    """Check the parameters after the last step, which no later loss would show."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise DivergedError(f"{name} has values that are not finite", steps)


def _check_start(model: Any, start_from: str | Path | None) -> None:
    """Check that an adapter to start a qalora run from is constant over groups."""
    if start_from is not None and not all_constant(model):
        raise ConfigError(
            f"Cannot continue training {start_from} with --variant qalora: it is not constant over "
            "the base's groups. Start from one that is, omit --start-from, or use --variant lora."
        )


def count_steps(rows: int, config: TrainConfig) -> int:
    """Return the number of optimizer steps.

    Args:
        rows: Number of rows of training data.
        config: Provides epochs, batch size, accumulation and the limit.

    Returns:
        The steps, at least one.
    """
    passes = math.ceil(rows / config.batch_size)
    steps = max(
        math.ceil(math.ceil(passes / config.gradient_accumulation_steps) * config.epochs), 1
    )
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _read_data(
    tokenizer: Any, data: str | Path, validation: str | Path | None, config: TrainConfig
) -> _Data:
    settings: dict[str, Any] = {
        "length": config.length,
        "everything": config.train_on == "everything",
    }
    examples = read_examples(Path(data), tokenizer, **settings)
    if validation is None:
        training, held_out = split_examples(examples, config.validation, config.seed)
    else:
        training, held_out = examples, read_examples(Path(validation), tokenizer, **settings)

    def rows(side: Examples) -> list[list[Example]]:
        if config.packing:
            return pack(side.examples, config.length)
        return [[example] for example in side.examples]

    return _Data(
        training=training,
        validation=held_out,
        training_rows=rows(training),
        validation_rows=None if held_out is None else rows(held_out),
    )


def _check_ids(subject: Subject, examples: _Data, data: str | Path) -> None:
    sides = filter(None, [examples.training, examples.validation])
    highest = max(max(example.ids) for side in sides for example in side.examples)
    if subject.vocabulary is not None and highest >= subject.vocabulary:
        raise DataError(
            f"Tokenizing {data} gives token id {highest}, and {subject.name} has ids 0.."
            f"{subject.vocabulary - 1}. The tokenizer belongs to another model; replace it."
        )


def _load(journal: Journal) -> bool:
    """Load the journal; return False if a killed run left its header incomplete."""
    journal.load()
    return bool(journal.header)


def _find_saved(folder: Path) -> int | None:
    """Return the step of the last complete checkpoint, and remove incomplete ones.

    The Trainer writes ``trainer_state.json`` last.
    """
    saved = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            saved.append(int(path.name.rpartition("-")[2]))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return max(saved, default=None)
