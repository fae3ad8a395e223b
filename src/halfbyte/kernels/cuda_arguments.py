"""The parameter struct that the CUDA kernels share: ``Arguments`` in ``cuda/base.cu``."""

from __future__ import annotations

import ctypes

from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.fragments import find_zeros


class Arguments(ctypes.Structure):
    """The ctypes mirror of ``Arguments`` in ``cuda/base.cu``."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("arrivals", ctypes.c_void_p),
        ("rows", ctypes.c_uint),
        ("in_features", ctypes.c_uint),
        ("out_features", ctypes.c_uint),
        ("group_steps", ctypes.c_uint),
        ("group_shift", ctypes.c_int),
    )


def fill_arguments(
    rows: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    result: Tensor,
    partials: Tensor | None,
    arrivals: Tensor,
) -> Arguments:
    """Fill in the parameter struct of a launch; the tensors must stay alive until the launch."""
    zeros = find_zeros(operands, spec)
    steps = max(spec.group_size // 64, 1)
    return Arguments(
        codes=operands.weight[0].data_ptr(),
        scales=operands.scales.data_ptr(),
        zeros=None if zeros is None else zeros.data_ptr(),
        x=rows.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        result=result.data_ptr(),
        partials=None if partials is None else partials.data_ptr(),
        arrivals=arrivals.data_ptr(),
        rows=rows.shape[0],
        in_features=spec.in_features,
        out_features=spec.out_features,
        group_steps=steps,
        group_shift=steps.bit_length() - 1 if steps & (steps - 1) == 0 else -1,
    )
