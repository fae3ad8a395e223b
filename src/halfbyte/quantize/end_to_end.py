"""End-to-end training of all scales and norm gains on the base model's predictions.

The earlier steps compare hidden states, block by block. This one trains the scales of all linears
and the gains of all norms together, with fixed codes, to bring the next-token distribution closer
to that of the base model. Whole batches of the calibration text are held out; their KL decides
which step is kept and when to stop. A learning rate that suits one model is too large for another
that is already closer to its base, where gradients are mostly noise. So a check that finds no
improvement restores the best step and reduces the learning rate.

Source:
    Training only the scales, end to end: Chen et al. 2024, "EfficientQAT" (E2E-QP),
    https://arxiv.org/abs/2407.11062. They train on the text itself, this module on the base
    model's distribution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.checkpoint.header import read_metadata
from halfbyte.checkpoint.shards import read_shard
from halfbyte.checkpoint.write import write_shard
from halfbyte.model.blockwise_backward import BlockChain
from halfbyte.quantize.probe import run_tail
from halfbyte.quantize.student import Student
from halfbyte.quantize.target import CHECK_EVERY

RATE = 1e-3
"""Initial learning rate, relative to a scale or to a norm's mean gain."""
BETAS = (0.9, 0.95)
CHECK_STEPS = 10
"""Training steps between two checks on the held-out text."""
MAX_HELD_OUT = 8
"""Held-out batches at most; with more, a check would cost more than the steps between checks."""
PATIENCE = 3
"""Checks without improvement before training stops."""
RATE_DECAY = 0.25
"""Factor on the learning rate after a check without improvement."""
MIN_IMPROVEMENT = 1e-3
"""Relative decrease of the held-out KL that counts as an improvement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndData:
    """Calibration text with the base model's hidden states behind its last block."""

    ids: Callable[[int], Tensor]
    """Token ids of a batch, [sequences, tokens], on the device."""
    base: Callable[[int], Tensor]
    """Base model's hidden states behind its last block, [sequences, tokens, hidden], of a batch."""
    num_batches: int
    weights: Callable[[int], Tensor] | None = None
    """Weight of the prediction at each token, [sequences, tokens], of a batch; None: all equal."""

    def weights_of(self, batch: int, ids: Tensor) -> Tensor:
        """Return a batch's weights, on the device of its ids."""
        if self.weights is None:
            return torch.ones(ids.shape, device=ids.device)
        return self.weights(batch).to(ids.device)

    @property
    def held_out(self) -> list[int]:
        """Indices of the held-out batches."""
        batches = list(range(CHECK_EVERY - 1, self.num_batches, CHECK_EVERY))
        return batches[:: -(-len(batches) // MAX_HELD_OUT) or 1]

    @property
    def training(self) -> list[int]:
        """Indices of the batches to train on."""
        held_out = set(self.held_out)
        return [batch for batch in range(self.num_batches) if batch not in held_out]

    def sum_weights(self, batches: Sequence[int]) -> float:
        """Return the total weight of all predictions in some batches."""
        return sum(float(self.weights_of(batch, self.ids(batch)).sum()) for batch in batches)

    def find_obstacle(self) -> str | None:
        """Return why there is not enough text; None if there is."""
        if not self.held_out:
            return "too little text to hold some out"
        for batches, purpose in ((self.training, "to train on"), (self.held_out, "held out")):
            if not self.sum_weights(batches):
                return f"none of the {len(batches)} batches {purpose} has a token with a label"
        return None


@dataclass(slots=True)
class TuningState:
    """Progress of the training, saved to disk so that a killed run resumes with the same result."""

    step: int = 0
    best_step: int = 0
    rate: float = 0.0
    """Learning rate before the cosine schedule."""
    checks: list[tuple[int, float]] = field(default_factory=list)
    """Step and held-out KL, in nats per token, of every check; the first is before training."""
    is_finished: bool = False
    stopped: bool = False
    """Whether the user stopped the training."""

    @property
    def best(self) -> float:
        """The held-out KL of the best step."""
        return dict(self.checks)[self.best_step]


class EndToEndTuning:
    """Trains a student's scales and gains against its base model."""

    def __init__(
        self,
        chain: BlockChain,
        student: Student,
        data: EndToEndData,
        path: Path,
        *,
        steps: int,
        seed: int,
    ) -> None:
        """Set up training, or resume it from an earlier process's state.

        Args:
            chain: Runs the student's blocks.
            student: The quantized model.
            data: The text and the base model's hidden states, without an obstacle.
            path: File of the saved state.
            steps: Maximum number of training steps, one batch each.
            seed: Shuffles the batches.
        """
        self.chain, self.student, self.data = chain, student, data
        self.path = path
        self.steps, self.seed = steps, seed
        self.changes = {name: number.change for name, number in student.trainable.items()}
        self.best = {name: torch.zeros_like(change) for name, change in self.changes.items()}
        self.mean_weight = data.sum_weights(data.training) / len(data.training)
        """Mean total token weight of a batch. Gradients are relative to it, so that heavier batches
        count more: as in the held-out KL, the loss is a mean over tokens, not over batches."""
        self.state = TuningState(rate=RATE)
        self.optimizer = torch.optim.Adam(
            self.changes.values(), lr=self.state.rate, betas=BETAS, eps=1e-12
        )
        if path.exists():
            self._load()

    def run(self, on_check: Callable[[TuningState], None]) -> TuningState:
        """Train until all steps are done, nothing improves any more, or the user interrupts.

        Args:
            on_check: Called after every check on the held-out text.

        Returns:
            The final state; the student holds the best step.

        Raises:
            KeyboardInterrupt: The user interrupted before the first check.
        """
        state = self.state
        try:
            if not state.checks:
                self._check(on_check)
            while not state.is_finished:
                self._step()
                if state.step % CHECK_STEPS == 0 or state.step == self.steps:
                    self._check(on_check)
        except KeyboardInterrupt:
            state.stopped = state.is_finished = True
            if not state.checks:
                raise  # nothing to keep yet
        self._restore_best()
        self._save()
        return state

    @torch.no_grad()
    def measure_held_out_kl(self) -> float:
        """Return the weighted mean KL per token on the held-out text, in nats."""
        total_kl, total_weight = 0.0, 0.0
        for batch in self.data.held_out:
            ids = self.data.ids(batch)
            (hidden,) = self.chain.forward([ids])[-1]
            weights = self.data.weights_of(batch, ids)
            for row, base, quantized in self._logits(batch, ids, hidden):
                kl = functional.kl_div(
                    quantized.log_softmax(-1),
                    base.log_softmax(-1),
                    reduction="none",
                    log_target=True,
                )
                total_kl += float(kl.sum(-1).mul(weights[row]).sum())
            total_weight += float(weights.sum())
        return total_kl / total_weight

    def _step(self) -> None:
        state, training = self.state, self.data.training
        epoch, position = divmod(state.step, len(training))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        batch = training[int(torch.randperm(len(training), generator=generator)[position])]
        ids = self.data.ids(batch)
        states = self.chain.forward([ids])
        self.optimizer.zero_grad()
        gradient = self._gradient(batch, ids, states[-1][0])
        for _ in self.chain.backward([ids], states, [gradient]):
            pass
        if all(c.grad is None or bool(c.grad.isfinite().all()) for c in self.changes.values()):
            self.optimizer.param_groups[0]["lr"] = self._rate_at(state.step)
            self.optimizer.step()
        state.step += 1

    def _rate_at(self, step: int) -> float:
        return self.state.rate * (1 + math.cos(math.pi * step / self.steps)) / 2

    def _gradient(self, batch: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """Compute the gradient of the batch's loss by the hidden states behind the last block.

        The loss is the weighted sum of the KL over the mean weight of a batch. Its gradient by the
        quantized model's logits is the difference of the two models' probabilities, weighted.
        """
        weights = self.data.weights_of(batch, ids) / self.mean_weight
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            for row, base, quantized in self._logits(batch, ids, leaf):
                by_logits = quantized.detach().softmax(-1).sub_(base.softmax(-1))
                by_logits.mul_(weights[row, :, None])
                quantized.backward(by_logits)  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return leaf.grad

    def _logits(
        self, batch: int, ids: Tensor, hidden: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield per row: its index, and base and quantized logits, fp32 [tokens, vocabulary]."""
        stream, base_hidden = self.chain.stream, self.data.base(batch)
        with stream.at(self.chain.num_blocks):
            for row in range(len(ids)):
                part = slice(row, row + 1)
                with torch.no_grad():
                    base = run_tail(stream, ids[part], base_hidden[part])[0].float()
                with self.student.enter_outside():
                    quantized = run_tail(stream, ids[part], hidden[part])[0].float()
                yield row, base, quantized

    def _check(self, on_check: Callable[[TuningState], None]) -> None:
        """Measure the held-out KL; keep the current step if it improved, else back off."""
        state = self.state
        kl = self.measure_held_out_kl()
        state.checks.append((state.step, kl))
        is_first = len(state.checks) == 1
        if not is_first and kl < state.best * (1 - MIN_IMPROVEMENT):
            state.best_step = state.step
            self.best = {name: c.detach().clone() for name, c in self.changes.items()}
        elif not is_first:
            state.rate *= RATE_DECAY
            self._restore_best()
            # Adam's moments come from steps that led to a worse model.
            self.optimizer.state.clear()
        checks_since_best = sum(step > state.best_step for step, _ in state.checks)
        state.is_finished = state.step >= self.steps or checks_since_best >= PATIENCE
        self._save()
        on_check(state)

    @torch.no_grad()
    def _restore_best(self) -> None:
        for name, change in self.changes.items():
            change.copy_(self.best[name])

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            tensors[f"now.{name}"] = change.detach()
            tensors[f"best.{name}"] = self.best[name]
            # By the time this is loaded, the shards may already hold trained scales.
            tensors[f"start.{name}"] = self.student.trainable[name].start
            for key, value in self.optimizer.state.get(change, {}).items():
                tensors[f"{key}.{name}"] = value
        state = self.state
        values = {
            "step": state.step,
            "best_step": state.best_step,
            "rate": state.rate,
            "looks": state.checks,
            "is_finished": state.is_finished,
            "stopped": state.stopped,
        }
        write_shard(self.path, tensors, {"state": json.dumps(values)})

    def _load(self) -> None:
        tensors = read_shard(self.path)
        values = json.loads(read_metadata(self.path)["state"])
        checks = [(int(step), float(kl)) for step, kl in values.pop("looks")]
        self.state = TuningState(checks=checks, **values)
        with torch.no_grad():
            for name, change in self.changes.items():
                change.copy_(tensors[f"now.{name}"])
                self.best[name].copy_(tensors[f"best.{name}"])
                self.student.trainable[name].start.copy_(tensors[f"start.{name}"])
                if f"step.{name}" in tensors:
                    self.optimizer.state[change] = {
                        "step": tensors[f"step.{name}"],
                        "exp_avg": tensors[f"exp_avg.{name}"].to(change.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(change.device),
                    }
