"""Register halfbyte's GPTQ loader with Transformers, now or when Transformers is imported.

Importing Transformers takes seconds, so ``import halfbyte`` does not import it. Instead it installs
an import hook that replaces the GPTQ entries when Transformers loads its table of quantizers.

::

    import halfbyte ──> install_by_policy ──> install ──┬─ table loaded: replace the entries
                                                        └─ not yet: install an import hook
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from halfbyte.environment import TRANSFORMERS, read_variable

TABLE = "transformers.quantizers.auto"
"""The module with the two dicts of loaders and config classes by quantization method."""

STOCK_PACKAGES = ("optimum", "gptqmodel")
"""Packages that Transformers' own GPTQ loader needs."""


def install() -> None:
    """Register halfbyte's loader for GPTQ checkpoints with Transformers."""
    if TABLE in sys.modules:
        _fill_table()
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def uninstall() -> None:
    """Restore the loader that Transformers had before."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _TableFinder)]
    if TABLE in sys.modules:
        from halfbyte.integrations.transformers import restore_table

        restore_table(sys.modules[TABLE])


def is_installed() -> bool:
    """Whether Transformers loads GPTQ checkpoints through halfbyte."""
    if TABLE not in sys.modules:
        return any(isinstance(finder, _TableFinder) for finder in sys.meta_path)
    from halfbyte.integrations.transformers import is_in_table

    return is_in_table(sys.modules[TABLE])


def install_by_policy() -> str:
    """Install the loader if ``HALFBYTE_TRANSFORMERS`` says so.

    Returns:
        The reason for the decision, for ``halfbyte doctor``.
    """
    decision, reason = decide()
    if decision:
        install()
    return reason


def decide() -> tuple[bool, str]:
    """Decide whether importing halfbyte installs its loader.

    Returns:
        The decision and its reason.
    """
    setting = read_variable(TRANSFORMERS)
    if setting != "auto":
        return setting == "on", f"{TRANSFORMERS.name} is '{setting}'"
    missing = [name for name in STOCK_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return True, f"Transformers' own GPTQ loader needs {' and '.join(missing)}, not installed"
    return False, (
        f"{' and '.join(STOCK_PACKAGES)} are installed, so Transformers' own GPTQ loader works; "
        f"set {TRANSFORMERS.name}=on or call halfbyte.install_transformers() to use halfbyte's"
    )


class _TableFinder(importlib.abc.MetaPathFinder):
    """Import hook that replaces the entries once the module of the table has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLE:
            return None
        # Remove this finder first, or the search below would call it again.
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _TableLoader(spec.loader)
        return spec


class _TableLoader(importlib.abc.Loader):
    """Executes the module with its original loader, then replaces the entries."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _fill_table()


def _fill_table() -> None:
    from halfbyte.integrations.transformers import fill_table

    fill_table(sys.modules[TABLE])
