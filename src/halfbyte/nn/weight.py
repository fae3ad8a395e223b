"""The tensor behind ``QuantLinear.weight``: a read-only dense weight, dequantized on use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from halfbyte.errors import ModelError


class Dequantizable(Protocol):
    """A layer that can dequantize its weight."""

    def dequantize(self) -> Tensor:
        """Return the weight [out, in]."""


class QuantizedWeight(Tensor):
    """The weight of a quantized linear, for code written for ``nn.Linear``.

    Shape, dtype and device are known without dequantizing. Any operation on it dequantizes the
    whole weight each time, so keep the result. Writing to it raises an error: the weight is packed
    codes, and the write would go to a temporary copy and be lost.
    """

    _layer: Dequantizable

    @classmethod
    def of(
        cls,
        layer: Dequantizable,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> QuantizedWeight:
        """Make a tensor without storage.

        Args:
            layer: The layer that dequantizes its weight when needed.
            shape: [out, in].
            dtype: Dtype of the dequantized weight.
            device: Device of the dequantized weight.

        Returns:
            The view.
        """
        view: QuantizedWeight = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        view._layer = layer
        # Transformers' weight initialization skips tensors with this mark.
        view._is_hf_initialized = True  # type: ignore[attr-defined]
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on the dequantized weight; raise an error if it writes to the weight.

        Args:
            func: The operation.
            types: Ignored.
            args: Its arguments, some of which are such weights.
            kwargs: Its keyword arguments.

        Returns:
            Its result.
        """
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        kwargs = kwargs or {}
        schema = func._schema  # type: ignore[attr-defined]
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, cls):
                _refuse_write(func.__name__)
        return func(*tree_map(_as_numbers, args), **tree_map(_as_numbers, kwargs))

    @property
    def data(self) -> Tensor:
        """The tensor itself."""
        return self

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        _refuse_write("data =")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        # torch would write to a dequantized copy.
        _refuse_write("weight[...] =")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight(shape={list(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._layer.dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._layer.dequantize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _as_numbers(value: Any) -> Any:
    return value._layer.dequantize() if isinstance(value, QuantizedWeight) else value


def _refuse_write(operation: str) -> NoReturn:
    raise ModelError(
        f"Cannot write to the weight of a quantized linear ({operation}): it is packed codes, and "
        "the change would be lost. To merge an adapter: halfbyte merge BASE ADAPTER -o OUT. For "
        "a dequantized copy: layer.dequantize(); for a model of ordinary linears: "
        "model.dequantize()."
    )
