"""A decode step without Python between its layers: one call of the compiled library for all tokens.

::

    model ──find_obstacle──> None: blocks of norm, attention (q, k, v, o; rotary), norm, gated MLP
                                   with a silu, or experts of such; every linear on cpu_native
          ──NativeDecoder(model, capacity)──> read(prompt) ──> step, step …
          ──NativeDecoder(model, capacity, pages)──> run(tokens of many sequences), run …

Blocks are known by their parts, not by the model's name, and that is not trusted: a new decoder
runs a few tokens beside the model's own forward and refuses a model that computes something else.
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
    bare_linear,
    base_of,
    epsilon_of,
    find_drift,
    find_moving_angles,
    find_structure_mismatch,
    make_probe_tokens,
    measure_deviation,
)
from halfbyte.nn.expert_parts import expert_parts, has_experts
from halfbyte.nn.linear import QuantLinear

PROBE_TOKENS = 8
"""Tokens that are run both ways before a model is trusted."""

MOST_DEVIATION = 0.05
"""Of the hidden states, as a share of their length; bf16 alone makes about 0.01."""


class NativeDecoder:
    """The blocks of a model over a cache in pages, and the step that runs tokens through them."""

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        cache: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        """Gather the model's parts; its weights are used where they are.

        Args:
            model: One of which :func:`find_obstacle` said None.
            capacity: Positions that a sequence can have.
            cache: Keys and values of each layer, [pages, key heads, page tokens, width] in the
                linears' type; None: one page, for a single sequence.
        """
        base = base_of(model)
        layers: list[Any] = list(base.layers)
        attention = layers[0].self_attn
        query, key = bare_linear(attention.q_proj), bare_linear(attention.k_proj)
        self.capacity = capacity
        self._base = base
        self._embeddings = model.get_input_embeddings()
        self._kept: list[Any] = []
        head_dim = attention.head_dim
        kv_heads = key.out_features // head_dim
        if cache is None:
            shape = (1, kv_heads, capacity, head_dim)
            # Left as the system gives it: most of a long cache is never touched.
            keys, values = (
                [torch.empty(shape, dtype=query.spec.dtype) for _ in layers] for _ in "kv"
            )
            cache = keys, values
        self.keys, self.values = cache
        positions = torch.arange(capacity)[None]
        cosines, sines = base.rotary_emb(torch.empty(0), position_ids=positions)
        self._blocks = (Block * len(layers))(*map(self._make_block, range(len(layers)), layers))
        self._decoder = Decoder(
            blocks=len(layers),
            hidden=query.in_features,
            heads=query.out_features // head_dim,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=cosines.shape[-1],
            **_mlp_sizes(layers),
            dtype=DTYPES[self.keys[0].dtype],
            activation_bits=min(map(_activation_bits, layers)),
            pages=self.keys[0].shape[0],
            page_tokens=self.keys[0].shape[2],
            capacity=capacity,
            epsilon=epsilon_of(layers[0].input_layernorm),
            scale=attention.scaling,
            cosines=self._keep(cosines[0]),
            sines=self._keep(sines[0]),
            last_norm=self._keep(base.norm.weight),
            block=self._blocks,
        )

    def read(self, prompt: Sequence[int]) -> Tensor:
        """Run a prompt of the sequence on the first page.

        Args:
            prompt: Ids, from position 0 on.

        Returns:
            The last hidden states after the last norm, float32 [tokens, hidden].
        """
        positions = list(range(len(prompt)))
        return self.run(prompt, positions, [0], [0] * len(prompt), prompt=True)

    def step(self, token: int, position: int) -> Tensor:
        """Run one token of the sequence on the first page.

        Args:
            token: Its id.
            position: Its place in the sequence, from 0; all before it must have been run.

        Returns:
            The last hidden state after the last norm, float32 [hidden].
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
        """Run tokens of any sequences; a row's result does not depend on the others.

        Args:
            tokens: Ids; those of one sequence in the order of their positions.
            positions: Of each; all before them have been run, or stand before them here.
            tables: Page numbers of one sequence after the other.
            starts: For each token, where in `tables` its sequence begins.
            prompt: They may run on matrix units, which is faster and not the same to the last bit.

        Returns:
            The last hidden states after the last norm, float32 [tokens, hidden].
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
            linear = bare_linear(wrapped)
            packed = linear.operands.weight[0]
            # A layer may be repacked elsewhere; the library must not read what is gone.
            self._kept.append(packed)
            if name.startswith("experts."):
                addresses.append(packed.data_ptr())
                continue
            short = name.removesuffix("_proj")
            pointers[short] = packed.data_ptr()
            pointers[f"{short}_bias"] = self._keep(linear.bias)
        if addresses:
            array = (ctypes.c_void_p * len(addresses))(*addresses)
            router = expert_parts(layer).router.detach().to(self.keys[0].dtype).contiguous()
            self._kept += [array, router]
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
        """Address of the numbers in float32; they live as long as the decoder does."""
        if tensor is None:
            return None
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def find_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a model cannot be decoded this way; None where it can.

    Args:
        model: Loaded and prepared.

    Returns:
        The reason. Without one the model's forward and this one agreed on some tokens, and the
        model computes the same with those late in a text.
    """
    reason = open_library().obstacle or _find_mismatch(model)
    if reason:
        return reason
    # In activations as they are: rounding them is another matter.
    with unrounded(model):
        return _find_deviation(model) or find_drift(model)


def _find_mismatch(model: PreTrainedModel) -> str | None:
    mismatch = find_structure_mismatch(model, takes_experts=True)
    if mismatch:
        return mismatch
    base = base_of(model)
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
    return find_moving_angles(model)


def _linears(layer: Any) -> dict[str, Any]:
    """All linears of a block by name, with adapters around them: attention, then MLP or experts."""
    linears = {name: getattr(layer.self_attn, name) for name in ATTENTION}
    if has_experts(layer):
        return linears | dict(expert_parts(layer).linears)
    return linears | {name: getattr(layer.mlp, name) for name in MLP}


def _sizes(layer: Any) -> tuple[tuple[int, int], ...]:
    """Widths of a block's linears, those of attention first."""
    linears = _linears(layer).values()
    return tuple((linear.in_features, linear.out_features) for linear in linears)


def _mlp_sizes(layers: Sequence[Any]) -> dict[str, int]:
    """What the decoder must know of MLPs and experts; 0 where there are none."""
    mixtures = [layer for layer in layers if has_experts(layer)]
    dense = [layer for layer in layers if not has_experts(layer)]
    sizes = {"intermediate": bare_linear(dense[0].mlp.gate_proj).out_features} if dense else {}
    if mixtures:
        parts = expert_parts(mixtures[0])
        sizes |= {
            "experts": len(parts.router),
            "expert_width": next(iter(parts.linears.values())).out_features,
            "experts_per_token": parts.per_token,
            "normalise_routes": int(parts.normalise),
        }
    return sizes


def _activation_bits(layer: Any) -> int:
    """8 where a linear takes such activations; one that cannot is passed over by the library."""
    linears = map(bare_linear, _linears(layer).values())
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
    """Run some tokens both ways."""
    tokens = make_probe_tokens(model, PROBE_TOKENS)
    half = PROBE_TOKENS // 2
    with torch.inference_mode():
        base = base_of(model)
        expected = base(torch.tensor([tokens]), use_cache=False).last_hidden_state[0, half:]
        decoder = NativeDecoder(model, PROBE_TOKENS)
        decoder.read(tokens[:half])
        found = torch.stack([decoder.step(tokens[i], i) for i in range(half, PROBE_TOKENS)])
    deviation = measure_deviation(model, found, expected.float())
    if deviation <= MOST_DEVIATION:
        return None
    return (
        f"a {type(model).__name__} computes something else: hidden states deviate by "
        f"{deviation:.3f} of their length, allowed are {MOST_DEVIATION}"
    )


def cache_of(output: Any) -> Any:
    """The cache in a model's output; Transformers is renaming it."""
    found = getattr(output, "cache", None)
    return output.past_key_values if found is None else found
