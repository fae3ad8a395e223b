"""Switch rounding of activations to 8 bits on and off for quantized linears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from halfbyte.kernels.cpu_int8 import CpuInt8
from halfbyte.kernels.cpu_native import CpuNative
from halfbyte.kernels.registry import Selection
from halfbyte.nn.linear import QuantLinear


def round_input(layer: QuantLinear) -> str | None:
    """Switch a layer to int8 activations, if its kernel supports them.

    Args:
        layer: A layer whose kernel is selected; changed in place.

    Returns:
        Why the layer cannot round its input; None if it does from now on.
    """
    kernel, chosen = CpuInt8(), layer.selection
    if chosen is None or not isinstance(chosen.kernel, CpuNative):
        return f"runs on {chosen.kernel.name if chosen else 'no kernel yet'}, not cpu_native"
    reason = kernel.find_mismatch(layer.spec)
    if reason is None:
        # Both read the same packed weight.
        layer.selection = Selection(kernel=kernel, reason="requested", rejected={})
    return reason


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Switch int8 activations off within a ``with`` block.

    Args:
        model: Changed in place, and restored afterwards.

    Yields:
        Nothing.
    """
    exact = Selection(kernel=CpuNative(), reason="reference without rounding", rejected={})
    rounding = [
        (layer, layer.selection)
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
        and layer.selection
        and isinstance(layer.selection.kernel, CpuInt8)
    ]
    try:
        for layer, _ in rounding:
            layer.selection = exact
        yield
    finally:
        for layer, selection in rounding:
            layer.selection = selection
