"""What holds for all tests.

One thread for each process: tiny models gain nothing from more, and the tests run in two processes
at a time (``make test``). What threads share has tests of its own (kernels/test_threads.py).
"""

from __future__ import annotations

import os
import platform
import sys

# Before anybody imports torch; processes that tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from tests.helpers.native import ISAS, LIBRARY

from halfbyte.kernels.cuda_compiler import load_nvrtc


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set of the compiled library that this machine has."""
    assert LIBRARY.functions.hb_select_isa(request.param.encode()) == 0
    yield request.param
    LIBRARY.functions.hb_select_isa(None)


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    """NVRTC, and no machine code on disk yet."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("NVRTC comes with the test dependencies on Linux on x86-64 only")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return load_nvrtc()
