"""Scales and norm gains of a whole model -> better ones, trained on what the base model predicts.

Everything before this compares hidden states, block by block. What users see is the distribution
of the next token; here the scales of all linears and the gains of all norms move together to bring
that nearer to the base model's, while the codes stay. Whole batches of the calibration text are
kept apart: their divergence decides which step is kept, and when to stop. A step that is right for
one model is too large for another that is nearer to its base, where gradients are mostly noise: so
a look that finds no better model goes back to the best one, and on with smaller steps.

Source:
    Training only the scales, end to end: Chen et al. 2024, "EfficientQAT" (E2E-QP),
    https://arxiv.org/abs/2407.11062, there on the text itself, here on the base model's
    distribution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
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
"""Largest step, as a fraction of a scale or of a norm's mean gain."""
BETAS = (0.9, 0.95)
CHECK_STEPS = 10
"""Training steps between two looks at the held-out text."""
MOST_CHECKED = 8
"""Batches that judge; more would cost more than the steps between two looks."""
PATIENCE = 3
"""Looks without a better one before it stops."""
RETREAT = 0.25
"""What the rate is multiplied by where a look has found nothing better."""
LEAST_GAIN = 1e-3
"""A look counts as better where it is by this fraction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeData:
    """Calibration text with what the base model's last block gives for it."""

    ids: Callable[[int], Tensor]
    """Token ids of a batch, [sequences, tokens], on the device."""
    base: Callable[[int], Tensor]
    """The base model's hidden states behind its last block, [sequences, tokens, hidden]."""
    num_batches: int
    weights: Callable[[int], Tensor] | None = None
    """How much the prediction behind each token counts, [sequences, tokens]; None: all alike."""

    def weights_of(self, batch: int, ids: Tensor) -> Tensor:
        """Give a batch's weights, on the device of its ids."""
        if self.weights is None:
            return torch.ones(ids.shape, device=ids.device)
        return self.weights(batch).to(ids.device)

    @property
    def check(self) -> list[int]:
        """Batches that judge."""
        found = list(range(CHECK_EVERY - 1, self.num_batches, CHECK_EVERY))
        return found[:: -(-len(found) // MOST_CHECKED) or 1]

    @property
    def fit(self) -> list[int]:
        """Batches that are trained on."""
        check = set(self.check)
        return [batch for batch in range(self.num_batches) if batch not in check]


@dataclass(slots=True)
class TuningState:
    """Where training stands; kept on disk, so that a killed run goes on with the same numbers."""

    step: int = 0
    best_step: int = 0
    rate: float = 0.0
    """Largest step from here on."""
    looks: list[tuple[int, float]] = field(default_factory=list)
    """Step, and held-out KL in nats per token, of every look; the first is before training."""
    is_finished: bool = False
    stopped: bool = False
    """Whether the user stopped it."""

    @property
    def best(self) -> float:
        """The lowest held-out KL."""
        return dict(self.looks)[self.best_step]


class EndToEndTuning:
    """Trains a student against its base model."""

    def __init__(
        self,
        chain: BlockChain,
        student: Student,
        data: WholeData,
        path: Path,
        *,
        steps: int,
        seed: int,
    ) -> None:
        """Take up an earlier process's state, where there is one.

        Args:
            chain: Runs the student's blocks.
            student: The quantized model.
            data: The text.
            path: Where the state is kept.
            steps: Training steps at most, one batch each.
            seed: Orders the batches.
        """
        self.chain, self.student, self.data = chain, student, data
        self.path = path
        self.steps, self.seed = steps, seed
        self.changes = {name: number.change for name, number in student.trainable.items()}
        self.best = {name: torch.zeros_like(change) for name, change in self.changes.items()}
        fit = [data.ids(batch) for batch in data.fit]
        weights = [
            float(data.weights_of(b, ids).sum()) for b, ids in zip(data.fit, fit, strict=True)
        ]
        self.usual_weight = sum(weights) / len(weights)
        """Of a batch's tokens. A batch that weighs more moves more, so that what is trained is
        what is judged: the mean over all tokens, not over batches."""
        self.state = TuningState(rate=RATE)
        self.optimizer = torch.optim.Adam(
            self.changes.values(), lr=self.state.rate, betas=BETAS, eps=1e-12
        )
        if path.exists():
            self._load()

    def run(self, on_look: Callable[[TuningState], None]) -> TuningState:
        """Train until the steps are done, nothing helps any more, or the user interrupts.

        Args:
            on_look: Told after every look at the held-out text.

        Returns:
            What came of it; the student holds the best that was found.

        Raises:
            KeyboardInterrupt: The user interrupts before the first look.
        """
        state = self.state
        try:
            if not state.looks:
                self._look(on_look)
            while not state.is_finished:
                self._step()
                if state.step % CHECK_STEPS == 0 or state.step == self.steps:
                    self._look(on_look)
        except KeyboardInterrupt:
            state.stopped = state.is_finished = True
            if not state.looks:
                raise  # nothing to keep yet
        self._go_back()
        self._save()
        return state

    @torch.no_grad()
    def held_out(self) -> float:
        """Give the weighted mean KL per token on the text to judge by, in nats."""
        total, counted = 0.0, 0.0
        for batch in self.data.check:
            ids = self.data.ids(batch)
            (hidden,) = self.chain.forward([ids])[-1]
            weights = self.data.weights_of(batch, ids)
            for row, wanted, own in self._logits(batch, ids, hidden):
                found, wanted = own.log_softmax(-1), wanted.log_softmax(-1)
                each = functional.kl_div(found, wanted, reduction="none", log_target=True)
                total += float(each.sum(-1).mul(weights[row]).sum())
            counted += float(weights.sum())
        return total / counted

    def _step(self) -> None:
        state, fit = self.state, self.data.fit
        epoch, place = divmod(state.step, len(fit))
        dice = torch.Generator().manual_seed(self.seed + epoch)
        batch = fit[int(torch.randperm(len(fit), generator=dice)[place])]
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
        """Give the gradient of the weighted sum of the KL over the usual weight, by hidden states.

        By the own logits it is what the own probabilities have more than the wanted ones.
        """
        weights = self.data.weights_of(batch, ids) / self.usual_weight
        own = hidden.detach().requires_grad_()
        with torch.enable_grad():
            for row, wanted, found in self._logits(batch, ids, own):
                by_logits = found.detach().softmax(-1).sub_(wanted.softmax(-1))
                by_logits.mul_(weights[row, :, None])
                found.backward(by_logits)  # type: ignore[no-untyped-call]
        assert own.grad is not None
        return own.grad

    def _logits(
        self, batch: int, ids: Tensor, hidden: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Give each row's number, and the base's and the own logits, fp32 [tokens, vocabulary]."""
        stream, base = self.chain.stream, self.data.base(batch)
        with stream.at(self.chain.num_blocks):
            for row in range(len(ids)):
                part = slice(row, row + 1)
                with torch.no_grad():
                    wanted = run_tail(stream, ids[part], base[part])[0].float()
                with self.student.enter_outside():
                    own = run_tail(stream, ids[part], hidden[part])[0].float()
                yield row, wanted, own

    def _look(self, on_look: Callable[[TuningState], None]) -> None:
        state = self.state
        found = self.held_out()
        state.looks.append((state.step, found))
        first = len(state.looks) == 1
        if not first and found < state.best * (1 - LEAST_GAIN):
            state.best_step = state.step
            self.best = {name: c.detach().clone() for name, c in self.changes.items()}
        elif not first:
            state.rate *= RETREAT
            self._go_back()
            # What it had seen on the way to a worse model would lead there again.
            self.optimizer.state.clear()
        since = sum(step > state.best_step for step, _ in state.looks)
        state.is_finished = state.step >= self.steps or since >= PATIENCE
        self._save()
        on_look(state)

    @torch.no_grad()
    def _go_back(self) -> None:
        for name, change in self.changes.items():
            change.copy_(self.best[name])

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            tensors[f"now.{name}"] = change.detach()
            tensors[f"best.{name}"] = self.best[name]
            # The shards may hold trained scales by the time that this is read.
            tensors[f"start.{name}"] = self.student.trainable[name].start
            for key, value in self.optimizer.state.get(change, {}).items():
                tensors[f"{key}.{name}"] = value
        state = self.state
        told = {
            "step": state.step,
            "best_step": state.best_step,
            "rate": state.rate,
            "looks": state.looks,
            "is_finished": state.is_finished,
            "stopped": state.stopped,
        }
        write_shard(self.path, tensors, {"state": json.dumps(told)})

    def _load(self) -> None:
        tensors = read_shard(self.path)
        told = json.loads(read_metadata(self.path)["state"])
        told["looks"] = [(int(step), float(kl)) for step, kl in told["looks"]]
        self.state = TuningState(**told)
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
