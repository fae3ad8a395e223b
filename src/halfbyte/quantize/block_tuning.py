"""Codes and scales of one block -> better ones, trained on what the block as a whole computes.

The sweep settles one linear at a time on a quadratic model of its own error. Here all linears of a
block are trained together, through the block's own forward, to give the base model's hidden states
behind it. Each weight is a latent number that is rounded to its code; the gradient passes the
rounding as if it were not there. A latent starts inside its code, on the side of the exact weight,
and moves by half a code at most, far only where its gradients agree. What comes of it is kept
where it is better on text that was not trained on.

Source:
    Learned rounding: Cheng et al. 2023 (AutoRound), https://arxiv.org/abs/2309.05516, which starts
    from plain rounding and follows the gradient's sign. From GPTQ's codes that undoes more than it
    gains (docs/log.md): Adam's mean gradient over its size, and a start away from the edge, do not.
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
"""How often the held-out error is looked at."""
FURTHEST = 0.3
"""How far from the middle of its code a latent may start; the edge is at 0.5."""
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99
"""Adam's."""
SCALE_RATE = 0.1
"""Relative step of a scale per step of a latent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLinear:
    """A linear's codes and grid after tuning."""

    grid: Grid
    codes: Tensor
    """uint8 [out, in]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTuning:
    """What tuning one block gave."""

    linears: Mapping[str, TunedLinear]
    """By name within the block; empty where nothing was better."""
    before: float
    """Squared distance to the base model's hidden states over their squared size, mean over
    held-out tokens."""
    after: float


class TuningData:
    """Inputs and wanted outputs of one block, batch by batch."""

    def __init__(
        self,
        run: Callable[[int], Tensor],
        wanted: Callable[[int], Tensor],
        num_batches: int,
    ) -> None:
        """Take what gives the batches.

        Args:
            run: Runs the block on a batch, with gradients where they are on.
            wanted: The base model's hidden states behind the block for that batch.
            num_batches: How many there are; every fourth is not trained on but judges.
        """
        self.run = run
        self.wanted = wanted
        self.check = list(range(CHECK_EVERY - 1, num_batches, CHECK_EVERY))
        self.fit = [batch for batch in range(num_batches) if batch not in self.check]

    def distance(self, batch: int) -> Tensor:
        """Give the squared distance over the squared size of what is wanted, mean over tokens.

        Token by token, because the next block normalises each, and because a first token may be
        hundreds of times as large as all others.
        """
        wanted = self.wanted(batch).float()
        error = (self.run(batch).float() - wanted).square().sum(-1)
        return (error / wanted.square().sum(-1)).mean()

    @torch.no_grad()
    def held_out(self) -> float:
        """Give the mean distance on the batches to judge by."""
        return sum(float(self.distance(batch)) for batch in self.check) / len(self.check)


def tune_rounded(
    block: nn.Module,
    rounded: Sequence[RoundedLinear],
    exact: Mapping[str, LinearTensors],
    data: TuningData,
    *,
    steps: int,
    seed: int,
) -> list[RoundedLinear]:
    """Tune the linears that were rounded in a block, where that helps, and note what came of it.

    Args:
        block: The block; its linears get the weights of what is given back.
        rounded: What the sweep gave.
        exact: What the linears held before rounding, by name within the block.
        data: The text.
        steps: Training steps.
        seed: Orders the batches.

    Returns:
        The results, in the same order.
    """
    if not data.check:
        return [_noted(r, "not tuned: too little text to confirm it") for r in rounded]
    found = tune_block(
        block,
        {r.module: (r.grid, r.codes, exact[r.module].weight) for r in rounded},
        data,
        steps=steps,
        seed=seed,
    )
    if not found.linears:
        return [_noted(r, "not tuned: nothing better was found on held-out text") for r in rounded]
    share = found.after / found.before
    note = f"tuned with its block, whose held-out error became {share:.1%} of what it was"
    results = []
    for linear in rounded:
        tuned = found.linears[linear.module]
        module = block.get_submodule(linear.module)
        result = pack_rounded(
            linear.module,
            tuned.grid,
            tuned.codes,
            bias=linear.tensors.get("bias"),
            report=linear.report,
        )
        set_linear_weight(module, result.weight)
        results.append(_noted(result, note))
    return results


def _noted(linear: RoundedLinear, note: str) -> RoundedLinear:
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
        block: The block; on return its linears hold what they held before.
        linears: Grid, codes [out, in] and exact weight [out, in], by name within the block.
        data: The text.
        steps: Training steps, one batch each.
        seed: Orders the batches.

    Returns:
        The best that was found.
    """
    modules = {name: block.get_submodule(name) for name in linears}
    latents = {
        name: _Latent(*linear, dtype=linear_weight(modules[name]).dtype)
        for name, linear in linears.items()
    }
    kept = {name: module._parameters.pop("weight") for name, module in modules.items()}
    dice = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    try:
        with torch.enable_grad():
            _put(modules, latents)
            before = best = data.held_out()
            found: dict[str, TunedLinear] = {}
            for step in range(steps):
                if not queue:
                    order = torch.randperm(len(data.fit), generator=dice).tolist()
                    queue = [data.fit[i] for i in order]
                _put(modules, latents)
                data.distance(queue.pop()).backward()  # type: ignore[no-untyped-call]
                rate = (1 - step / steps) / steps
                for latent in latents.values():
                    latent.follow(rate)
                if (step + 1) % max(1, steps // CHECKS) == 0 or step == steps - 1:
                    for latent in latents.values():
                        latent.round_scales()
                    _put(modules, latents)
                    distance = data.held_out()
                    if distance < best:
                        best = distance
                        found = {name: latent.settle() for name, latent in latents.items()}
    finally:
        for name, module in modules.items():
            module.__dict__.pop("weight", None)
            module._parameters["weight"] = kept[name]
    return BlockTuning(linears=found, before=before, after=best)


def _put(modules: Mapping[str, nn.Module], latents: Mapping[str, _Latent]) -> None:
    """Let every linear compute with what its latents round to now."""
    for name, module in modules.items():
        weight = latents[name].weight()
        # A plain attribute: a Parameter would cut the gradient's way to the latents.
        module.__dict__["weight"] = weight.t() if isinstance(module, Conv1D) else weight


class _Latent:
    """The trained numbers of one linear."""

    def __init__(self, grid: Grid, codes: Tensor, exact: Tensor, *, dtype: torch.dtype) -> None:
        self.grid = grid
        self.dtype = dtype
        rounded = codes.float() - grid.column_zeros()
        wanted = exact.float() / grid.column_scales()
        start = torch.clamp(wanted, rounded - FURTHEST, rounded + FURTHEST)
        self.values = start.requires_grad_()
        self.mean, self.square = torch.zeros_like(wanted), torch.zeros_like(wanted)
        self.steps = 0
        self.scales = grid.scales.clone().requires_grad_()
        self.lowest = -grid.column_zeros()
        self.highest = self.lowest + float(2**grid.bits - 1)

    def weight(self) -> Tensor:
        return _RoundedWeight.apply(  # type: ignore[no-any-return,no-untyped-call]
            self.values, self.scales, self.lowest, self.highest, self.grid.g_idx, self.dtype
        )

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Step against the gradient; a scale against its sign, for it has hundreds of weights."""
        gradient = self.values.grad
        assert gradient is not None
        assert self.scales.grad is not None
        self.steps += 1
        self.mean.lerp_(gradient, 1 - MEAN_DECAY)
        self.square.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
        size = (self.square / (1 - SQUARE_DECAY**self.steps)).sqrt_().add_(1e-20)
        self.values.addcdiv_(self.mean, size, value=-rate / (1 - MEAN_DECAY**self.steps))
        self.scales.mul_(1 - SCALE_RATE * rate * (self.scales.grad * self.scales).sign())
        self.values.grad = self.scales.grad = None

    @torch.no_grad()
    def round_scales(self) -> None:
        """Judge with what will be stored."""
        self.scales.copy_(round_to_stored(self.scales))

    @torch.no_grad()
    def settle(self) -> TunedLinear:
        codes = self.values.round().clamp_(self.lowest, self.highest).sub_(self.lowest)
        grid = Grid(
            bits=self.grid.bits,
            scales=self.scales.detach().clone(),
            zeros=self.grid.zeros,
            g_idx=self.grid.g_idx,
        )
        return TunedLinear(grid=grid, codes=codes.to(torch.uint8))


class _RoundedWeight(torch.autograd.Function):
    """scale * clamp(round(latent)), whose gradient takes the rounding for the identity."""

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
