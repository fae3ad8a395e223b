"""Load the adapters of the model in use into the one that replaces it."""

from __future__ import annotations

import logging

from halfbyte.serve.adapters import AdapterBackend
from halfbyte.serve.backend import Backend

log = logging.getLogger(__name__)


async def transfer_adapters(source: Backend, target: Backend) -> dict[str, str]:
    """Load the adapters of one model into another, so that requests that name them still work.

    Args:
        source: The model in use; it keeps its adapters.
        target: The model that replaces it. Its `missing_adapters` gets those that do not fit.

    Returns:
        The reason for each adapter that could not be loaded, by name.
    """
    missing: dict[str, str] = {}
    if not isinstance(source, AdapterBackend):
        return missing
    tried: set[str] = set()
    # The folders are read again for each: another adapter may be loaded in the meantime.
    while names := [name for name in source.adapter_folders if name not in tried]:
        name = names[0]
        tried.add(name)
        if not isinstance(target, AdapterBackend):
            missing[name] = f"{target.name} does not load adapters"
            log.warning("The adapter %s is not available any more: %s", name, missing[name])
        elif name not in target.models:
            try:
                await target.load_adapter(name, source.adapter_folders[name])
            except Exception as error:
                log.exception("The adapter %s is not available any more", name)
                missing[name] = target.missing_adapters[name] = str(error)
    return missing
