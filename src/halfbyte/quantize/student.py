"""The quantized model of a run as something to train: its scales and the gains of its norms.

Codes stay. Each block is put together from its finished shard (codes) and the base model's files
(everything else), with weights that are computed from the trained numbers, rounded as they will be
stored; the gradient takes that rounding for the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.layout import FORMAT_V1, ZERO_OFFSETS
from halfbyte.checkpoint.shards import read_shard
from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import quantizable_linears
from halfbyte.model.weights import ModelWeights
from halfbyte.packing import unpack_weight, unpack_zeros
from halfbyte.quantize.block_work import cast_block, split_experts
from halfbyte.quantize.grid import Grid, round_to_stored, sum_groups


@dataclass(slots=True)
class TrainedNumber:
    """A tensor that is trained: where it starts, and how far it has gone from there."""

    start: Tensor
    """fp32."""
    unit: Tensor
    """What a change of 1 means, in the tensor's own numbers; broadcasts over it."""
    change: Tensor
    """fp32, of ``start``'s shape; the leaf that the optimizer moves."""
    stored: torch.dtype

    @classmethod
    def of_scales(cls, scales: Tensor) -> TrainedNumber:
        """Train scales, each in parts of itself: its size says how fine it must be."""
        start = scales.float()
        change = torch.zeros_like(start).requires_grad_()
        return cls(start=start, unit=start, change=change, stored=torch.float16)

    @classmethod
    def of_gains(cls, gains: Tensor) -> TrainedNumber:
        """Train a norm's gains, in parts of their common size: single ones may be zero."""
        start = gains.detach().float().clone()
        change = torch.zeros_like(start).requires_grad_()
        unit = start.square().mean().sqrt()
        return cls(start=start, unit=unit, change=change, stored=gains.dtype)

    def value(self) -> Tensor:
        """Give what it is now, rounded as stored; differentiable by ``change``."""
        exact = torch.addcmul(self.start, self.unit, self.change)
        with torch.no_grad():
            if self.stored == torch.float16:
                off = round_to_stored(exact) - exact
            else:
                off = exact.to(self.stored).float() - exact
        return exact + off


@dataclass(slots=True)
class _Part:
    """A block that is put together."""

    module: nn.Module
    linears: dict[str, tuple[Grid, Tensor]]
    """Grid and codes uint8 [out, in] by name within the block."""
    gains: list[str]
    """Names of the norms' gains, within the block."""
    emptied: dict[str, nn.Parameter]
    """The linears' own parameters, which hold nothing, for when this is over."""


class Student:
    """The quantized model, its scales and gains trainable, one block in use at a time."""

    def __init__(
        self,
        weights: ModelWeights,
        shards: Sequence[Path],
        packed: Sequence[Sequence[str]],
        *,
        dtype: torch.dtype,
        resident: bool,
    ) -> None:
        """Read scales and gains of all blocks.

        Args:
            weights: The base model; what is outside the blocks is loaded.
            shards: One finished file per block.
            packed: Disk names of every block's rounded linears.
            dtype: In which the model computes.
            resident: Keep all blocks' codes in memory, a byte per weight, instead of reading each
                block again when it is needed.
        """
        self.weights = weights
        self.shards = shards
        self.packed = packed
        self.dtype = dtype
        self.resident = resident
        self.numbers: dict[str, TrainedNumber] = {}
        """By name on disk: ``<linear>.scales``, ``<norm>.weight``."""
        self._parts: dict[int, _Part] = {}
        for index in range(len(shards)):
            with self._part(index) as part:
                for module, (grid, _) in part.linears.items():
                    self.numbers[f"{self._disk_name(index, module)}.scales"] = (
                        TrainedNumber.of_scales(grid.scales)
                    )
                for name in part.gains:
                    gains = part.module.get_parameter(name)
                    self.numbers[self._gain_name(index, name)] = TrainedNumber.of_gains(gains)
        for name, gains in self._outside_gains().items():
            self.numbers[f"{name}.weight"] = TrainedNumber.of_gains(gains)

    @contextmanager
    def enter(self, index: int) -> Iterator[None]:
        """Put a block's weights in place, computed from what the trained numbers are now."""
        with self._part(index) as part:
            for module, (grid, codes) in part.linears.items():
                scales = self.numbers[f"{self._disk_name(index, module)}.scales"].value()
                weight = _ScaledCodes.apply(  # type: ignore[no-untyped-call]
                    scales, codes, grid.zeros, grid.g_idx, self.dtype
                )
                linear = part.module.get_submodule(module)
                # A plain attribute: a Parameter would cut the gradient's way to the scales.
                linear.__dict__["weight"] = weight.t() if isinstance(linear, Conv1D) else weight
            kept: list[tuple[nn.Module, nn.Parameter]] = []
            for name in part.gains:
                owner = part.module.get_submodule(name.removesuffix(".weight"))
                kept.append((owner, owner._parameters.pop("weight")))  # type: ignore[arg-type]
                value = self.numbers[self._gain_name(index, name)].value()
                owner.__dict__["weight"] = value.to(kept[-1][1].dtype)
            try:
                yield
            finally:
                for module in part.linears:
                    part.module.get_submodule(module).__dict__.pop("weight", None)
                for owner, parameter in kept:
                    owner.__dict__.pop("weight", None)
                    owner._parameters["weight"] = parameter

    @contextmanager
    def enter_outside(self) -> Iterator[None]:
        """Put what is trained outside the blocks in place."""
        kept = []
        for name, parameter in self._outside_gains().items():
            owner = self.weights.model.get_submodule(name)
            kept.append((owner, parameter))
            owner._parameters.pop("weight")
            value = self.numbers[f"{name}.weight"].value()
            owner.__dict__["weight"] = value.to(parameter.dtype)
        try:
            yield
        finally:
            for owner, parameter in kept:
                owner.__dict__.pop("weight", None)
                owner._parameters["weight"] = parameter

    def settle_outside(self) -> dict[str, Tensor]:
        """Leave what was trained outside the blocks in the model.

        Returns:
            The tensors by name on disk, as they are to be stored.
        """
        settled = {}
        for name, parameter in self._outside_gains().items():
            value = self.numbers[f"{name}.weight"].value().detach().to(parameter.dtype)
            self.weights.model.get_submodule(name)._parameters["weight"] = nn.Parameter(
                value, requires_grad=False
            )
            stored = self.weights.files.infos[f"{self.weights.disk_name(name)}.weight"].dtype
            settled[f"{self.weights.disk_name(name)}.weight"] = value.to(stored).cpu()
        return settled

    def settled(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Give a block's tensors that training changed.

        Args:
            index: Which block.

        Returns:
            By name on disk: what replaces tensors of the shard; and the dequantized weights, fp32
            [out, in], of its linears.
        """
        changed: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        with self._part(index) as part, torch.no_grad():
            for module, (grid, codes) in part.linears.items():
                name = self._disk_name(index, module)
                scales = self.numbers[f"{name}.scales"].value()
                changed[f"{name}.scales"] = scales.half().t().contiguous().cpu()
                tuned = Grid(bits=grid.bits, scales=scales, zeros=grid.zeros, g_idx=grid.g_idx)
                weights[name] = tuned.dequantize(codes)
            for gain in part.gains:
                name = self._gain_name(index, gain)
                stored = self.weights.files.infos[name].dtype
                changed[name] = self.numbers[name].value().to(stored).cpu()
        return changed, weights

    def close(self) -> None:
        """Give the blocks' memory back."""
        for index in list(self._parts):
            self._drop(self._parts.pop(index), index)

    @contextmanager
    def _part(self, index: int) -> Iterator[_Part]:
        if index in self._parts:
            yield self._parts[index]
            return
        part = self._build(index)
        if self.resident:
            self._parts[index] = part
            yield part
            return
        try:
            yield part
        finally:
            self._drop(part, index)
            release_memory()

    def _build(self, index: int) -> _Part:
        split = split_experts(self.weights, index)
        tensors = read_shard(self.shards[index])
        block = self.weights.blocks.modules[index]
        names = {n: self._disk_name(index, n) for n in quantizable_linears(block)}
        packed = {n: name for n, name in names.items() if name in self.packed[index]}
        alone = [n for n, name in names.items() if f"{name}.weight" in tensors]
        block = self.weights.load_block(index, [*packed, *alone, *split])
        cast_block(block, self.weights.dtype, self.dtype)
        for module, name in names.items():
            linear = block.get_submodule(module)
            # What load_block left out stands in the shard: biases, linears that stayed dense.
            for key, parameter in linear._parameters.items():
                if parameter is not None and parameter.is_meta and f"{name}.{key}" in tensors:
                    stored = tensors[f"{name}.{key}"].to(self.weights.device, self.dtype)
                    linear._parameters[key] = nn.Parameter(stored, requires_grad=False)
        linears = {}
        emptied = {}
        for module, name in packed.items():
            own = {s: tensors[f"{name}.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx")}
            linears[module] = _unpack({s: t.to(self.weights.device) for s, t in own.items()})
            emptied[module] = block.get_submodule(module)._parameters.pop("weight")
        return _Part(module=block, linears=linears, gains=_gains(block), emptied=emptied)  # type: ignore[arg-type]

    def _drop(self, part: _Part, index: int) -> None:
        for module, parameter in part.emptied.items():
            part.module.get_submodule(module)._parameters["weight"] = parameter
        self.weights.drop_block(index)

    def _disk_name(self, index: int, module: str) -> str:
        return self.weights.disk_name(f"{self.weights.blocks.name(index)}.{module}")

    def _gain_name(self, index: int, name: str) -> str:
        return f"{self._disk_name(index, name.removesuffix('.weight'))}.weight"

    def _outside_gains(self) -> dict[str, nn.Parameter]:
        """Norms behind the blocks, by module name; a norm in front of them has no part in this."""
        model, blocks = self.weights.model, f"{self.weights.blocks.prefix}."
        found = {}
        behind = False
        for name, module in model.named_modules():
            behind = behind or name.startswith(blocks)
            weight = module._parameters.get("weight")
            if behind and not name.startswith(blocks) and weight is not None and weight.dim() == 1:
                found[name] = weight
        return found


def _gains(block: nn.Module) -> list[str]:
    """Name the one-dimensional weights of a block: the gains of its norms."""
    return [
        name
        for name, parameter in block.named_parameters()
        if parameter.dim() == 1 and name.endswith(".weight")
    ]


def _unpack(tensors: Mapping[str, Tensor]) -> tuple[Grid, Tensor]:
    """Read grid and codes out of a linear's tensors as the run wrote them."""
    g_idx = tensors["g_idx"].long()
    bits = 32 * tensors["qweight"].shape[0] // g_idx.numel()
    zeros = unpack_zeros(tensors["qzeros"], bits, ZERO_OFFSETS[FORMAT_V1])
    grid = Grid(
        bits=bits,
        scales=tensors["scales"].float().t().contiguous(),
        zeros=zeros.float(),
        g_idx=g_idx,
    )
    return grid, unpack_weight(tensors["qweight"], bits)


class _ScaledCodes(torch.autograd.Function):
    """scale * (code - zero), differentiable by the scales [out, groups]."""

    @staticmethod
    def forward(
        ctx: Any, scales: Tensor, codes: Tensor, zeros: Tensor, g_idx: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, zeros, g_idx)
        return (codes.float() - zeros[:, g_idx]).mul_(scales[:, g_idx]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, zeros, g_idx = ctx.saved_tensors
        steps = (codes.float() - zeros[:, g_idx]).mul_(gradients[0])
        return sum_groups(steps, g_idx, zeros.shape[1]), None, None, None, None
