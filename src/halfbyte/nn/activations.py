"""Layers whose input is rounded to 8 bits, and the same layers without that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from halfbyte.kernels.cpu_int8 import CpuInt8
from halfbyte.kernels.cpu_native import CpuNative
from halfbyte.kernels.registry import Selection
from halfbyte.nn.linear import QuantLinear


def round_input(layer: QuantLinear) -> str | None:
    """Let a layer round its input, if it can.

    Args:
        layer: Its kernel is chosen.

    Returns:
        Why it cannot; None where it does from now on.
    """
    kernel, chosen = CpuInt8(), layer.selection
    if chosen is None or not isinstance(chosen.kernel, CpuNative):
        return f"runs on {chosen.kernel.name if chosen else 'no kernel yet'}, not cpu_native"
    reason = kernel.find_mismatch(layer.spec)
    if reason is None:
        # Both read the same packed weight.
        layer.selection = Selection(kernel=kernel, reason="asked for", rejected={})
    return reason


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Let no layer round its input for as long as this lasts.

    Args:
        model: Changed in place, and back.

    Yields:
        Nothing.
    """
    exact = Selection(kernel=CpuNative(), reason="to compare with", rejected={})
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
