"""Make language models small and run them: GPTQ quantization for Hugging Face models.

::

    import halfbyte                                 # Transformers can now load GPTQ folders
    halfbyte.quantize("model", "model-4bit")        # text + weights -> a standard checkpoint
    halfbyte.divergence("model", "model-4bit")      # what it cost

Names are imported when they are first used, so that ``import halfbyte`` takes milliseconds.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ConfigError as _ConfigError
from halfbyte.integrations.autoload import install as install_transformers
from halfbyte.integrations.autoload import install_by_policy as _install_by_policy
from halfbyte.integrations.autoload import uninstall as uninstall_transformers
from halfbyte.version import __version__

if TYPE_CHECKING:
    from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
    from halfbyte.errors import HalfbyteError
    from halfbyte.evaluate.divergence import DivergenceResult, divergence
    from halfbyte.evaluate.perplexity import PerplexityResult, perplexity
    from halfbyte.integrations.load import load
    from halfbyte.judge.compare import compare
    from halfbyte.judge.comparison import Comparison
    from halfbyte.quant_config import CalibrationConfig, Override, QuantConfig, ResourceConfig
    from halfbyte.quantize.pipeline import quantize
    from halfbyte.quantize.report import QuantizationReport
    from halfbyte.quantize.rotate import rotate

__all__ = [
    "CalibrationConfig",
    "Checkpoint",
    "Comparison",
    "DivergenceResult",
    "HalfbyteError",
    "Override",
    "PerplexityResult",
    "QuantConfig",
    "QuantizationReport",
    "ResourceConfig",
    "__version__",
    "compare",
    "divergence",
    "install_transformers",
    "load",
    "open_checkpoint",
    "perplexity",
    "quantize",
    "rotate",
    "uninstall_transformers",
]

_LAZY = {
    "CalibrationConfig": "halfbyte.quant_config",
    "Checkpoint": "halfbyte.checkpoint.read",
    "Comparison": "halfbyte.judge.comparison",
    "DivergenceResult": "halfbyte.evaluate.divergence",
    "HalfbyteError": "halfbyte.errors",
    "Override": "halfbyte.quant_config",
    "PerplexityResult": "halfbyte.evaluate.perplexity",
    "QuantConfig": "halfbyte.quant_config",
    "QuantizationReport": "halfbyte.quantize.report",
    "ResourceConfig": "halfbyte.quant_config",
    "compare": "halfbyte.judge.compare",
    "divergence": "halfbyte.evaluate.divergence",
    "load": "halfbyte.integrations.load",
    "open_checkpoint": "halfbyte.checkpoint.read",
    "perplexity": "halfbyte.evaluate.perplexity",
    "rotate": "halfbyte.quantize.rotate",
}
"""Name -> its module. ``quantize`` is missing: the package of that name can itself be called."""


def __getattr__(name: str) -> Any:
    if name == "quantize":
        return importlib.import_module("halfbyte.quantize")
    if name not in _LAZY:
        raise AttributeError(f"module 'halfbyte' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


try:
    _install_by_policy()
except _ConfigError as error:
    # The commands refuse such a setting; an import should not fail over it.
    warnings.warn(f"{error} Transformers is left as it is.", stacklevel=2)
