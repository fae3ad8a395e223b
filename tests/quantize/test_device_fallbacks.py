"""Slower fallbacks of a device are listed."""

from __future__ import annotations

import torch

from halfbyte.quantize import device_fallbacks
from halfbyte.quantize.device_fallbacks import find_device_fallbacks


def test_fallbacks_are_listed_with_reasons(monkeypatch):
    # The meta device suffices: without Triton no kernel is launched.
    monkeypatch.setattr(device_fallbacks.columns, "find_triton_obstacle", lambda: "needs Triton")
    monkeypatch.setattr(device_fallbacks.grid, "find_kernel_obstacle", lambda *_: None)
    monkeypatch.setattr(device_fallbacks, "find_fp32_sum_obstacle", lambda *_: "RuntimeError: no")
    device_fallbacks.columns.find_kernel_obstacle.cache_clear()
    device = torch.device("meta")
    found = find_device_fallbacks(device, torch.bfloat16, symmetric=True)
    device_fallbacks.columns.find_kernel_obstacle.cache_clear()
    assert found == [
        "Hessians are summed without tensor cores on meta, which is slower: RuntimeError: no",
        "columns are rounded without a Triton kernel on meta, which is slower: needs Triton",
    ]


def test_a_cpu_has_no_fallbacks():
    assert find_device_fallbacks(torch.device("cpu"), torch.bfloat16, symmetric=True) == []
