"""Switch a loaded model to int8 activations, and measure what that changes.

::

    model on cpu_native ──round_activations──> layers on cpu_int8, with the same packed weights
                        ──measure_rounding──> divergence from the predictions without rounding
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
"""Tokens per window and number of windows that rounding is measured on by default."""


def round_activations(model: PreTrainedModel, activations: str = "int8") -> int:
    """Switch a model's quantized layers to int8 activations where supported.

    Args:
        model: Loaded on a CPU, with its kernels selected; changed in place.
        activations: One of ACTIVATIONS; "float" changes nothing.

    Returns:
        The number of switched layers; others, such as those of 3 bits, are unchanged.

    Raises:
        ConfigError: No layer supports int8 activations, or the value is unknown.
    """
    if activations not in ACTIVATIONS:
        raise ConfigError(
            f"activations is {activations!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}."
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
            f"Cannot use int8 activations: no layer supports them: {reason}. Leave activations at "
            "'float'."
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
    """Compare a model with int8 activations to the same model without rounding.

    Args:
        model: Changed by :func:`round_activations`.
        tokenizer: The model's tokenizer.
        text: Text to compare on; None: the built-in prose.
        window: Tokens per window.
        windows: Maximum number of windows.

    Returns:
        The divergence, with the model without rounding as the base.
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
