"""Triton programs that run in Triton's interpreter: modules made anew while it is switched on."""

from __future__ import annotations

import importlib.util
import sys


def interpret(monkeypatch, *names):
    """Replace modules of Triton programs by interpreted ones, for a test."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in names:
        spec = importlib.util.find_spec(name)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
