"""Activations in 8 bits: asked for on a loaded model, and what they change.

::

    model on cpu_native ──round_activations──> its layers on cpu_int8, over the same packed weights
                        ──measure_rounding──> divergence from the predictions without
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.data import evaluation_text
from halfbyte.errors import ConfigError
from halfbyte.evaluate.divergence import DivergenceAccumulator, DivergenceResult
from halfbyte.evaluate.windows import split_windows, tokenize_text
from halfbyte.nn.activations import round_input, unrounded
from halfbyte.nn.linear import QuantLinear
from halfbyte.run_config import ACTIVATIONS

WINDOW, WINDOWS = 128, 4
"""What the rounding is measured on, if nothing else is said."""


def round_activations(model: PreTrainedModel, activations: str = "int8") -> int:
    """Let a model's quantized layers round their input, those that can.

    Args:
        model: Loaded on a CPU, its kernels chosen; changed in place.
        activations: One of ACTIVATIONS; "float" leaves the model as it is.

    Returns:
        How many layers do; the others (of 3 bits, say) stay as they were.

    Raises:
        ConfigError: None can, and why; or there is no such kind.
    """
    if activations not in ACTIVATIONS:
        raise ConfigError(
            f"activations is {activations!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}."
        )
    if activations == "float":
        return 0
    count, reason = 0, "the model has no quantized layers"
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        mismatch = round_input(layer)
        if mismatch is None:
            count += 1
        else:
            reason = f"{name} {mismatch}"
    if not count:
        raise ConfigError(
            f"Activations in int8 were asked for, and no layer can take them: {reason}. Leave "
            "activations at 'float'."
        )
    return count


def measure_rounding(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | None = None,
    *,
    window: int = WINDOW,
    windows: int = WINDOWS,
) -> DivergenceResult:
    """Compare a model that rounds its activations with itself without that.

    Args:
        model: As :func:`round_activations` left it.
        tokenizer: The model's.
        text: To compare on; None: the built-in prose.
        window: Tokens that the model sees at a time.
        windows: At most so many of them.

    Returns:
        The divergence; its base is the model without rounding.
    """
    ids = tokenize_text(tokenizer, evaluation_text() if text is None else text)
    found = DivergenceAccumulator()
    for tokens in split_windows(ids, window, limit=windows).ids:
        with torch.inference_mode():
            rounded = model(tokens[None]).logits[0, :-1]
            with unrounded(model):
                base = model(tokens[None]).logits[0, :-1]
        found.update(base, rounded, tokens[1:])
    return found.result(note="activations as computed against activations in int8")
