"""The compiled decoder on a CPU: one library call runs tokens through all blocks.

::

    model ──find_obstacle──> None: blocks of norm, attention (q, k, v, o; rotary), norm, gated MLP
                                   with a silu or mixture of such experts, every linear on
                                   cpu_native
          ──NativeDecoder(model, capacity)──> prefill(prompt) ──> step, step …
          ──NativeDecoder(model, capacity, pages)──> run(tokens of many sequences), run …

Blocks are recognized by their parts, not by the model's name. As that does not prove that they
compute the same, :func:`find_obstacle` also runs a few tokens through both this decoder and the
model's forward, and rejects a model whose results differ.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.kernels.cpu_native import CpuNative
from halfbyte.kernels.native_library import (
    DTYPES,
    Block,
    Decoder,
    Rows,
    check_status,
    open_library,
)
from halfbyte.nn.activations import unrounded
from halfbyte.nn.decoder_parts import (
    ATTENTION,
    MLP,
    NORMS,
    find_drift,
    find_rotary_mismatch,
    find_structure_mismatch,
    get_decoder,
    get_epsilon,
    make_probe_tokens,
    measure_deviation,
    unwrap,
)
from halfbyte.nn.expert_parts import expert_parts, find_experts_mismatch, has_experts
from halfbyte.nn.linear import QuantLinear

PROBE_TOKENS = 8
"""Tokens that are run both ways to check a model."""

MAX_DEVIATION = 0.05
"""Maximum relative deviation (L2) of hidden states; bf16 rounding alone causes about 0.01."""


class NativeDecoder:
    """The blocks of a model with a paged KV cache, run by the compiled library."""

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        cache: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        """Collect the model's parts; its weights are used in place.

        Args:
            model: A model for which :func:`find_obstacle` returns None.
            capacity: Maximum number of positions of a sequence.
            cache: Keys and values of each layer, [pages, key heads, page tokens, head dimension] in
                the dtype of the linears; None: a single page, for one sequence.
        """
        base = get_decoder(model)
        layers: list[Any] = list(base.layers)
        attention = layers[0].self_attn
        sizes = get_sizes(model)
        self.capacity = capacity
        self._base = base
        self._embeddings = unwrap(model.get_input_embeddings())
        self._tensors: list[Any] = []
        if cache is None:
            shape = (1, sizes["kv_heads"], capacity, sizes["head_dim"])
            dtype = unwrap(attention.q_proj).spec.dtype
            # Uninitialized: most of a long cache is never touched.
            keys, values = ([torch.empty(shape, dtype=dtype) for _ in layers] for _ in "kv")
            cache = keys, values
        self.keys, self.values = cache
        positions = torch.arange(capacity)[None]
        cosines, sines = base.rotary_emb(torch.empty(0), position_ids=positions)
        self._blocks = (Block * len(layers))(*map(self._make_block, range(len(layers)), layers))
        self._decoder = Decoder(
            **sizes,
            rotary_dim=cosines.shape[-1],
            dtype=DTYPES[self.keys[0].dtype],
            activation_bits=min(map(_activation_bits, layers)),
            pages=self.keys[0].shape[0],
            page_tokens=self.keys[0].shape[2],
            capacity=capacity,
            epsilon=get_epsilon(layers[0].input_layernorm),
            scale=attention.scaling,
            cosines=self._keep(cosines[0]),
            sines=self._keep(sines[0]),
            last_norm=self._keep(base.norm.weight),
            block=self._blocks,
        )

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        """Run the prompt of the sequence on the first page.

        Args:
            prompt: Token ids, from position 0 on.

        Returns:
            Hidden states after the final norm, float32 [tokens, hidden].
        """
        positions = list(range(len(prompt)))
        return self.run(prompt, positions, [0], [0] * len(prompt), prompt=True)

    def step(self, token: int, position: int) -> Tensor:
        """Run one token of the sequence on the first page.

        Args:
            token: Token id.
            position: Its position, from 0; all earlier ones must have been run.

        Returns:
            Hidden state after the final norm, float32 [hidden].
        """
        return self.run([token], [position], [0], [0])[0]

    def run(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[int],
        starts: Sequence[int],
        *,
        prompt: bool = False,
    ) -> Tensor:
        """Run tokens of any sequences; the result of one does not depend on the others.

        Args:
            tokens: Token ids; those of one sequence ordered by position.
            positions: Position of each; all earlier ones have been run, or come earlier here.
            tables: Concatenated page tables of the sequences.
            starts: For each token, where in `tables` the page table of its sequence starts.
            prompt: Allow matrix units, which are faster but not bit-identical.

        Returns:
            Hidden states after the final norm, float32 [tokens, hidden].
        """
        x = self._embeddings(torch.tensor(tokens, dtype=torch.int64)).float()
        out = torch.empty_like(x)
        places = torch.tensor([positions, starts], dtype=torch.int64)
        pages = torch.tensor(tables, dtype=torch.int32)
        rows = Rows(
            rows=len(tokens),
            prompt=int(prompt),
            x=x.data_ptr(),
            positions=places[0].data_ptr(),
            tables=pages.data_ptr(),
            starts=places[1].data_ptr(),
            out=out.data_ptr(),
        )
        functions = open_library().functions
        assert functions is not None
        status = functions.hb_decode(self._decoder, rows, torch.get_num_threads())
        if status:
            place = max(positions)
            check_status(status, f"Cannot run the token at position {place} of {self.capacity}")
        return out

    def _make_block(self, index: int, layer: Any) -> Block:
        pointers: dict[str, Any] = {}
        addresses: list[int] = []
        for name, wrapped in _linears(layer).items():
            linear = unwrap(wrapped)
            packed = linear.operands.weight[0]
            # A layer may be repacked elsewhere; the library must not read what is gone.
            self._tensors.append(packed)
            if name.startswith("experts."):
                addresses.append(packed.data_ptr())
                continue
            short = name.removesuffix("_proj")
            pointers[short] = packed.data_ptr()
            pointers[f"{short}_bias"] = self._keep(linear.bias)
        if addresses:
            array = (ctypes.c_void_p * len(addresses))(*addresses)
            router = expert_parts(layer).router.detach().to(self.keys[0].dtype).contiguous()
            self._tensors += [array, router]
            pointers |= {"experts": ctypes.addressof(array), "router": router.data_ptr()}
        norms = [getattr(layer, name).weight for name in NORMS]
        head_norms = [getattr(layer.self_attn, f"{name}_norm", None) for name in "qk"]
        return Block(
            **pointers,
            attention_norm=self._keep(norms[0]),
            mlp_norm=self._keep(norms[1]),
            q_norm=self._keep(getattr(head_norms[0], "weight", None)),
            k_norm=self._keep(getattr(head_norms[1], "weight", None)),
            keys=self.keys[index].data_ptr(),
            values=self.values[index].data_ptr(),
        )

    def _keep(self, tensor: Tensor | None) -> int | None:
        """Return the address of a float32 copy, which lives as long as the decoder."""
        if tensor is None:
            return None
        copy = tensor.detach().float().contiguous()
        self._tensors.append(copy)
        return copy.data_ptr()


def get_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the library's settings for a model that :func:`find_obstacle` accepts: its sizes."""
    layers: list[Any] = list(get_decoder(model).layers)
    attention = layers[0].self_attn
    query, key = unwrap(attention.q_proj), unwrap(attention.k_proj)
    return {
        "blocks": len(layers),
        "hidden": query.in_features,
        "heads": query.out_features // attention.head_dim,
        "kv_heads": key.out_features // attention.head_dim,
        "head_dim": attention.head_dim,
        **_mlp_sizes(layers),
    }


def find_obstacle(model: PreTrainedModel) -> str | None:
    """Return why the compiled decoder cannot run a model.

    Args:
        model: Loaded, with its kernels selected.

    Returns:
        The reason; None if it can. Then the decoder has reproduced the model's forward on a few
        tokens, and the model computes the same at later positions.
    """
    reason = open_library().obstacle or _find_mismatch(model)
    if reason:
        return reason
    # Compare without int8 activations, which deviate on purpose.
    with unrounded(model):
        return _find_deviation(model) or find_drift(model)


def _find_mismatch(model: PreTrainedModel) -> str | None:
    mismatch = find_structure_mismatch(model, find_experts_mismatch)
    if mismatch:
        return mismatch
    base = get_decoder(model)
    reasons = [reason for layer in base.layers if (reason := _layer_mismatch(layer))]
    if reasons:
        return reasons[0]
    kinds = [[x for x in base.layers if has_experts(x) is mixture] for mixture in (False, True)]
    if any(len({_sizes(layer) for layer in layers}) > 1 for layers in kinds):
        return "its blocks differ in size"
    if len({_sizes(layer)[: len(ATTENTION)] for layer in base.layers}) > 1:
        return "the attention of its blocks differs in size"
    sizes = {"head_dim": base.layers[0].self_attn.head_dim, **_mlp_sizes(base.layers)}
    for name in ("head_dim", "intermediate", "expert_width"):
        if sizes.get(name, 0) % 16:
            return f"{name} {sizes[name]} is no multiple of 16"
    return find_rotary_mismatch(model)


def _linears(layer: Any) -> dict[str, Any]:
    """Return all linears of a block by name, adapters included: attention, then MLP or experts."""
    linears = {name: getattr(layer.self_attn, name) for name in ATTENTION}
    if has_experts(layer):
        return linears | dict(expert_parts(layer).linears)
    return linears | {name: getattr(layer.mlp, name) for name in MLP}


def _sizes(layer: Any) -> tuple[tuple[int, int], ...]:
    """Return in and out features of a block's linears, those of attention first."""
    linears = _linears(layer).values()
    return tuple((linear.in_features, linear.out_features) for linear in linears)


def _mlp_sizes(layers: Sequence[Any]) -> dict[str, int]:
    """Return the decoder's settings for MLPs and experts; those left out are 0."""
    mixtures = [layer for layer in layers if has_experts(layer)]
    dense = [layer for layer in layers if not has_experts(layer)]
    sizes = {"intermediate": unwrap(dense[0].mlp.gate_proj).out_features} if dense else {}
    if mixtures:
        parts = expert_parts(mixtures[0])
        sizes |= {
            "experts": len(parts.router),
            "expert_width": next(iter(parts.linears.values())).out_features,
            "experts_per_token": parts.per_token,
            "normalize_weights": int(parts.normalize),
        }
    return sizes


def _activation_bits(layer: Any) -> int:
    """Return 8 if any linear takes 8-bit activations; the library skips those that do not."""
    linears = map(unwrap, _linears(layer).values())
    kernels = [linear.selection.kernel for linear in linears if linear.selection]
    return min(kernel.activation_bits for kernel in kernels if isinstance(kernel, CpuNative))


def _layer_mismatch(layer: Any) -> str | None:
    for name, linear in _linears(layer).items():
        chosen = linear.selection if isinstance(linear, QuantLinear) else None
        if chosen is None or not isinstance(chosen.kernel, CpuNative):
            return f"{name} does not run on {CpuNative.name}"
        if linear.offsets is not None:
            return f"{name} has offsets of a merged adapter"
        if linear.spec.dtype not in (torch.float32, torch.bfloat16):
            return f"{name} computes in {linear.spec.dtype}, not float32 or bfloat16"
    return None


def _find_deviation(model: PreTrainedModel) -> str | None:
    """Compare the hidden states of a few tokens with those of the model's forward."""
    tokens = make_probe_tokens(model, PROBE_TOKENS)
    half = PROBE_TOKENS // 2
    with torch.inference_mode():
        base = get_decoder(model)
        expected = base(torch.tensor([tokens]), use_cache=False).last_hidden_state[0, half:]
        decoder = NativeDecoder(model, PROBE_TOKENS)
        decoder.prefill(tokens[:half])
        found = torch.stack([decoder.step(tokens[i], i) for i in range(half, PROBE_TOKENS)])
    deviation = measure_deviation(model, found, expected.float())
    if deviation <= MAX_DEVIATION:
        return None
    return (
        f"a {type(model).__name__} computes differently: hidden states have a relative deviation "
        f"of {deviation:.3f}, allowed are {MAX_DEVIATION}"
    )
