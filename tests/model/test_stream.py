"""Running a model block by block gives exactly the outputs of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.families import token_lists, write_family
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.model.blocks import Stage, find_stages
from halfbyte.model.experts import unfuse_experts
from halfbyte.model.stream import BlockStream, ForwardPasses
from halfbyte.model.weights import ModelWeights

TOKENS = 40
"""Longer than the helpers' sliding windows (16)."""


def open_stream(folder: Path) -> tuple[ModelWeights, BlockStream]:
    weights = ModelWeights(folder, torch.device("cpu"))
    weights.load_outside()
    return weights, BlockStream(weights.model, weights.blocks, torch.float32)


def stream_logits(folder: Path, ids: Tensor, *, unfuse: bool = False) -> Tensor:
    weights, stream = open_stream(folder)
    hidden = None
    for index in range(len(weights.blocks.modules)):
        weights.load_block(index)
        if unfuse:
            name = f"{weights.blocks.name(index)}."
            unfuse_experts(weights.model, lambda n, name=name: n.startswith(name))
        with stream.at(index):
            hidden = stream.run(ids, hidden)
        weights.drop_block(index)
    with stream.at(len(weights.blocks.modules)):
        return stream.run(ids, hidden).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("gemma2", {}),
        ("gemma3_text", {"sliding_window_pattern": 2}),
        ("gpt_neox", {}),
        ("gpt2", {}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("bloom", {}),
        ("falcon", {}),
        ("deepseek_v3", {}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
@torch.no_grad()
def test_streamed_logits_equal_the_models(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = write_family(tmp_path, family, **changes)
    ids = torch.tensor(token_lists(2, TOKENS))
    assert torch.equal(stream_logits(tmp_path, ids), base(ids, use_cache=False).logits)


@torch.no_grad()
def test_sliding_window_matters_in_these_tests(tmp_path: Path) -> None:
    wide = write_family(tmp_path / "wide", "mistral", sliding_window=None)
    narrow = write_family(tmp_path / "narrow", "mistral")
    ids = torch.tensor(token_lists(1, TOKENS))
    difference = (wide(ids).logits - narrow(ids).logits).abs()[0].amax(-1)
    assert bool((difference[:16] < 1e-5).all())
    assert bool((difference[20:] > 1e-5).any())


@torch.no_grad()
def test_two_kinds_of_mask_reach_their_blocks(tmp_path: Path) -> None:
    base = write_family(tmp_path, "gemma3_text", sliding_window_pattern=2)
    assert {*base.config.layer_types} == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
@torch.no_grad()
def test_split_experts_compute_what_the_fused_ones_do(family: str, tmp_path: Path) -> None:
    base = write_family(tmp_path, family)
    ids = torch.tensor(token_lists(2, TOKENS))
    expected = base(ids, use_cache=False).logits
    torch.testing.assert_close(
        stream_logits(tmp_path, ids, unfuse=True), expected, rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
def test_block_out_of_order_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    weights, stream = open_stream(tmp_path)
    weights.load_block(1)
    assert stream.token_shape == (64,)
    base_forward = weights.model.model.forward
    layers = weights.model.model.layers

    def backwards(*args: Any, **kwargs: Any) -> Any:
        order = list(layers)
        try:
            layers._modules = {str(i): m for i, m in enumerate(reversed(order))}
            return base_forward(*args, **kwargs)
        finally:
            layers._modules = {str(i): m for i, m in enumerate(order)}

    weights.model.model.forward = backwards
    ids = torch.tensor(token_lists(1, 8))
    with (
        stream.at(1),
        pytest.raises(
            ModelError,
            match=r"Cannot stream model\.layers\.1: the model ran blocks \[2\] before it instead "
            r"of 0\.\.0 in order",
        ),
    ):
        stream.run(ids, torch.zeros(1, 8, 64))


@torch.no_grad()
def test_states_changed_between_blocks_are_refused(tmp_path: Path) -> None:
    # XLM runs attention and feed-forward layers of two lists in turn; only one is found.
    sizes = {"emb_dim": 64, "n_layers": 3, "n_heads": 4, "n_words": 128, "causal": True}
    write_family(tmp_path, "xlm", **sizes)
    weights, stream = open_stream(tmp_path)
    ids = torch.tensor(token_lists(1, 8))
    weights.load_block(0)
    with stream.at(0):
        stream.run(ids, None)
    with pytest.raises(
        ModelError,
        match=r"Cannot stream transformer\.attentions: the model changes the states between "
        "blocks 0 and 1, but only blocks may change them",
    ):
        stream.check_block_order(ids)


@torch.no_grad()
def test_block_that_gives_no_hidden_states_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    weights, stream = open_stream(tmp_path)
    block = weights.load_block(0)
    block.forward = lambda *args, **kwargs: {"hidden": args[0]}
    with (
        stream.at(0),
        pytest.raises(ModelError, match=r"Cannot stream model\.layers\.0: it returns dict"),
    ):
        stream.run(torch.tensor(token_lists(1, 8)), None)


@torch.no_grad()
def test_block_that_gives_several_states_per_token_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    weights, stream = open_stream(tmp_path)
    block = weights.load_block(0)
    block.forward = lambda *args, **kwargs: args[0][:, :, None].expand(-1, -1, 4, -1)
    with (
        stream.at(0),
        pytest.raises(
            ModelError,
            match=r"shape \[1, 8, 4, 64\] for tokens \[1, 8\], but the first "
            r"block gets \[1, 8, 64\]",
        ),
    ):
        stream.run(torch.tensor(token_lists(1, 8)), None)


@torch.no_grad()
def test_leaving_a_block_restores_every_forward(tmp_path: Path) -> None:
    base = write_family(tmp_path, "llama")
    weights, stream = open_stream(tmp_path)
    for index in range(3):
        weights.load_block(index)
    ids = torch.tensor(token_lists(1, 8))
    with stream.at(1):
        pass
    assert all("forward" not in block.__dict__ for block in weights.blocks.modules)
    assert torch.equal(weights.model(ids).logits, base(ids).logits)


def paused(tmp_path: Path, family: str) -> tuple[BlockStream, list[Stage], Tensor]:
    write_family(tmp_path, family)
    weights, stream = open_stream(tmp_path)
    block = weights.load_block(0)
    unfuse_experts(weights.model, lambda name: name.startswith(weights.blocks.name(0)))
    ids = torch.tensor(token_lists(4, 12))

    with stream.at(0):
        stages = find_stages(block, lambda: stream.run(ids[:1], None))
    return stream, stages, ids


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "run again"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_neox"])
@torch.no_grad()
def test_forward_passes_pause_at_every_stage_without_changing_the_result(
    family: str, keep: bool, tmp_path: Path
) -> None:
    stream, stages, ids = paused(tmp_path, family)
    with stream.at(0, stages):
        plain = [stream.run(part, None) for part in torch.split(ids, 2)]
        passes = ForwardPasses(
            stream, 2, lambda b: (torch.split(ids, 2)[b], None), keep_paused=keep
        )
        for number, stage in enumerate(stages):
            for batch in range(2):
                inputs = passes.reach(batch, number)
                assert inputs is not None
                assert len(inputs) == len(stage.groups)
                tokens = sum(get().reshape(-1, get().shape[-1]).shape[0] for get in inputs)
                routed = 2 if stage.experts else 1
                assert tokens == 2 * 12 * routed
                passes.release(batch)
        for batch in range(2):
            assert torch.equal(passes.finish(batch), plain[batch])


@torch.no_grad()
def test_weights_replaced_at_a_stage_affect_later_stages(tmp_path: Path) -> None:
    stream, stages, ids = paused(tmp_path, "llama")
    block = stream.blocks.modules[0]
    with stream.at(0, stages):
        passes = ForwardPasses(stream, 1, lambda _: (ids, None), keep_paused=True)
        for number, stage in enumerate(stages):
            assert passes.reach(0, number) is not None
            for name in stage.groups[0].linears:
                block.get_submodule(name).weight.mul_(0.5)
        found = passes.finish(0)
        assert torch.equal(found, stream.run(ids, None))


@torch.no_grad()
def test_closed_forward_passes_do_not_continue(tmp_path: Path) -> None:
    stream, stages, ids = paused(tmp_path, "llama")
    with stream.at(0, stages):
        passes = ForwardPasses(stream, 1, lambda _: (ids, None), keep_paused=True)
        assert passes.reach(0, 0) is not None
        passes.close()
        last = stream.blocks.modules[0].mlp.down_proj
        runs = []
        handle = last.register_forward_hook(lambda *_: runs.append(1))
        assert passes.reach(0, len(stages) - 1) is not None, "a new pass starts over"
        assert not runs
        handle.remove()
