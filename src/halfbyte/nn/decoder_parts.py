"""The parts of a decoder that a faster step takes over, known by what they are and not by a name.

::

    embeddings -> [norm -> q, k, v -> rotary -> attention -> o
                   norm -> gate, up -> silu -> down] x n -> norm -> head

That a model has these parts does not say that it computes just this: whoever uses them compares
some tokens with the model's own forward. Those are the first ones of a text; that later ones are
computed alike is asked of the model itself, whose attention then goes by distances only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from halfbyte.errors import ModelError
from halfbyte.model.context_length import max_context_length

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")

SHIFT_TOKENS = 8
"""Tokens that are run at several places."""

MOST_DRIFT = 0.01
"""Of the hidden states at another place, as a share of their length; angles of a million in fp32
make a quarter of it."""
NOISE_FACTOR = 3
"""So many times what rounding alone does to the model's own results is allowed in any case."""

FAR = 2**24
"""A position behind all that a model was made for; float32 counts no further."""


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


@torch.no_grad()
def find_drift(model: PreTrainedModel) -> str | None:
    """Say that the model computes something else late in a text, by running tokens there.

    Args:
        model: One whose structure fits.

    Returns:
        How far the hidden states deviate from those of the same tokens at the beginning; None: as
        far as rounding makes them.
    """
    config = model.config.get_text_config(decoder=True)
    longest = max_context_length(config) or SHIFT_TOKENS
    trained = _rope_of(model).get("original_max_position_embeddings") or 0
    starts = torch.tensor([0, 1, trained, max(longest - SHIFT_TOKENS, 0)])
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([make_probe_tokens(model, SHIFT_TOKENS)], device=device)
    places = (starts[:, None] + torch.arange(SHIFT_TOKENS)).to(device)
    output = base_of(model)(
        tokens.expand(len(starts), -1), position_ids=places, use_cache=False
    ).last_hidden_state.float()
    noise, *drifts = ((output[1:] - output[0]).norm(dim=(1, 2)) / output[0].norm()).tolist()
    allowed = max(MOST_DRIFT, NOISE_FACTOR * noise)
    for start, drift in zip(starts[2:].tolist(), drifts, strict=True):
        if not drift <= allowed:
            return (
                f"a {type(model).__name__} computes something else from position {start} on: "
                f"hidden states deviate by {drift:.3f} of their length, allowed are {allowed:.3f}"
            )
    return None


@torch.no_grad()
def find_moving_angles(model: PreTrainedModel) -> str | None:
    """Say that one table of angles cannot serve texts of all lengths.

    Args:
        model: One whose structure fits, with its weights.

    Returns:
        Why not; None where it can.
    """
    rope = _rope_of(model)
    if rope.get("llama_4_scaling_beta"):
        # Too little to be told from the rounding of bf16 for certain.
        return "it scales queries by their position (llama_4_scaling_beta)"
    rotary, device = base_of(model).rotary_emb, model.get_input_embeddings().weight.device
    near = torch.arange(SHIFT_TOKENS, device=device)[None]
    far = torch.cat([near, near[:, :1] + FAR], dim=1)
    # Last the near ones once more: some models remember how long a text was.
    alone, among, _ = (rotary(torch.empty(0, device=device), p)[0] for p in (near, far, near))
    if torch.equal(alone[0], among[0, :SHIFT_TOKENS]):
        return None
    return f"its rotary angles depend on a text's length (rope_type {rope.get('rope_type')})"


def _rope_of(model: PreTrainedModel) -> dict[str, Any]:
    return getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}


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
