"""The names of the KV cache in calls of a model; Transformers 5.24 renamed it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from halfbyte.errors import ModelError

NEW_NAME, OLD_NAME = "cache", "past_key_values"


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the argument that takes the cache; the old one may cause a warning."""
    return NEW_NAME if NEW_NAME in inspect.signature(model.forward).parameters else OLD_NAME


def cache_of(output: ModelOutput) -> Any:
    """Return the cache in a model's output.

    Args:
        output: Of a forward pass that was asked for the cache.

    Returns:
        The cache.

    Raises:
        ModelError: The model has none.
    """
    for name in (NEW_NAME, OLD_NAME):
        if name in output:
            return output[name]
    raise ModelError(
        "The model returns no KV cache, which is needed here. Use one that generates with a cache."
    )
