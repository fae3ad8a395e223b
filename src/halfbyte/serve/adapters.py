"""Adapters by name, out of one folder; no path ever comes from a client."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from halfbyte.errors import ConfigError, ServeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_is_loaded(name: str, loaded: Collection[str]) -> None:
    """Refuse an adapter that is not loaded.

    Args:
        name: Of it.
        loaded: Names of those that are.

    Raises:
        ServeError: 404, with the names that there are.
    """
    if name not in loaded:
        raise ServeError(
            f"There is no adapter {name}; loaded are: {', '.join(loaded) or 'none'}.",
            status=404,
            code="model_not_found",
            param="model",
        )


@runtime_checkable
class Loads(Protocol):
    """What takes adapters: a backend over an engine."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names that are served."""

    @property
    def adapter_folders(self) -> Mapping[str, str]:
        """Folder of each loaded adapter, by name."""

    @property
    def missing_adapters(self) -> dict[str, str]:
        """Adapters of the model that this one replaced which could not be loaded, and why."""

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serve the adapter of a folder under a name."""

    async def unload_adapter(self, name: str) -> None:
        """Take it away."""


class AdapterFolder:
    """Adapters that may be served."""

    def __init__(self, folder: Path, current: Callable[[], object]) -> None:
        """Take the folder.

        Args:
            folder: Holds one folder for each adapter.
            current: Gives the model that serves them now.

        Raises:
            ConfigError: There is no such folder.
        """
        if not folder.is_dir():
            raise ConfigError(f"The folder of adapters '{folder}' does not exist.")
        self._folder = folder.resolve()
        self._current = current

    async def load(self, name: str) -> None:
        """Make an adapter servable.

        Args:
            name: Of its folder.

        Raises:
            ServeError: 404: there is none; 409: something of that name is served already.
        """
        place = self._find(name)
        backend = self._find_backend()
        if name in backend.models:
            raise ServeError(
                f"'{name}' is served already. Unload it first.",
                status=409,
                code="already_loaded",
                param="lora_name",
            )
        await backend.load_adapter(name, str(place))

    async def unload(self, name: str) -> None:
        """Take an adapter away.

        Args:
            name: Of a loaded one.
        """
        await self._find_backend().unload_adapter(name)

    def _find_backend(self) -> Loads:
        backend = self._current()
        if not isinstance(backend, Loads):
            raise ServeError(
                "The model that is served now takes no adapters: it runs behind another server.",
                status=404,
                code="not_supported",
            )
        return backend

    def _find(self, name: str) -> Path:
        place = (self._folder / name).resolve() if _NAME.fullmatch(name) else None
        # A link out of the folder would be as good as a path.
        if (
            place is None
            or place.parent != self._folder
            or not (place / "adapter_config.json").is_file()
        ):
            raise ServeError(
                f"There is no adapter '{name[:80]}' among those that may be served.",
                status=404,
                code="adapter_not_found",
                param="lora_name",
            )
        return place
