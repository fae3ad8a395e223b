"""The quantized model as a trainable student: its scales and the gains of its norms are trained.

Codes stay fixed. Each block is assembled from its finished shard (codes) and the base model's files
(everything else), with weights that are computed from the trained values, rounded as they will be
stored. The gradient treats that rounding as the identity (straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.layout import FORMAT_V1, QUANTIZED_SUFFIXES, ZERO_OFFSETS
from halfbyte.checkpoint.shards import read_shard
from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import quantizable_linears
from halfbyte.model.weights import ModelWeights
from halfbyte.packing import unpack_weight, unpack_zeros
from halfbyte.quantize.block_work import cast_block, split_experts
from halfbyte.quantize.grid import Grid, round_to_stored, sum_groups


@dataclass(slots=True)
class TrainableTensor:
    """A trained tensor, ``start + unit * change``."""

    start: Tensor
    """Initial value, fp32."""
    unit: Tensor
    """Scale of ``change``; broadcasts over ``start``."""
    change: Tensor
    """fp32, of ``start``'s shape; the leaf that the optimizer updates."""
    store: Callable[[Tensor], Tensor]
    """Rounds values as they will be stored; returns fp32."""

    @classmethod
    def of_scales(cls, scales: Tensor) -> TrainableTensor:
        """Train scales, each relative to its own initial value."""
        start = scales.float()
        change = torch.zeros_like(start).requires_grad_()
        return cls(start=start, unit=start, change=change, store=round_to_stored)

    @classmethod
    def of_gains(cls, gains: Tensor) -> TrainableTensor:
        """Train a norm's gains, given as stored, relative to their RMS: single ones may be zero."""
        start = gains.detach().float().clone()
        change = torch.zeros_like(start).requires_grad_()
        unit = start.square().mean().sqrt()
        dtype = gains.dtype
        return cls(
            start=start, unit=unit, change=change, store=lambda exact: exact.to(dtype).float()
        )

    def value(self) -> Tensor:
        """Return the current value, rounded as stored; differentiable by ``change``."""
        exact = torch.addcmul(self.start, self.unit, self.change)
        with torch.no_grad():
            off = self.store(exact) - exact
        return exact + off


@dataclass(slots=True)
class _LoadedBlock:
    """A block assembled for training."""

    module: nn.Module
    linears: dict[str, tuple[Grid, Tensor]]
    """Grid and codes uint8 [out, in] by name within the block."""
    gains: list[str]
    """Names of the norms' gains, within the block."""


class Student:
    """The quantized model with trainable scales and gains, used one block at a time."""

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
            weights: The base model; the weights outside the blocks must be loaded.
            shards: One finished shard per block.
            packed: Names on disk of every block's quantized linears.
            dtype: Dtype of the model's computation.
            resident: Keep all blocks' codes in memory, one byte per weight, instead of reading a
                block again each time it is needed.
        """
        self.weights = weights
        self.shards = shards
        self.packed = packed
        self.dtype = dtype
        self.resident = resident
        self.trainable: dict[str, TrainableTensor] = {}
        """By name on disk: ``<linear>.scales``, ``<norm>.weight``."""
        self._loaded: dict[int, _LoadedBlock] = {}
        for index in range(len(shards)):
            with self._load(index) as block:
                for module, (grid, _) in block.linears.items():
                    self.trainable[f"{self._disk_name(index, module)}.scales"] = (
                        TrainableTensor.of_scales(grid.scales)
                    )
                for gain in block.gains:
                    name = self._gain_name(index, gain)
                    self.trainable[name] = TrainableTensor.of_gains(self._read(name))
        for module in self._outside_gains():
            gains = self._read(f"{weights.disk_name(module)}.weight")
            self.trainable[f"{module}.weight"] = TrainableTensor.of_gains(gains)

    @contextmanager
    def enter(self, index: int) -> Iterator[None]:
        """Set a block's weights, computed from the current trained values, within the context."""
        with self._load(index) as block, ExitStack() as stack:
            for module, (grid, codes) in block.linears.items():
                scales = self.trainable[f"{self._disk_name(index, module)}.scales"].value()
                weight = _ScaledCodes.apply(  # type: ignore[no-untyped-call]
                    scales, codes, grid.zeros, grid.g_idx, self.dtype
                )
                linear = block.module.get_submodule(module)
                stored = weight.t() if isinstance(linear, Conv1D) else weight
                _set_weight(stack, linear, stored)
            for name in block.gains:
                value = self.trainable[self._gain_name(index, name)].value()
                owner = block.module.get_submodule(name.removesuffix(".weight"))
                _set_weight(stack, owner, value.to(block.module.get_parameter(name).dtype))
            yield

    @contextmanager
    def enter_outside(self) -> Iterator[None]:
        """Set the trained values outside the blocks within the context."""
        with ExitStack() as stack:
            for name, parameter in self._outside_gains().items():
                value = self.trainable[f"{name}.weight"].value()
                owner = self.weights.model.get_submodule(name)
                _set_weight(stack, owner, value.to(parameter.dtype))
            yield

    def export_outside(self) -> dict[str, Tensor]:
        """Set the trained tensors outside the blocks in the model permanently.

        Returns:
            The tensors to be stored, by name on disk.
        """
        exported = {}
        for name, parameter in self._outside_gains().items():
            value = self.trainable[f"{name}.weight"].value().detach()
            self.weights.model.get_submodule(name)._parameters["weight"] = nn.Parameter(
                value.to(parameter.dtype), requires_grad=False
            )
            stored = self.weights.files.infos[f"{self.weights.disk_name(name)}.weight"].dtype
            exported[f"{self.weights.disk_name(name)}.weight"] = value.to(stored).cpu()
        return exported

    def export_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of a block that training changed.

        Args:
            index: Index of the block.

        Returns:
            Two dicts by name on disk: tensors that replace those of the shard, and the dequantized
            weights of the block's linears, fp32 [out, in].
        """
        changed: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        with self._load(index) as block, torch.no_grad():
            for module, (grid, codes) in block.linears.items():
                name = self._disk_name(index, module)
                scales = self.trainable[f"{name}.scales"].value()
                changed[f"{name}.scales"] = scales.half().t().contiguous().cpu()
                tuned = Grid(bits=grid.bits, scales=scales, zeros=grid.zeros, g_idx=grid.g_idx)
                weights[name] = tuned.dequantize(codes)
            for gain in block.gains:
                name = self._gain_name(index, gain)
                stored = self.weights.files.infos[name].dtype
                changed[name] = self.trainable[name].value().to(stored).cpu()
        return changed, weights

    def close(self) -> None:
        """Free the blocks' memory."""
        for index in self._loaded:
            self.weights.drop_block(index)
        self._loaded.clear()

    @contextmanager
    def _load(self, index: int) -> Iterator[_LoadedBlock]:
        if index in self._loaded:
            yield self._loaded[index]
            return
        block = self._build(index)
        if self.resident:
            self._loaded[index] = block
            yield block
            return
        try:
            yield block
        finally:
            self.weights.drop_block(index)
            release_memory()

    def _build(self, index: int) -> _LoadedBlock:
        split = split_experts(self.weights, index)
        tensors = read_shard(self.shards[index])
        block = self.weights.blocks.modules[index]
        names = {n: self._disk_name(index, n) for n in quantizable_linears(block)}
        packed = {n: name for n, name in names.items() if name in self.packed[index]}
        dense = [n for n, name in names.items() if f"{name}.weight" in tensors]
        block = self.weights.load_block(index, [*packed, *dense, *split])
        cast_block(block, self.weights.dtype, self.dtype)
        for module, name in names.items():
            linear = block.get_submodule(module)
            # Tensors that load_block left out are in the shard: biases, unquantized linears.
            for key, parameter in linear._parameters.items():
                if parameter is not None and parameter.is_meta and f"{name}.{key}" in tensors:
                    stored = tensors[f"{name}.{key}"].to(self.weights.device, self.dtype)
                    linear._parameters[key] = nn.Parameter(stored, requires_grad=False)
        linears = {
            module: _unpack(
                {
                    suffix: tensors[f"{name}.{suffix}"].to(self.weights.device)
                    for suffix in QUANTIZED_SUFFIXES
                }
            )
            for module, name in packed.items()
        }
        return _LoadedBlock(module=block, linears=linears, gains=_gains(block))

    def _read(self, name: str) -> Tensor:
        """Read a tensor of the base model, which its block holds in the compute dtype."""
        return self.weights.files.load([name])[name].to(self.weights.device)

    def _disk_name(self, index: int, module: str) -> str:
        return self.weights.disk_name(f"{self.weights.blocks.name(index)}.{module}")

    def _gain_name(self, index: int, name: str) -> str:
        return f"{self._disk_name(index, name.removesuffix('.weight'))}.weight"

    def _outside_gains(self) -> dict[str, nn.Parameter]:
        """Return the gains of norms after the blocks by module name; others are not trained."""
        model, blocks = self.weights.model, f"{self.weights.blocks.prefix}."
        found = {}
        seen_blocks = False
        for name, module in model.named_modules():
            inside = name.startswith(blocks)
            seen_blocks = seen_blocks or inside
            weight = module._parameters.get("weight")
            if seen_blocks and not inside and weight is not None and weight.dim() == 1:
                found[name] = weight
        return found


def _set_weight(stack: ExitStack, module: nn.Module, weight: Tensor) -> None:
    """Set a module's weight until the stack is closed.

    It becomes a plain attribute, which is found before the module's parameter: another Parameter
    would detach it from the trained values.
    """
    module.__dict__["weight"] = weight
    stack.callback(module.__dict__.pop, "weight")


def _gains(block: nn.Module) -> list[str]:
    """Return the names of a block's one-dimensional weights: the gains of its norms."""
    return [
        name
        for name, parameter in block.named_parameters()
        if parameter.dim() == 1 and name.endswith(".weight")
    ]


def _unpack(tensors: Mapping[str, Tensor]) -> tuple[Grid, Tensor]:
    """Unpack grid and codes from a linear's tensors on disk."""
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
    """scale * (code - zero), differentiable with respect to the scales [out, groups]."""

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
