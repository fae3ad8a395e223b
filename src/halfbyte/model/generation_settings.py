"""Generation with given settings alone, whatever the model's own are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig


@contextmanager
def use_only(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Make these the settings of ``model.generate`` within a ``with`` block.

    Settings passed to ``generate`` are completed from the model's, by its end of text, penalties
    and beams.

    Args:
        model: A model of Transformers; its own settings are restored afterwards.
        settings: Those that are None have no effect.

    Yields:
        Nothing.
    """
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
