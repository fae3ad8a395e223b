"""Fixtures that run tests with and without the compiled library."""

from __future__ import annotations

import pytest

from halfbyte.convert import bit_order
from halfbyte.kernels.native_library import NativeLibrary, open_library

NONE = NativeLibrary(functions=None, obstacle="left out by a test", isa="")


@pytest.fixture(params=["torch", pytest.param("compiled", marks=pytest.mark.native)])
def backend(request, monkeypatch):
    """Run a test in torch and, if available, with the compiled library."""
    if request.param == "torch":
        monkeypatch.setattr(bit_order, "open_library", lambda: NONE)
    else:  # marked as native, so that a missing library fails here as in every such test
        assert open_library().functions is not None, open_library().obstacle
    return request.param
