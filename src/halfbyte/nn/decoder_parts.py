"""Find the parts of a Llama-like decoder that faster decode steps run, by structure.

::

    embeddings -> [norm -> q, k, v -> rotary -> attention -> o
                   norm -> gate, up -> silu -> down] x n -> norm -> head

Having these parts does not prove that a model computes exactly this, so callers compare a few
tokens with the model's forward pass. Those tokens are at the start of a text; :func:`find_drift`
and :func:`find_rotary_mismatch` check that the model computes the same at later positions, i.e.
that attention depends on relative positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from halfbyte.errors import ModelError
from halfbyte.model.context_length import max_context_length
from halfbyte.nn.expert_parts import has_experts

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")

SHIFT_TOKENS = 8
"""Tokens of the probe that is run at several positions."""

MAX_DRIFT = 0.01
"""Maximum relative deviation (L2) of hidden states at another position.

fp32 rounding of angles around a million causes a quarter of it.
"""
NOISE_FACTOR = 3
"""Deviations up to this multiple of the model's own rounding noise are always allowed."""

FAR = 2**24
"""A position beyond the context of any model; the largest range of exact integers in float32."""


def find_structure_mismatch(
    model: PreTrainedModel, find_experts_mismatch: Callable[[Any], str | None] | None = None
) -> str | None:
    """Return how a model's structure differs from the supported one.

    Args:
        model: The loaded model.
        find_experts_mismatch: Returns why a block's mixture of experts is not supported; None if
            blocks may not have a mixture of experts in place of an MLP.

    Returns:
        The first difference; None if there is none.
    """
    base = get_decoder(model)
    parts = ("layers", "norm", "rotary_emb")
    missing = [name for name in parts if not hasattr(base, name)]
    if missing or not len(base.layers):
        return f"a {type(model).__name__} has no {' or '.join(missing) or 'layers'}"
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"it uses sliding-window attention over {config.sliding_window} tokens"
    if ACT2FN[getattr(config, "hidden_act", "silu")].__class__ is not ACT2FN["silu"].__class__:
        return f"its activation is {config.hidden_act}, not silu"
    reasons = (_find_missing(layer, find_experts_mismatch) for layer in base.layers)
    return next(filter(None, reasons), None)


@torch.no_grad()
def find_drift(model: PreTrainedModel) -> str | None:
    """Check by running a probe that a model computes the same at later positions.

    Args:
        model: A model for which :func:`find_structure_mismatch` returns None.

    Returns:
        How far hidden states deviate from those of the same tokens at position 0; None if no more
        than rounding explains.
    """
    config = model.config.get_text_config(decoder=True)
    longest = max_context_length(config) or SHIFT_TOKENS
    trained = _rope_of(model).get("original_max_position_embeddings") or 0
    starts = torch.tensor([0, 1, trained, max(longest - SHIFT_TOKENS, 0)])
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([make_probe_tokens(model, SHIFT_TOKENS)], device=device)
    places = (starts[:, None] + torch.arange(SHIFT_TOKENS)).to(device)
    output = get_decoder(model)(
        tokens.expand(len(starts), -1), position_ids=places, use_cache=False
    ).last_hidden_state.float()
    noise, *drifts = (measure_deviation(model, late, output[0]) for late in output[1:])
    allowed = max(MAX_DRIFT, NOISE_FACTOR * noise)
    for start, drift in zip(starts[2:].tolist(), drifts, strict=True):
        if not drift <= allowed:
            return (
                f"a {type(model).__name__} computes differently from position {start} on: hidden "
                f"states have a relative deviation of {drift:.3f}, allowed are {allowed:.3f}"
            )
    return None


def measure_deviation(model: PreTrainedModel, found: Tensor, expected: Tensor) -> float:
    """Compare hidden states of the same tokens.

    Args:
        model: The model that computed them.
        found: [tokens, hidden].
        expected: [tokens, hidden].

    Returns:
        The relative deviation (L2). For mixtures of experts the median over tokens, because
        rounding alone routes single tokens to other experts.
    """
    if any(map(has_experts, get_decoder(model).layers)):
        return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).median())
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def find_rotary_mismatch(model: PreTrainedModel) -> str | None:
    """Return why a fixed table of rotary angles cannot be used for texts of all lengths.

    Args:
        model: A loaded model for which :func:`find_structure_mismatch` returns None.

    Returns:
        The reason; None if a fixed table can be used.
    """
    rope = _rope_of(model)
    if rope.get("llama_4_scaling_beta"):
        # Too small to distinguish reliably from bf16 rounding.
        return "it scales queries by their position (llama_4_scaling_beta)"
    rotary, device = get_decoder(model).rotary_emb, model.get_input_embeddings().weight.device
    near = torch.arange(SHIFT_TOKENS, device=device)[None]
    far = torch.cat([near, near[:, :1] + FAR], dim=1)
    # Run the near ones once more at the end: some models remember the longest text so far.
    alone, among, _ = (rotary(torch.empty(0, device=device), p)[0] for p in (near, far, near))
    if torch.equal(alone[0], among[0, :SHIFT_TOKENS]):
        return None
    return f"its rotary angles depend on a text's length (rope_type {rope.get('rope_type')})"


def _rope_of(model: PreTrainedModel) -> dict[str, Any]:
    return getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}


def _find_missing(
    layer: Any, find_experts_mismatch: Callable[[Any], str | None] | None
) -> str | None:
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    is_mixture = find_experts_mismatch is not None and has_experts(layer)
    wanted: Sequence[tuple[Any, Sequence[str]]] = (
        (attention, (*ATTENTION, "head_dim", "scaling")),
        (mlp, () if is_mixture else MLP),
        (layer, NORMS),
    )
    for parent, names in wanted:
        for name in names:
            if not hasattr(parent, name):
                return f"a block ({type(layer).__name__}) has no {name}"
    return find_experts_mismatch(layer) if find_experts_mismatch and is_mixture else None


def get_decoder(model: PreTrainedModel) -> Any:
    """Return the decoder of a model, the module that contains the blocks.

    Args:
        model: The loaded model.

    Returns:
        The decoder.

    Raises:
        ModelError: The model has no decoder.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is None:
        raise ModelError(f"A {type(model).__name__} has no decoder to generate with.")
    return decoder


def unwrap(module: Any) -> Any:
    """Return a module without what PEFT wrapped around it: adapters, or a copy that it trains."""
    module = getattr(module, "base_layer", module)
    return getattr(module, "original_module", module)


def get_epsilon(norm: Any) -> float:
    """Return the epsilon of a norm."""
    value = getattr(norm, "variance_epsilon", None)
    return float(getattr(norm, "eps", 1e-6) if value is None else value)


def make_probe_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Generate token ids spread over the vocabulary, to probe a model with."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    return [(7919 * (i + 1)) % vocabulary for i in range(count)]
