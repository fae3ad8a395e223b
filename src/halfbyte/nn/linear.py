"""A quantized linear layer that stores packed codes and can be used as an ``nn.Linear``.

::

    tensors as stored ──prepare──> kernel selected, weight repacked if the kernel needs it
                      <──restore── for state_dict and for another device or dtype, bit for bit
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

    Integer codes, scales and bias keep the dtypes that they have on disk, even if the model is
    cast; ``spec.dtype`` is the dtype that the layer computes in. An input of another dtype is cast,
    and the output is cast back.
    """

    def __init__(
        self,
        spec: LinearSpec,
        stored_dtypes: Mapping[str, torch.dtype],
        device: torch.device | str | None = None,
    ) -> None:
        """Create the layer with uninitialized tensors, to be loaded.

        Args:
            spec: Sizes, grid and dtype.
            stored_dtypes: Dtype on disk by tensor: "scales" and optionally "g_idx", "bias" and
                "offsets"; other optional tensors do not exist.
            device: Device of the tensors.
        """
        # Skip nn.Linear.__init__, which would allocate a dense weight.
        nn.Module.__init__(self)
        self.spec = replace(spec, device_type=torch.device(device or "cpu").type)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.selection: Selection | None = None
        self.weight_names: tuple[str, ...] = STORED
        self.fusion: Fusion | None = None
        """The group of linears that this one is fused with, if any (fusion.py)."""
        self.replaces_conv1d = False
        """Whether the model's class has a Conv1D here, whose dense weight is [in, out]."""
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
    """Added to every weight of a group, [groups, out]; None in standard GPTQ checkpoints."""

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], dequantized on use; see :class:`QuantizedWeight`."""
        if torch.compiler.is_compiling():
            return self.dequantize()
        shape = (self.out_features, self.in_features)
        return QuantizedWeight.of(self, shape, self.spec.dtype, self.scales.device)

    @weight.setter
    def weight(self, value: Tensor) -> NoReturn:
        self._refuse_weight()

    @property
    def is_repacked(self) -> bool:
        """Whether the weight is in a kernel's layout instead of ``qweight``."""
        return self.weight_names != STORED

    @property
    def operands(self) -> Operands:
        """The tensors in the layout of the selected kernel."""
        # Read from the dict: nn.Module's attribute lookup costs as much as a small product.
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
        """Return the dequantized weight.

        Args:
            dtype: Dtype of the result; None: the dtype that the layer computes in.

        Returns:
            [out, in], a new tensor.
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
        """Select the kernel, and repack the weight if the kernel needs it.

        Args:
            stored_layout: Allow only kernels that read the weight as stored.
            kernel: Name of a kernel to use instead of the fastest one.

        Returns:
            The selected kernel, with the reasons.
        """
        self.restore()
        # Loaders assign tensors on another device without notifying the module.
        self.spec = replace(self.spec, device_type=self.scales.device.type)
        selection = self._select(stored_layout=stored_layout, kernel=kernel)
        self._repack(selection)
        return selection

    def restore(self) -> None:
        """Undo :meth:`prepare`: restore the stored layout and deselect the kernel."""
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
        """Return ``qweight`` as stored, whatever layout the weight is in."""
        if self.fusion is not None:
            return self.fusion.restore_qweight(self)
        if not self.is_repacked:
            return self.qweight
        assert self.selection is not None
        return self.selection.kernel.restore(self.operands, self.spec)

    def join(self, fusion: Fusion, scales: Tensor, qzeros: Tensor) -> None:
        """Join a fusion, which takes over the weight.

        Args:
            fusion: The fusion that multiplies from now on.
            scales: This layer's part of the fused scales.
            qzeros: This layer's part of the fused zeros.
        """
        for name in self.weight_names:
            delattr(self, name)
        self.weight_names = ()
        self.scales, self.qzeros, self.fusion = scales, qzeros, fusion

    def leave(self, qweight: Tensor) -> None:
        """Leave a fusion: restore the stored layout and deselect the kernel.

        Args:
            qweight: This layer's weight as stored.
        """
        for name in [name for name in self._buffers if name.startswith(PACKED.format(""))]:
            delattr(self, name)
        self.scales, self.qzeros = self.scales.contiguous(), self.qzeros.contiguous()
        self.weight_names = STORED
        self.register_buffer("qweight", qweight)
        self.fusion = self.selection = None

    def check_finite(self, name: str) -> None:
        """Check that scales, bias and offsets are finite.

        Args:
            name: Name of the module, for the message.

        Raises:
            CheckpointError: Some are infinite or NaN; names the tensor and counts them.
        """
        for suffix in ("scales", "bias", "offsets"):
            tensor = getattr(self, suffix)
            if tensor is None or tensor.is_meta or bool(torch.isfinite(tensor).all()):
                continue
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{name}.{suffix} has {bad} of {tensor.numel()} values that are infinite or NaN. "
                "The file is damaged; download or quantize it again."
            )

    def extra_repr(self) -> str:
        """Return sizes, grid and kernel, for ``print(model)``."""
        kernel = self.selection.kernel.name if self.selection else "not prepared"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.spec.bits}, "
            f"group_size={self.spec.group_size}, kernel={kernel}"
        )

    def reset_parameters(self) -> None:
        """Do nothing: packed codes have no random initialization."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as ``nn.Module`` does, but refuse a weight."""
        if name == "weight":
            self._refuse_weight()
        super().register_parameter(name, param)

    @property
    def _groups(self) -> tuple[int, int, Tensor | None]:
        """(in_features, group_size, g_idx), where g_idx is None if groups are contiguous."""
        spec = self.spec
        return spec.in_features, spec.group_size, self.g_idx if spec.act_order else None

    def _repack(self, selection: Selection) -> None:
        """Convert the stored weight to the layout of a kernel."""
        if selection.kernel.repacks:
            packed = selection.kernel.prepare(self.operands, self.spec)
            names = tuple(PACKED.format(index) for index in range(len(packed)))
            for name, tensor in zip(names, packed, strict=True):
                self.register_buffer(name, tensor, persistent=False)
            self.weight_names = names
            # Deleted rather than None: PEFT takes its device from ``qweight`` if there is one.
            del self.qweight
        self.selection = selection

    def _select(self, *, stored_layout: bool, kernel: str | None = None) -> Selection:
        return select(self.spec, stored_layout=stored_layout, forced=kernel)

    def _spec_on(self, device_type: str) -> LinearSpec:
        """Return the spec for the current device, as offloading moves tensors without notice."""
        if device_type == self.spec.device_type or self.is_repacked:
            return self.spec
        return replace(self.spec, device_type=device_type)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move the tensors without casting them; repack if the device or compute dtype changed."""
        probe = fn(torch.empty(0, dtype=self.spec.dtype, device=self.scales.device))
        spec = replace(self.spec, dtype=probe.dtype, device_type=probe.device.type)
        must_repack = self.selection is not None and spec != self.spec
        if must_repack:
            self.restore()
        super()._apply(lambda tensor: _move(fn, tensor), recurse)  # type: ignore[no-untyped-call]
        self.spec = spec
        if must_repack and probe.device.type != "meta":
            self.prepare()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.is_repacked:
            destination[prefix + "qweight"] = self.stored_qweight()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fusion is not None:
            # Views of fused tensors; files need separate ones.
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
        reason = self._find_grid_mismatch(state_dict.get(f"{prefix}qzeros"), "qzeros")
        reason = reason or self._find_grid_mismatch(state_dict.get(f"{prefix}g_idx"), "g_idx")
        if reason is not None:
            # Kernels rely on it: the loaded weights would silently give wrong results.
            error_msgs.append(
                f"{prefix.removesuffix('.') or 'The linear'} {reason}, but the state dict is of "
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

    def _find_grid_mismatch(self, loaded: Tensor | None, name: str) -> str | None:
        """Return which property of this layer a tensor to be loaded contradicts; None if none."""
        spec = self.spec
        current = self._buffers[name]
        if loaded is None or current is None or loaded.is_meta or loaded.shape != current.shape:
            return None  # nn.Module reports missing tensors and different sizes
        if name == "qzeros" and spec.symmetric:
            zeros = unpack_zeros(loaded, spec.bits, spec.zero_offset)
            return None if bool((zeros == 2 ** (spec.bits - 1)).all()) else "has symmetric zeros"
        if name == "g_idx" and not spec.act_order:
            plain = torch.arange(spec.in_features, device=loaded.device) // spec.group_size
            in_order = torch.equal(loaded, plain.to(loaded.dtype))
            return None if in_order else "has contiguous groups"
        return None

    def _refuse_weight(self) -> NoReturn:
        raise ModelError(
            f"Cannot assign a weight to a quantized linear {self.in_features} -> "
            f"{self.out_features}: its weight is packed codes. Replace the module, or convert the "
            "model to ordinary linears with model.dequantize()."
        )


def _move(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply ``fn`` to move a tensor but keep its dtype: casting stored values would lose bits."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
