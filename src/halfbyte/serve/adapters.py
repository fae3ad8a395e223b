"""Load and unload adapters by name from one folder; clients never send a path."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from halfbyte.checkpoint.labels import ADAPTER_CONFIG
from halfbyte.errors import ConfigError, ServeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_is_loaded(name: str, loaded: Collection[str]) -> None:
    """Check that an adapter is loaded.

    Args:
        name: The adapter's name.
        loaded: Names of the loaded adapters.

    Raises:
        ServeError: 404 if the adapter is not loaded; lists the loaded ones.
    """
    if name not in loaded:
        raise ServeError(
            f"The adapter {name} is not loaded. Loaded adapters: {', '.join(loaded) or 'none'}.",
            status=404,
            code="model_not_found",
            param="model",
        )


@runtime_checkable
class AdapterBackend(Protocol):
    """A backend that can load and unload adapters."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models and adapters that are served."""

    @property
    def adapter_folders(self) -> Mapping[str, str]:
        """Folder of each loaded adapter, by name."""

    @property
    def missing_adapters(self) -> dict[str, str]:
        """Adapters of the model that this one replaced which could not be loaded, and why."""

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load the adapter in a folder and serve it under a name."""

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""


class AdapterFolder:
    """The adapters that clients may load, one subfolder each."""

    def __init__(self, folder: Path, current: Callable[[], object]) -> None:
        """Open the folder.

        Args:
            folder: Contains one subfolder per adapter.
            current: Returns the backend that currently serves the model.

        Raises:
            ConfigError: The folder does not exist.
        """
        if not folder.is_dir():
            raise ConfigError(
                f"Cannot serve adapters: the folder '{folder}' does not exist. Check --adapters."
            )
        self._folder = folder.resolve()
        self._current = current

    async def load(self, name: str) -> None:
        """Load an adapter.

        Args:
            name: Name of its subfolder.

        Raises:
            ServeError: 404 if it does not exist, 409 if the name is already served.
        """
        path = self._find(name)
        backend = self._get_backend()
        if name in backend.models:
            raise ServeError(
                f"Cannot load '{name}': a model or adapter of that name is already served. Unload "
                "it first.",
                status=409,
                code="already_loaded",
                param="lora_name",
            )
        await backend.load_adapter(name, str(path))

    async def unload(self, name: str) -> None:
        """Unload an adapter.

        Args:
            name: Name of a loaded adapter.
        """
        await self._get_backend().unload_adapter(name)

    def _get_backend(self) -> AdapterBackend:
        backend = self._current()
        if not isinstance(backend, AdapterBackend):
            raise ServeError(
                "The current model cannot load adapters because it runs on another server.",
                status=404,
                code="not_supported",
            )
        return backend

    def _find(self, name: str) -> Path:
        path = (self._folder / name).resolve() if _NAME.fullmatch(name) else None
        # resolve() follows symbolic links: one that leads out of the folder is rejected too.
        if path is None or path.parent != self._folder or not (path / ADAPTER_CONFIG).is_file():
            raise ServeError(
                f"The adapters folder of this server has no adapter '{name[:80]}'.",
                status=404,
                code="adapter_not_found",
                param="lora_name",
            )
        return path
