"""What ``QuantLinear.weight`` gives: a dense weight to look at, made only when it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from halfbyte.errors import ModelError


class Dequantizable(Protocol):
    """A layer that can give its weight as numbers."""

    def dequantize(self) -> Tensor:
        """Give the weight [out, in]."""


class QuantizedWeight(Tensor):
    """The weight of a quantized linear, as code written for ``nn.Linear`` wants to see it.

    Shape, dtype and device are there at once. Any arithmetic on it dequantizes the weight and is
    right; that is done anew each time, so keep the result. Writing to it is refused: the weight is
    packed codes, and a write would go to a copy and be lost.
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
            layer: Asked for the numbers when they are needed.
            shape: [out, in].
            dtype: Of the numbers.
            device: Where they will be.

        Returns:
            The view.
        """
        view: QuantizedWeight = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        view._layer = layer
        # Transformers' weight initialisation passes over tensors with this mark.
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
        """Run an operation on the dequantized weight, or refuse it where it writes.

        Args:
            func: The operation.
            types: Ignored.
            args: Its arguments, with views among them.
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
        """The view itself."""
        return self

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        _refuse_write("data =")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        # torch would write to a view of a dequantized copy.
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
        "a copy in numbers: layer.dequantize(); for a model of ordinary linears: "
        "model.dequantize()."
    )
