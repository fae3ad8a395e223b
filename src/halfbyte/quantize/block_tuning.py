"""Train the codes and scales of one block against the base model's output of that block.

The sweep rounds one linear at a time on a quadratic model of its own error. Here all linears of a
block are trained together, through the block's forward pass, to reproduce the base model's hidden
states behind the block. Each weight is a latent number that is rounded to its code, with a
straight-through gradient. A latent starts within the interval of its code, shifted towards the
exact weight, and moves by half a code at most; only consistent gradients move it far. The result
is kept if it is better on held-out text.

Source:
    Learned rounding: Cheng et al. 2023 (AutoRound), https://arxiv.org/abs/2309.05516, which starts
    from plain rounding and uses sign gradient descent. Started from GPTQ's codes, that loses more
    than it gains (docs/log.md); Adam and a start away from the interval's edge avoid this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.model.blocks import LinearTensors, linear_weight, set_linear_weight
from halfbyte.quantize.grid import Grid, round_to_stored, sum_groups
from halfbyte.quantize.rounding import RoundedLinear, pack_rounded
from halfbyte.quantize.target import CHECK_EVERY

CHECKS = 4
"""How many times the held-out error is measured during training."""
MAX_START_OFFSET = 0.3
"""Largest initial distance of a latent from the middle of its code; the edge is at 0.5."""
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99
"""Adam's decay rates of the first and second moment."""
SCALE_RATE = 0.1
"""Relative step of a scale, as a multiple of a latent's learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLinear:
    """A linear's codes and grid after tuning."""

    grid: Grid
    codes: Tensor
    """uint8 [out, in]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTuning:
    """The result of tuning one block."""

    linears: Mapping[str, TunedLinear]
    """By name within the block; empty if no step improved the held-out error."""
    before: float
    """Held-out error before tuning: squared distance to the base model's hidden states relative to
    their squared norm, mean over tokens."""
    after: float


class TuningData:
    """Outputs of one block and their targets, batch by batch."""

    def __init__(
        self,
        run: Callable[[int], Tensor],
        target: Callable[[int], Tensor],
        num_batches: int,
    ) -> None:
        """Split the batches into training and held-out ones.

        Args:
            run: Runs the block on a batch; supports autograd.
            target: Returns the base model's hidden states behind the block for that batch.
            num_batches: Number of batches; every fourth is held out.
        """
        self.run = run
        self.target = target
        self.held_out = list(range(CHECK_EVERY - 1, num_batches, CHECK_EVERY))
        self.training = [batch for batch in range(num_batches) if batch not in self.held_out]

    def compute_error(self, batch: int) -> Tensor:
        """Compute the squared distance to the target over its squared norm, mean over tokens.

        Relative to each token, because the next block normalizes each of them, and because the
        first token may be hundreds of times as large as all others.
        """
        target = self.target(batch).float()
        error = (self.run(batch).float() - target).square().sum(-1)
        return (error / target.square().sum(-1)).mean()

    @torch.no_grad()
    def measure_held_out_error(self) -> float:
        """Return the mean error on the held-out batches."""
        return sum(float(self.compute_error(batch)) for batch in self.held_out) / len(self.held_out)


def tune_rounded(
    block: nn.Module,
    rounded: Sequence[RoundedLinear],
    exact: Mapping[str, LinearTensors],
    data: TuningData,
    *,
    steps: int,
    seed: int,
) -> list[RoundedLinear]:
    """Tune the rounded linears of a block if that reduces the held-out error; note the outcome.

    Args:
        block: The block; its linears are set to the returned weights.
        rounded: Results of the sweep.
        exact: Weight and bias of the linears before rounding, by name within the block.
        data: The block's outputs and targets.
        steps: Training steps.
        seed: Shuffles the batches.

    Returns:
        The linears, tuned or as they were, in the same order.
    """
    if not data.held_out:
        return [_add_note(r, "not tuned: too little text to hold some out") for r in rounded]
    tuning = tune_block(
        block,
        {r.module: (r.grid, r.codes, exact[r.module].weight) for r in rounded},
        data,
        steps=steps,
        seed=seed,
    )
    if not tuning.linears:
        return [_add_note(r, "not tuned: no improvement on held-out text") for r in rounded]
    share = tuning.after / tuning.before
    note = f"tuned together with its block: held-out error {share:.1%} of that before"
    results = []
    for linear in rounded:
        tuned = tuning.linears[linear.module]
        module = block.get_submodule(linear.module)
        result = pack_rounded(
            linear.module,
            tuned.grid,
            tuned.codes,
            bias=linear.tensors.get("bias"),
            report=linear.report,
        )
        set_linear_weight(module, result.weight)
        results.append(_add_note(result, note))
    return results


def _add_note(linear: RoundedLinear, note: str) -> RoundedLinear:
    report = replace(linear.report, notes=(*linear.report.notes, note))
    return replace(linear, report=report)


def tune_block(
    block: nn.Module,
    linears: Mapping[str, tuple[Grid, Tensor, Tensor]],
    data: TuningData,
    *,
    steps: int,
    seed: int,
) -> BlockTuning:
    """Train the codes and scales of a block's linears.

    Args:
        block: The block; on return its linears have their previous weights again.
        linears: Grid, codes [out, in] and exact weight [out, in], by name within the block.
        data: The block's outputs and targets.
        steps: Training steps, one batch each.
        seed: Shuffles the batches.

    Returns:
        The best codes and scales found, and the held-out error before and after.
    """
    modules = {name: block.get_submodule(name) for name in linears}
    latents = {
        name: _Latent(*linear, dtype=linear_weight(modules[name]).dtype)
        for name, linear in linears.items()
    }
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    try:
        with torch.enable_grad():
            _set_weights(modules, latents)
            before = best_error = data.measure_held_out_error()
            best: dict[str, TunedLinear] = {}
            for step in range(steps):
                if not queue:
                    order = torch.randperm(len(data.training), generator=generator).tolist()
                    queue = [data.training[i] for i in order]
                _set_weights(modules, latents)
                data.compute_error(queue.pop()).backward()  # type: ignore[no-untyped-call]
                rate = (1 - step / steps) / steps
                for latent in latents.values():
                    latent.step(rate)
                if (step + 1) % max(1, steps // CHECKS) == 0 or step == steps - 1:
                    for latent in latents.values():
                        latent.round_scales()
                    _set_weights(modules, latents)
                    error = data.measure_held_out_error()
                    if error < best_error:
                        best_error = error
                        best = {name: latent.quantize() for name, latent in latents.items()}
    finally:
        for module in modules.values():
            module.__dict__.pop("weight", None)
    return BlockTuning(linears=best, before=before, after=best_error)


def _set_weights(modules: Mapping[str, nn.Module], latents: Mapping[str, _Latent]) -> None:
    """Set every linear's weight to its rounded latents, as part of the autograd graph."""
    for name, module in modules.items():
        weight = latents[name].weight()
        # A plain attribute, which is found before the module's parameter: another Parameter would
        # cut the gradient off from the latents.
        module.__dict__["weight"] = weight.t() if isinstance(module, Conv1D) else weight


class _Latent:
    """The trainable latents and scales of one linear, with their Adam state."""

    def __init__(self, grid: Grid, codes: Tensor, exact: Tensor, *, dtype: torch.dtype) -> None:
        self.grid = grid
        self.dtype = dtype
        rounded = codes.float() - grid.column_zeros()
        unrounded = exact.float() / grid.column_scales()
        start = torch.clamp(unrounded, rounded - MAX_START_OFFSET, rounded + MAX_START_OFFSET)
        self.values = start.requires_grad_()
        self.mean, self.square = torch.zeros_like(unrounded), torch.zeros_like(unrounded)
        self.num_steps = 0
        self.scales = grid.scales.clone().requires_grad_()
        self.lowest = -grid.column_zeros()
        self.highest = self.lowest + float(2**grid.bits - 1)

    def weight(self) -> Tensor:
        return _RoundedWeight.apply(  # type: ignore[no-any-return,no-untyped-call]
            self.values, self.scales, self.lowest, self.highest, self.grid.g_idx, self.dtype
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take an Adam step on the latents and a sign step on the scales.

        Each scale sums the gradients of hundreds of weights, so its sign is reliable.
        """
        gradient = self.values.grad
        assert gradient is not None
        assert self.scales.grad is not None
        self.num_steps += 1
        self.mean.lerp_(gradient, 1 - MEAN_DECAY)
        self.square.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
        size = (self.square / (1 - SQUARE_DECAY**self.num_steps)).sqrt_().add_(1e-20)
        self.values.addcdiv_(self.mean, size, value=-rate / (1 - MEAN_DECAY**self.num_steps))
        self.scales.mul_(1 - SCALE_RATE * rate * (self.scales.grad * self.scales).sign())
        self.values.grad = self.scales.grad = None

    @torch.no_grad()
    def round_scales(self) -> None:
        """Round the scales to their stored precision, before the held-out error is measured."""
        self.scales.copy_(round_to_stored(self.scales))

    @torch.no_grad()
    def quantize(self) -> TunedLinear:
        codes = self.values.round().clamp_(self.lowest, self.highest).sub_(self.lowest)
        grid = Grid(
            bits=self.grid.bits,
            scales=self.scales.detach().clone(),
            zeros=self.grid.zeros,
            g_idx=self.grid.g_idx,
        )
        return TunedLinear(grid=grid, codes=codes.to(torch.uint8))


class _RoundedWeight(torch.autograd.Function):
    """scale * clamp(round(latent)) with a straight-through gradient for the rounding."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        scales: Tensor,
        lowest: Tensor,
        highest: Tensor,
        g_idx: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(latent, scales, lowest, highest, g_idx)
        rounded = latent.round().clamp_(lowest, highest)
        return rounded.mul_(scales[:, g_idx]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        latent, scales, lowest, highest, g_idx = ctx.saved_tensors
        gradient = gradients[0].float()
        rounded = latent.round()
        inside = (rounded >= lowest) & (rounded <= highest)
        rounded = rounded.clamp_(lowest, highest)
        by_scale = sum_groups(gradient * rounded, g_idx, scales.shape[1])
        by_latent = gradient.mul_(scales[:, g_idx]).mul_(inside)
        return by_latent, by_scale, None, None, None, None
