"""Run Triton kernels in Triton's interpreter: reload their modules while it is switched on."""

from __future__ import annotations

import importlib.util
import sys


def interpret(monkeypatch, *names):
    """Replace modules of Triton kernels with interpreted ones, for one test."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in names:
        spec = importlib.util.find_spec(name)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
