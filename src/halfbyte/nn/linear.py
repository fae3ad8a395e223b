"""A linear layer whose weight is packed codes, and which other code takes for an ``nn.Linear``.

::

    tensors as stored ──prepare──> kernel chosen, weight repacked where it asks for that
                      <──restore── state_dict, another device or dtype: the stored bits again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, ModelError
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.op import dequantize, quantized_linear
from halfbyte.kernels.registry import Selection, select
from halfbyte.nn.offsets import multiply_offsets, spread_offsets
from halfbyte.nn.weight import QuantizedWeight
from halfbyte.packing import unpack_zeros

if TYPE_CHECKING:
    from halfbyte.nn.fusion import Fusion

STORED = ("qweight",)

PACKED = "packed_{}"
"""Buffers of a repacked weight; they replace ``qweight`` and are never saved."""


class QuantLinear(nn.Linear):
    """``y = x @ dequantize(weight).T + bias`` with the tensors of the GPTQ format as buffers.

    Integer codes, scales and bias keep the dtypes that they have on disk, whatever the model is
    cast to; ``spec.dtype`` is what the layer computes in. An input of another dtype is cast, and
    the output cast back.
    """

    def __init__(
        self,
        spec: LinearSpec,
        stored_dtypes: Mapping[str, torch.dtype],
        device: torch.device | str | None = None,
    ) -> None:
        """Make the layer with uninitialised tensors, to be loaded.

        Args:
            spec: Sizes, grid and dtype.
            stored_dtypes: By tensor ("scales", maybe "g_idx", "bias", "offsets"): its dtype on
                disk; a tensor that is not named does not exist.
            device: Where to make them.
        """
        # Not nn.Linear's own: it would make a dense weight.
        nn.Module.__init__(self)
        self.spec = replace(spec, device_type=torch.device(device or "cpu").type)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.selection: Selection | None = None
        self.weight_names: tuple[str, ...] = STORED
        self.fusion: Fusion | None = None
        """The linears that this one is multiplied with, if any (fusion.py)."""
        words = (spec.in_features * spec.bits // 32, spec.out_features)
        zero_words = (spec.num_groups, spec.out_features * spec.bits // 32)
        optional = {
            "g_idx": (spec.in_features,),
            "bias": (spec.out_features,),
            "offsets": (spec.num_groups, spec.out_features),
        }

        def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer("qweight", make(words, torch.int32))
        self.register_buffer("qzeros", make(zero_words, torch.int32))
        scales = make((spec.num_groups, spec.out_features), stored_dtypes["scales"])
        self.register_buffer("scales", scales)
        for name, shape in optional.items():
            dtype = stored_dtypes.get(name)
            self.register_buffer(name, None if dtype is None else make(shape, dtype))

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bias: Tensor | None  # type: ignore[assignment]
    offsets: Tensor | None
    """Added to every weight of a group, [groups, out]; None in a plain GPTQ checkpoint."""

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in] for code that asks for one; see :class:`QuantizedWeight`."""
        if torch.compiler.is_compiling():
            return self.dequantize()
        shape = (self.out_features, self.in_features)
        return QuantizedWeight.of(self, shape, self.spec.dtype, self.scales.device)

    @weight.setter
    def weight(self, value: Tensor) -> NoReturn:
        self._refuse_weight()

    @property
    def is_repacked(self) -> bool:
        """Whether a kernel's own layout stands in the place of ``qweight``."""
        return self.weight_names != STORED

    @property
    def operands(self) -> Operands:
        """The tensors as the chosen kernel reads them."""
        # Straight from the dict: nn.Module's look-up costs as much as a small product.
        buffers = self._buffers
        return Operands(
            weight=tuple(buffers[name] for name in self.weight_names),  # type: ignore[misc]
            qzeros=buffers["qzeros"],  # type: ignore[arg-type]
            scales=buffers["scales"],  # type: ignore[arg-type]
            g_idx=buffers["g_idx"] if self.spec.act_order else None,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer; [..., in] -> [..., out]."""
        if self.fusion is not None:
            return self.fusion.multiply(self, input)
        selection = self.selection or self._select(stored_layout=True)
        spec = self._spec_on(input.device.type)
        bias = self.bias
        if bias is not None and bias.dtype != spec.dtype:
            bias = bias.to(spec.dtype)
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        result = quantized_linear(input.to(spec.dtype), self.operands, bias, spec, selection.kernel)
        if self.offsets is not None:
            _, size, order = self._groups
            result = result + multiply_offsets(input, self.offsets, size, order)
        return result.to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Give the weight as numbers.

        Args:
            dtype: Of the result; None: what the layer computes in.

        Returns:
            [out, in], in memory of its own.
        """
        if self.fusion is not None:
            return self.fusion.dequantize(self, dtype)
        selection = self.selection or self._select(stored_layout=True)
        spec = self._spec_on(self.scales.device.type)
        if self.offsets is None:
            return dequantize(self.operands, spec, selection.kernel, dtype)
        dtype = dtype or spec.dtype
        wide = torch.promote_types(dtype, torch.float32)
        weight = dequantize(self.operands, spec, selection.kernel, wide)
        return weight.add_(spread_offsets(self.offsets, *self._groups)).to(dtype)

    def prepare(self, *, stored_layout: bool = False, kernel: str | None = None) -> Selection:
        """Choose the kernel, and repack the weight where it wants that.

        Args:
            stored_layout: Only kernels that read the weight as stored.
            kernel: A kernel's name, instead of the fastest that fits.

        Returns:
            The choice.
        """
        self.restore()
        # Loaders put tensors on their device without telling the module.
        self.spec = replace(self.spec, device_type=self.scales.device.type)
        selection = self._select(stored_layout=stored_layout, kernel=kernel)
        self._repack(selection)
        return selection

    def restore(self) -> None:
        """Undo :meth:`prepare`: the weight is as stored again, and no kernel is chosen."""
        if self.fusion is not None:
            others = [member for member in self.fusion.members if member is not self]
            self.fusion.undo()
            for other in others:
                other.prepare()
        if self.is_repacked:
            qweight = self.stored_qweight()
            for name in self.weight_names:
                delattr(self, name)
            self.weight_names = STORED
            self.register_buffer("qweight", qweight)
        self.selection = None

    def stored_qweight(self) -> Tensor:
        """Give ``qweight`` as stored, whatever layout the weight is in."""
        if self.fusion is not None:
            return self.fusion.restore_qweight(self)
        if not self.is_repacked:
            return self.qweight
        assert self.selection is not None
        return self.selection.kernel.restore(self.operands, self.spec)

    def join(self, fusion: Fusion, scales: Tensor, qzeros: Tensor) -> None:
        """Become part of a fusion, which holds the weight.

        Args:
            fusion: Multiplies from now on.
            scales: This layer's part of the fusion's.
            qzeros: This layer's part of the fusion's.
        """
        for name in self.weight_names:
            delattr(self, name)
        self.weight_names = ()
        self.scales, self.qzeros, self.fusion = scales, qzeros, fusion

    def leave(self, qweight: Tensor) -> None:
        """Leave a fusion: the weight is as stored again, and no kernel is chosen.

        Args:
            qweight: This layer's own.
        """
        for name in [name for name in self._buffers if name.startswith(PACKED.format(""))]:
            delattr(self, name)
        self.scales, self.qzeros = self.scales.contiguous(), self.qzeros.contiguous()
        self.weight_names = STORED
        self.register_buffer("qweight", qweight)
        self.fusion = self.selection = None

    def check_finite(self, name: str) -> None:
        """Refuse scales or a bias that are not numbers.

        Args:
            name: The module's, for the message.

        Raises:
            CheckpointError: Some are infinite or not-a-number; names the tensor and counts them.
        """
        for suffix in ("scales", "bias", "offsets"):
            tensor = getattr(self, suffix)
            if tensor is None or tensor.is_meta or bool(torch.isfinite(tensor).all()):
                continue
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{name}.{suffix} has {bad} of {tensor.numel()} values that are infinite or not a "
                "number. The file is damaged; download or quantize it again."
            )

    def extra_repr(self) -> str:
        """Sizes, grid and kernel, for ``print(model)``."""
        kernel = self.selection.kernel.name if self.selection else "not prepared"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.spec.bits}, "
            f"group_size={self.spec.group_size}, kernel={kernel}"
        )

    def reset_parameters(self) -> None:
        """Nothing: there is no random start for packed codes."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``, but refuse a weight."""
        if name == "weight":
            self._refuse_weight()
        super().register_parameter(name, param)

    @property
    def _groups(self) -> tuple[int, int, Tensor | None]:
        """Columns, columns per group, and the group of each where they are out of order."""
        spec = self.spec
        return spec.in_features, spec.group_size, self.g_idx if spec.act_order else None

    def _repack(self, selection: Selection) -> None:
        """Bring the stored weight into the layout of a kernel."""
        if selection.kernel.repacks:
            packed = selection.kernel.prepare(self.operands, self.spec)
            names = tuple(PACKED.format(index) for index in range(len(packed)))
            for name, tensor in zip(names, packed, strict=True):
                self.register_buffer(name, tensor, persistent=False)
            self.weight_names = names
            # Gone rather than None: PEFT takes its device from ``qweight`` where there is one.
            del self.qweight
        self.selection = selection

    def _select(self, *, stored_layout: bool, kernel: str | None = None) -> Selection:
        return select(self.spec, stored_layout=stored_layout, forced=kernel)

    def _spec_on(self, device_type: str) -> LinearSpec:
        """The spec where the tensors are now: offloading moves them behind the module's back."""
        if device_type == self.spec.device_type or self.is_repacked:
            return self.spec
        return replace(self.spec, device_type=device_type)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move the tensors but never cast them; repack where the device or dtype changed."""
        probe = fn(torch.empty(0, dtype=self.spec.dtype, device=self.scales.device))
        spec = replace(self.spec, dtype=probe.dtype, device_type=probe.device.type)
        again = self.selection is not None and spec != self.spec
        if again:
            self.restore()
        super()._apply(lambda tensor: _move(fn, tensor), recurse)  # type: ignore[no-untyped-call]
        self.spec = spec
        if again and probe.device.type != "meta":
            self.prepare()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.is_repacked:
            destination[prefix + "qweight"] = self.stored_qweight()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fusion is not None:
            # Parts of shared tensors; files want tensors of their own.
            for name in ("scales", "qzeros"):
                destination[prefix + name] = destination[prefix + name].contiguous()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        reason = self._find_other_grid(state_dict.get(f"{prefix}qzeros"), "qzeros")
        reason = reason or self._find_other_grid(state_dict.get(f"{prefix}g_idx"), "g_idx")
        if reason is not None:
            # Kernels rely on it: what was loaded would be computed wrong, and nothing would show.
            error_msgs.append(
                f"{prefix.removesuffix('.') or 'The linear'} {reason}, but the state dict's is of "
                "another quantization. Load that checkpoint from its folder."
            )
            return
        selection = self.selection
        self.restore()
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if selection is not None:
            self._repack(selection)

    def _find_other_grid(self, loaded: Tensor | None, name: str) -> str | None:
        """Say what this layer was built for that a tensor to be loaded does not keep to."""
        spec = self.spec
        own = self._buffers[name]
        if loaded is None or own is None or loaded.is_meta or loaded.shape != own.shape:
            return None  # nn.Module tells of what is missing and of other sizes
        if name == "qzeros" and spec.symmetric:
            zeros = unpack_zeros(loaded, spec.bits, spec.zero_offset)
            return None if bool((zeros == 2 ** (spec.bits - 1)).all()) else "has symmetric zeros"
        if name == "g_idx" and not spec.act_order:
            plain = torch.arange(spec.in_features, device=loaded.device) // spec.group_size
            in_order = torch.equal(loaded, plain.to(loaded.dtype))
            return None if in_order else "has its groups in order"
        return None

    def _refuse_weight(self) -> NoReturn:
        raise ModelError(
            f"Cannot assign a weight to a quantized linear {self.in_features} -> "
            f"{self.out_features}: its weight is packed codes. Replace the module, or turn the "
            "model back into ordinary linears with model.dequantize()."
        )


def _move(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply ``fn`` as far as it moves; a cast of what is stored would lose bits."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
