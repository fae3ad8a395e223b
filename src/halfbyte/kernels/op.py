"""Run a quantized linear: input checks, the torch custom op and its gradient.

::

    quantized_linear ──(gradient, torch.compile, fake tensors)──> torch.ops.halfbyte.linear ──┐
                     └─(plain inference: saves 10 µs per call)─> Kernel.apply <───────────────┘

The gradient with respect to x dequantizes the weight again, one tile at a time if the kernel
supports that; no dense copy outlives the call. Weights have no gradient: they are integers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.kernels.contract import GradientKernel, Kernel, LinearSpec, Operands
from halfbyte.kernels.registry import find_kernel

_OPERANDS = "Tensor[] weight, Tensor qzeros, Tensor scales, Tensor? g_idx"
_SPEC = (
    "int bits, int group_size, int in_features, int out_features, bool symmetric, int zero_offset"
)


def quantized_linear(
    x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec, kernel: Kernel
) -> Tensor:
    """Compute ``x @ dequantize(weight).T + bias``.

    Args:
        x: [..., in], with the dtype and device of the spec.
        operands: As returned by the kernel's ``prepare``.
        bias: [out] in the same dtype, or None.
        spec: The layer.
        kernel: A kernel that can run the layer.

    Returns:
        [..., out]; differentiable with respect to x and bias.

    Raises:
        ConfigError: x does not have the width, dtype or device of the layer.
    """
    if x.shape[-1] != spec.in_features or x.dtype != spec.dtype:
        raise ConfigError(
            f"Cannot run a quantized linear {spec.in_features} -> {spec.out_features} in "
            f"{spec.dtype}: the input is {x.dtype} with {x.shape[-1]} columns. "
            "Give it the width and dtype of the layer."
        )
    if x.device.type != spec.device_type:
        raise ConfigError(
            f"Cannot run a quantized linear {spec.in_features} -> {spec.out_features} on "
            f"{spec.device_type}: the input is on {x.device}. Move both to the same device."
        )
    if _needs_op(x, bias):
        result: Tensor = torch.ops.halfbyte.linear(
            x,
            list(operands.weight),
            operands.qzeros,
            operands.scales,
            operands.g_idx,
            bias,
            kernel.name,
            *_spec_arguments(spec),
        )
        return result
    return kernel.apply(x, operands, bias, spec)


def dequantize(
    operands: Operands, spec: LinearSpec, kernel: Kernel, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the dequantized weight of a layer.

    Args:
        operands: As returned by the kernel's ``prepare``.
        spec: The layer.
        kernel: The kernel that prepared the operands.
        dtype: Dtype of the result; None: that of the spec.

    Returns:
        [out, in], a new tensor.
    """
    dtype = spec.dtype if dtype is None else dtype
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.halfbyte.dequantize(
            list(operands.weight),
            operands.qzeros,
            operands.scales,
            operands.g_idx,
            kernel.name,
            *_spec_arguments(spec),
            dtype,
        )
        return result
    return kernel.dequantize(operands, spec, dtype)


def _needs_op(x: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return True
    trains = x.requires_grad or (bias is not None and bias.requires_grad)
    return trains and torch.is_grad_enabled()


def _spec_arguments(spec: LinearSpec) -> tuple[int | bool, ...]:
    return (
        spec.bits,
        spec.group_size,
        spec.in_features,
        spec.out_features,
        spec.symmetric,
        spec.zero_offset,
    )


@functools.lru_cache(maxsize=1024)
def _make_spec(
    arguments: tuple[Any, ...], act_order: bool, dtype: torch.dtype, device_type: str
) -> LinearSpec:
    bits, group_size, in_features, out_features, symmetric, zero_offset = arguments
    return LinearSpec(
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        symmetric=symmetric,
        act_order=act_order,
        zero_offset=zero_offset,
        dtype=dtype,
        device_type=device_type,
    )


@torch.library.custom_op(
    "halfbyte::linear",
    mutates_args=(),
    schema=f"(Tensor x, {_OPERANDS}, Tensor? bias, str kernel, {_SPEC}) -> Tensor",
)
def _linear_op(
    x: Tensor,
    weight: list[Tensor],
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    kernel: str,
    *spec_arguments: Any,
) -> Tensor:
    spec = _make_spec(spec_arguments, g_idx is not None, x.dtype, x.device.type)
    operands = Operands(weight=tuple(weight), qzeros=qzeros, scales=scales, g_idx=g_idx)
    return find_kernel(kernel).apply(x, operands, bias, spec)


@_linear_op.register_fake
def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    out_features = arguments[-3]
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op(
    "halfbyte::dequantize",
    mutates_args=(),
    schema=f"({_OPERANDS}, str kernel, {_SPEC}, ScalarType dtype) -> Tensor",
)
def _dequantize_op(
    weight: list[Tensor],
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    kernel: str,
    *arguments: Any,
) -> Tensor:
    *spec_arguments, dtype = arguments
    spec = _make_spec(tuple(spec_arguments), g_idx is not None, dtype, scales.device.type)
    operands = Operands(weight=tuple(weight), qzeros=qzeros, scales=scales, g_idx=g_idx)
    return find_kernel(kernel).dequantize(operands, spec, dtype).contiguous()


@_dequantize_op.register_fake
def _fake_dequantize(
    weight: list[Tensor], qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *arguments: Any
) -> Tensor:
    in_features, out_features, dtype = arguments[-5], arguments[-4], arguments[-1]
    return scales.new_empty(out_features, in_features, dtype=dtype)


@torch.library.custom_op(
    "halfbyte::input_gradient",
    mutates_args=(),
    schema=f"(Tensor gradient, {_OPERANDS}, str kernel, {_SPEC}) -> Tensor",
)
def _input_gradient_op(
    gradient: Tensor,
    weight: list[Tensor],
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    kernel: str,
    *spec_arguments: Any,
) -> Tensor:
    device_type = gradient.device.type
    spec = _make_spec(spec_arguments, g_idx is not None, gradient.dtype, device_type)
    operands = Operands(weight=tuple(weight), qzeros=qzeros, scales=scales, g_idx=g_idx)
    found = find_kernel(kernel)
    if isinstance(found, GradientKernel):
        return found.input_gradient(gradient, operands, spec)
    return gradient @ found.dequantize(operands, spec, gradient.dtype)


@_input_gradient_op.register_fake
def _fake_input_gradient(gradient: Tensor, *arguments: Any) -> Tensor:
    in_features = arguments[-4]
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, qzeros, scales, g_idx, bias, *rest = inputs
    ctx.has_bias = bias is not None
    ctx.arguments = rest
    ctx.save_for_backward(*weight, qzeros, scales, g_idx)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    *weight, qzeros, scales, g_idx = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.halfbyte.input_gradient(
            gradient, weight, qzeros, scales, g_idx, *ctx.arguments
        )
    if ctx.has_bias and ctx.needs_input_grad[5]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return (to_x, [None] * len(weight), None, None, None, to_bias, *([None] * len(ctx.arguments)))


_linear_op.register_autograd(_backward, setup_context=_save_for_backward)
