"""The compiled library, for tests that need it."""

from __future__ import annotations

import pytest

from halfbyte.kernels.native_library import open_library

LIBRARY = open_library()

NEEDS_LIBRARY = [
    pytest.mark.native,
    pytest.mark.skipif(LIBRARY.functions is None, reason=str(LIBRARY.obstacle)),
]
"""Marks for test files that need the library (``pytestmark``)."""

ISAS = [] if LIBRARY.functions is None else LIBRARY.functions.hb_isas().decode().split(",")
"""Instruction sets of this machine, best last."""
