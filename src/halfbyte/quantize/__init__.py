"""Quantizes a model with GPTQ.

::

    pipeline -> run: text, plan, journal -> attempt -> block_walk -> block_work -> rounding
                                                    -> end_to_end_stage, head -> finish -> reload

The package itself is callable: ``halfbyte.quantize(model, output, ...)`` calls
:func:`halfbyte.quantize.pipeline.quantize`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A package that can be called like its main function, which has the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from halfbyte.quantize.pipeline import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
