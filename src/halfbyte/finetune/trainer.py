"""Transformers' Trainer, configured for adapters and connected to the progress display."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from halfbyte.finetune.config import TrainConfig
from halfbyte.finetune.loss import ChunkedLoss
from halfbyte.finetune.progress import TrainProgress

EVALUATIONS = 10
"""Evaluations on held-out data, if the user sets no interval."""
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {"constant": "constant_with_warmup"}
"""Our name -> Transformers', where they differ."""
KEYS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "eval_loss": "validation",
}
"""Trainer's name -> name in the history; other values are dropped."""


class DivergedError(Exception):
    """A value (``what``) is not finite after ``steps`` steps."""

    def __init__(self, what: str, steps: int) -> None:
        super().__init__(f"{what} after {steps} steps")
        self.what, self.steps = what, steps


def make_trainer(
    model: Any,
    training: Sequence[Any],
    validation: Sequence[Any] | None,
    collator: Callable[[list[Any]], dict[str, torch.Tensor]],
    *,
    config: TrainConfig,
    steps: int,
    folder: Path,
    device: torch.device,
    progress: TrainProgress,
) -> Trainer:
    """Make a Trainer; it raises DivergedError at the first loss or gradient that is not finite.

    Args:
        model: PEFT's.
        training: Rows to train on.
        validation: Held-out rows. With them, the best adapter is kept and the run may stop early.
        collator: Makes a batch from rows.
        config: Settings of the training.
        steps: Total optimizer steps.
        folder: Folder for checkpoints.
        device: The model's device.
        progress: Receives each step.

    Returns:
        The Trainer.
    """
    arguments = _make_arguments(config, steps, folder, device, evaluate=validation is not None)
    callbacks: list[TrainerCallback] = [_Reporter(progress)]
    if validation is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=config.patience))
    trainer = _ChunkedTrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=training,
        eval_dataset=validation,
        callbacks=callbacks,
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    return trainer


def _make_arguments(
    config: TrainConfig, steps: int, folder: Path, device: torch.device, *, evaluate: bool
) -> TrainingArguments:
    """Translate the settings of the training to the Trainer's."""
    every = config.evaluate_every or max(steps // EVALUATIONS, 1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES.get(config.schedule, config.schedule),
        warmup_steps=math.ceil(config.warmup * steps),
        optim=OPTIMIZERS[config.optimizer],
        weight_decay=0.0,
        logging_steps=1,
        # Otherwise a loss that is not finite would be logged as the mean of those before.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=evaluate,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        # Otherwise the Trainer would copy the model to every GPU.
        arguments._n_gpu = 1
    return arguments


def read_history(log: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], ...]:
    """Extract losses, learning rates and gradient norms from the Trainer's log.

    Args:
        log: The Trainer's ``state.log_history``.

    Returns:
        One entry per step, in order.
    """
    steps: dict[int, dict[str, float]] = {}
    for entry in log:
        found = {ours: float(entry[theirs]) for theirs, ours in KEYS.items() if theirs in entry}
        if found:
            steps.setdefault(entry["step"], {}).update(found)
    return tuple({"step": step, **found} for step, found in sorted(steps.items()))


class _ChunkedTrainer(Trainer):
    """A Trainer that computes the loss in chunks, if the model allows it."""

    def __init__(self, model: Any, *args: Any, **keywords: Any) -> None:
        super().__init__(model, *args, **keywords)
        self._loss = ChunkedLoss(model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch; the outputs are empty, because they are not used."""
        if self._loss.obstacle is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        loss = self._loss(inputs, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Make a warmup whose first step has a rate above 0, unlike that of Transformers."""
        if not self.args.warmup_steps:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        scheduler.step()
        return scheduler


class _Reporter(TrainerCallback):
    """Forwards the Trainer's log to a progress display, and checks that values are finite."""

    def __init__(self, progress: TrainProgress) -> None:
        self._progress = progress
        self._best = math.inf

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any
    ) -> None:
        """Report the training loss of a step."""
        if "loss" in logs:
            for what, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
                # Both were computed before this step changed the parameters.
                _check_finite(what, logs.get(key, 0.0), state.global_step - 1)
            self._progress.stepped(state.global_step, float(logs["loss"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any
    ) -> None:
        """Report the held-out loss."""
        loss = float(metrics["eval_loss"])
        _check_finite("held-out loss", loss, state.global_step)
        self._best = min(self._best, loss)
        self._progress.evaluated(state.global_step, loss, self._best)


def _check_finite(what: str, value: float, steps: int) -> None:
    if not math.isfinite(value):
        raise DivergedError(f"the {what} is {value}", steps)
