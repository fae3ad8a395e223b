"""The parts of a decoder that a faster step takes over, known by what they are and not by a name.

::

    embeddings -> [norm -> q, k, v -> rotary -> attention -> o
                   norm -> gate, up -> silu -> down] x n -> norm -> head

That a model has these parts does not say that it computes just this: whoever uses them compares
some tokens with the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from halfbyte.errors import ModelError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def find_structure_mismatch(model: PreTrainedModel) -> str | None:
    """Say what a model lacks, or has besides.

    Args:
        model: Loaded.

    Returns:
        The first difference; None: all parts are there.
    """
    base = base_of(model)
    parts = ("layers", "norm", "rotary_emb")
    missing = [name for name in parts if not hasattr(base, name)]
    if missing or not len(base.layers):
        return f"a {type(model).__name__} has no {' or '.join(missing) or 'layers'}"
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"it looks back {config.sliding_window} tokens only"
    if ACT2FN[getattr(config, "hidden_act", "silu")].__class__ is not ACT2FN["silu"].__class__:
        return f"its activation is {config.hidden_act}, not silu"
    reasons = (reason for layer in base.layers if (reason := _find_missing(layer)))
    return next(reasons, None)


def _find_missing(layer: Any) -> str | None:
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    wanted: Sequence[tuple[Any, Sequence[str]]] = (
        (attention, (*ATTENTION, "head_dim", "scaling")),
        (mlp, MLP),
        (layer, NORMS),
    )
    for parent, names in wanted:
        for name in names:
            if not hasattr(parent, name):
                return f"a block ({type(layer).__name__}) has no {name}"
    return None


def base_of(model: PreTrainedModel) -> Any:
    """Give the part of a model that has the blocks.

    Args:
        model: Loaded.

    Returns:
        Its decoder.

    Raises:
        ModelError: It has none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is None:
        raise ModelError(f"A {type(model).__name__} has no decoder to generate with.")
    return decoder


def bare_linear(linear: Any) -> Any:
    """A linear without the adapters that PEFT put around it."""
    return getattr(linear, "base_layer", linear)


def epsilon_of(norm: Any) -> float:
    """What a norm adds before it takes the root."""
    value = getattr(norm, "variance_epsilon", None)
    return float(getattr(norm, "eps", 1e-6) if value is None else value)


def make_probe_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Make up token ids, scattered over the vocabulary, to try a model with."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    return [(7919 * (i + 1)) % vocabulary for i in range(count)]
