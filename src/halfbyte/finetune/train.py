"""Train an adapter on a frozen base, quantized or not, and write it in PEFT's format.

::

    folder ──> base, frozen ──PEFT──> + adapter ──Transformers' Trainer──> best adapter ──> folder

The loop, optimizers and state of a run are Transformers'; here is what it is given, how an
unfinished run is found again, and what is written in the end.
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
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import ConfigError, DataError, ModelError
from halfbyte.evaluate.loading import Subject
from halfbyte.finetune.adapter import attach_adapter, check_adapter, require_peft
from halfbyte.finetune.base import check_packing, load_own_tokenizer, open_base
from halfbyte.finetune.config import QALORA, AdapterConfig, TrainConfig
from halfbyte.finetune.data import Example, Examples, collate, pack, read_examples, split_examples
from halfbyte.finetune.groups import all_constant, hold_constant, settle
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
"""In the work folder: what Trainer saves on the way."""
BEFORE = "validation_before"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """Rows of examples, and where they came from."""

    training: Examples
    validation: Examples | None
    training_rows: list[list[Example]]
    validation_rows: list[list[Example]] | None

    def describe(self, path: Path) -> dict[str, Any]:
        apart = 0 if self.validation is None else len(self.validation.examples)
        return {
            "file": str(path),
            "examples": len(self.training.examples),
            "rows": len(self.training_rows),
            "tokens": self.training.num_tokens,
            "counted_tokens": self.training.num_counted,
            "validation_examples": apart,
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
        validation: More of them, kept apart; None: a share of ``data``.
        adapter: What the adapter is; not looked at where ``start_from`` brings one.
        config: How it is trained.
        start_from: An adapter to go on from, such as one of ``halfbyte repair``.
        resume: Go on with the unfinished run in ``output``; it ends with the same adapter, on a
            CPU bit for bit.
        progress: Told how far the run is.

    Returns:
        The report, which also stands in ``output``.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: A setting is wrong, or the output folder is in use.
        DataError: The data cannot be read or teaches nothing.
        ModelError: The model cannot be loaded or trained so.
        JournalError: The run in the folder belongs to other inputs or options.
    """
    require_peft("Fine-tuning")
    adapter, config = adapter or AdapterConfig(), config or TrainConfig()
    progress, output = progress or SilentTrainProgress(), Path(output)
    complete = check_output(output, resume=resume, report_file=REPORT_FILE)
    start = time.monotonic()
    folder = find_model(model)
    if start_from is not None:
        check_adapter(start_from)
    # The data first: what is wrong with it shows before a large model is read.
    tokenizer = load_own_tokenizer(folder)
    held = _read_data(
        tokenizer, Path(data), None if validation is None else Path(validation), config
    )
    inputs = {
        "model": fingerprint_model(TensorFiles.open(folder)),
        "data": held.training.digest,
        "validation": None if held.validation is None else held.validation.digest,
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
    _check_ids(subject, held, data)
    output.mkdir(parents=True, exist_ok=True)
    with Journal(output) as journal:
        threads = torch.get_num_threads()
        # Sums depend on how many threads share them.
        header: dict[str, Any] = {"inputs": inputs, "threads": threads}
        if journal.exists and _load(journal):
            journal.check_same(inputs)
            header = journal.header
        torch.set_num_threads(header["threads"])
        try:
            run = _Run(str(model), output, subject, held, adapter, config, journal, progress)
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
            hold_constant(model)
        if not self.journal.header:
            # Only now: a model that takes no such adapter leaves no unfinished run behind.
            shutil.rmtree(steps_folder, ignore_errors=True)
            self.journal.start(header)
        if config.checkpointing:
            # The cache of past keys cannot be kept beside it.
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
            before = self._judge_base(trainer)
            # What came before (the base's loss, a resumed start) must not change the dropout.
            set_seed(config.seed)
            saved = None if done is None else str(steps_folder / f"checkpoint-{done}")
            trainer.train(resume_from_checkpoint=saved)
            _check_numbers(model, trainer.state.global_step)
        except DivergedError as error:
            raise self._explain(error) from error
        return self._finish(trainer, model, trained, before, path, start)

    def _explain(self, error: DivergedError) -> ModelError:
        """Say what to do about a number that is none."""
        dtype = self.subject.dtype_name
        other = "" if dtype == "float32" else f", or with --dtype float32 (it is {dtype})"
        advice = f"with a lower --learning-rate (it is {self.config.learning_rate:g}){other}"
        if not error.steps:
            advice = f"on another base{other}: this one gives no numbers by itself"
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
        apart = 0 if data.validation is None else len(data.validation.examples)
        return (
            f"{len(data.training.examples)} examples in {len(data.training_rows)} rows, "
            f"{data.training.num_counted:,} of {data.training.num_tokens:,} tokens counted; "
            f"{apart} kept apart",
            *data.training.notes,
            f"{trained:,} parameters to train, {steps} steps, in {self.subject.dtype_name}",
        )

    def _judge_base(self, trainer: Any) -> float | None:
        """Give the loss before training; an unfinished run has it in its journal."""
        if self.data.validation is None:
            return None
        for entry in self.journal.blocks:
            if BEFORE in entry:
                return float(entry[BEFORE])
        loss = float(trainer.evaluate()["eval_loss"])
        self.journal.add_block({BEFORE: loss})
        return loss

    def _finish(
        self, trainer: Any, model: Any, trained: int, before: float | None, path: Path, start: float
    ) -> TrainReport:
        state = trainer.state
        history = read_history(state.log_history)
        # As the user named it: PEFT would name the folder in this machine's cache.
        model.peft_config["default"].base_model_name_or_path = self.name
        if self.adapter.variant == QALORA:
            settle(model)
        model.save_pretrained(self.output)
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


def _check_numbers(model: Any, steps: int) -> None:
    """Refuse an adapter that the last step ruined; no loss tells of it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise DivergedError(f"{name} holds values that are no numbers", steps)


def _check_start(model: Any, start_from: str | Path | None) -> None:
    """Refuse to go on, constant over groups, from an adapter that is not."""
    if start_from is not None and not all_constant(model):
        raise ConfigError(
            f"Cannot train {start_from} on with --variant qalora: it is not constant over the "
            "base's groups. Start from one that is, from none, or use --variant lora."
        )


def count_steps(rows: int, config: TrainConfig) -> int:
    """Give the number of optimizer steps.

    Args:
        rows: Of training data.
        config: Epochs, portions and the limit.

    Returns:
        Steps, one at least.
    """
    passes = math.ceil(rows / config.batch_size)
    steps = max(math.ceil(math.ceil(passes / config.accumulate) * config.epochs), 1)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _read_data(tokenizer: Any, data: Path, validation: Path | None, config: TrainConfig) -> _Data:
    settings: dict[str, Any] = {
        "length": config.length,
        "everything": config.train_on == "everything",
    }
    examples = read_examples(data, tokenizer, **settings)
    if validation is None:
        training, apart = split_examples(examples, config.validation, config.seed)
    else:
        training, apart = examples, read_examples(validation, tokenizer, **settings)

    def rows(side: Examples) -> list[list[Example]]:
        if config.packing:
            return pack(side.examples, config.length)
        return [[example] for example in side.examples]

    return _Data(
        training=training,
        validation=apart,
        training_rows=rows(training),
        validation_rows=None if apart is None else rows(apart),
    )


def _check_ids(subject: Subject, held: _Data, data: str | Path) -> None:
    sides = [held.training, *([] if held.validation is None else [held.validation])]
    highest = max(max(example.ids) for side in sides for example in side.examples)
    if subject.vocabulary is not None and highest >= subject.vocabulary:
        raise DataError(
            f"{data} becomes token id {highest}, and {subject.name} knows 0.."
            f"{subject.vocabulary - 1}. The tokenizer belongs to another model."
        )


def _load(journal: Journal) -> bool:
    """Load the journal; a header that was torn by a kill is as none."""
    journal.load()
    return bool(journal.header)


def _find_saved(folder: Path) -> int | None:
    """Find the last complete save and remove what was torn; Trainer writes its state last."""
    saved = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            saved.append(int(path.name.rpartition("-")[2]))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return max(saved, default=None)
