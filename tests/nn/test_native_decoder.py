"""The compiled decoder against the model's forward, token by token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.helpers.checkpoints import TINY_SIZES, Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.native import NEEDS_LIBRARY
from transformers import (
    Ministral3Config,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.machine.memory import resident_memory_bytes
from halfbyte.nn import native_decoder
from halfbyte.nn.native_decoder import NativeDecoder, find_obstacle

pytestmark = NEEDS_LIBRARY
EXPERTS = {**TINY_SIZES, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
CONFIGS = {
    "llama": (tiny_llama_config(), Recipe()),
    "act-order": (tiny_llama_config(), Recipe(act_order=True, symmetric=False)),
    "8 bits": (tiny_llama_config(), Recipe(bits=8)),
    "biases": (Qwen2Config(**TINY_SIZES), Recipe(symmetric=False)),
    "norms of heads": (Qwen3Config(**TINY_SIZES, head_dim=32), Recipe()),
    "all heads": (tiny_llama_config(num_key_value_heads=4), Recipe()),
    "experts": (Qwen3MoeConfig(**EXPERTS, head_dim=32, norm_topk_prob=True), Recipe()),
    "experts by all shares": (
        Qwen3MoeConfig(**EXPERTS, head_dim=32, norm_topk_prob=False),
        Recipe(act_order=True, symmetric=False),
    ),
    "every other block with experts": (
        Qwen3MoeConfig(**EXPERTS, head_dim=32, decoder_sparse_step=2),
        Recipe(),
    ),
    "mixtral": (
        MixtralConfig(**TINY_SIZES, num_local_experts=4, num_experts_per_tok=2),
        Recipe(bits=3),
    ),
}


def load(folder, name, dtype=torch.float32):
    config, recipe = CONFIGS[name]
    write_checkpoint(folder, config, recipe)
    return halfbyte.load(folder, dtype=dtype)


def run_both(model, *, prompt=3, length=40):
    """Hidden states of the model's forward, and of the steps after its prompt."""
    tokens = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model.model(tokens[None], use_cache=False).last_hidden_state[0]
        decoder = NativeDecoder(model, length)
        decoder.prefill(tokens[:prompt].tolist())
        found = [decoder.step(int(tokens[i]), i) for i in range(prompt, length)]
    return torch.stack(found), expected[prompt:].float()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_each_token_gets_the_hidden_state_of_the_models_own_forward(tmp_path, name, isa):
    model = load(tmp_path, name)
    assert find_obstacle(model) is None
    found, expected = run_both(model)
    # Two orders of fp32 sums, three layers deep; random codes of 8 bits make weights 16 times as
    # large as those of 4, and scores that sharpen the difference.
    torch.testing.assert_close(found, expected, rtol=5e-4, atol=5e-4)


def test_bfloat16_deviates_by_its_rounding_only(tmp_path, isa):
    model = load(tmp_path, "llama", torch.bfloat16)
    assert find_obstacle(model) is None
    found, expected = run_both(model)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def prompt_deviations(folder, model, length):
    """Relative deviation of each row, so that a wrong key among hundreds counts."""
    tokens = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        found = NativeDecoder(model, length).prefill(tokens.tolist())
        exact = halfbyte.load(folder, dtype=torch.float32)
        expected = exact.model(tokens[None], use_cache=False).last_hidden_state[0]
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("name", ["llama", "all heads", "norms of heads"])
def test_a_long_prompt_is_read_as_by_the_models_own_forward(tmp_path, name, isa):
    model = load(tmp_path, name, torch.bfloat16)
    # More rows than go through the blocks at a time, and several blocks of keys.
    assert float(prompt_deviations(tmp_path, model, 700).max()) < 0.04


@pytest.mark.parametrize("name", ["experts", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_takes_the_models_own_experts(tmp_path, name, dtype, isa):
    model = load(tmp_path, name, dtype)
    assert find_obstacle(model) is None
    # More rows than go through the blocks at a time, some of them to one expert only.
    deviations = prompt_deviations(tmp_path, model, 300)
    if dtype == torch.float32:
        assert float(deviations.max()) < 5e-4
    else:  # whose rounding sends some tokens to other experts
        assert float(deviations.median()) < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_gets_the_same_bits_in_pieces_over_pages(tmp_path, dtype, isa):
    model = load(tmp_path, "llama", dtype)
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (400, 150)]
    config = model.config

    def run(page_tokens, cuts, together):
        pages = 2 * -(-400 // page_tokens)
        shape = (pages, config.num_key_value_heads, page_tokens, config.head_dim)
        layers = range(config.num_hidden_layers)
        cache = [[torch.full(shape, torch.nan, dtype=dtype) for _ in layers] for _ in "kv"]
        decoder = NativeDecoder(model, 400, tuple(cache))
        with torch.inference_mode():
            return run_paged(
                decoder,
                sequences,
                cuts,
                page_tokens=page_tokens,
                together=together,
                prompt=True,
            )

    whole = run(400, [400], True)
    for page_tokens, cuts in ((32, [400]), (16, [200, 129, 71]), (48, [7, 150, 243])):
        for mine, expected in zip(run(page_tokens, cuts, True), whole, strict=True):
            assert torch.equal(mine, expected)


def test_long_rotary_tables_and_scaled_rotations_are_the_models_own(tmp_path):
    config = tiny_llama_config(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    )
    write_checkpoint(tmp_path, config)
    found, expected = run_both(halfbyte.load(tmp_path, dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dense_models_and_other_kernels_are_left_to_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    model = load(tmp_path, "llama")
    assert find_obstacle(model) == "q_proj does not run on cpu_native"


def test_sliding_windows_are_left_to_transformers(tmp_path):
    model = load(tmp_path, "llama")
    model.config.sliding_window = 16
    assert find_obstacle(model) == "it uses sliding-window attention over 16 tokens"


def test_a_model_of_the_same_structure_that_computes_differently_is_rejected(tmp_path):
    model = load(tmp_path, "llama")
    # As in Granite: a factor on what each block adds, in no tensor and no name.
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, _inputs, output: output * 0.5)
    reason = find_obstacle(model)
    assert reason.startswith("a LlamaForCausalLM computes differently: hidden states have a relat")
    assert f"allowed are {native_decoder.MAX_DEVIATION}" in reason


ORIGINAL = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
ROTATIONS = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        **ORIGINAL,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
}


@pytest.mark.parametrize("name", list(ROTATIONS))
def test_angles_that_depend_on_the_length_are_left_to_transformers(tmp_path, name):
    config = tiny_llama_config(rope_parameters=ROTATIONS[name], max_position_embeddings=256)
    write_checkpoint(tmp_path, config)
    model = halfbyte.load(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        before = model.model.rotary_emb(torch.empty(0), torch.arange(9)[None])[0]
        reason = find_obstacle(model)
        after = model.model.rotary_emb(torch.empty(0), torch.arange(9)[None])[0]
    assert reason == f"its rotary angles depend on a text's length (rope_type {name})"
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_angles_that_are_stretched_alike_for_all_lengths_are_taken(tmp_path, kind):
    rope = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny_llama_config(rope_parameters=rope | ORIGINAL, max_position_embeddings=256)
    write_checkpoint(tmp_path, config)
    assert find_obstacle(halfbyte.load(tmp_path, dtype=torch.bfloat16)) is None


def test_queries_scaled_by_position_are_left_to_transformers(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, "llama_4_scaling_beta": 0.1}
    config = Ministral3Config(**TINY_SIZES, head_dim=16, sliding_window=None, rope_parameters=rope)
    write_checkpoint(tmp_path, config)
    model = halfbyte.load(tmp_path, dtype=torch.bfloat16)
    assert find_obstacle(model) == "it scales queries by their position (llama_4_scaling_beta)"


@pytest.mark.parametrize("start", [64, 248])
def test_a_model_that_computes_differently_at_late_positions_is_rejected(tmp_path, start):
    rope = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
    config = tiny_llama_config(rope_parameters=rope, max_position_embeddings=256)
    write_checkpoint(tmp_path, config)
    model = halfbyte.load(tmp_path, dtype=torch.bfloat16)

    def change(_module, inputs, given):
        late = given["position_ids"][..., None] >= start
        return (torch.where(late, inputs[0].flip(-1), inputs[0]),), given

    model.model.layers[1].register_forward_pre_hook(change, with_kwargs=True)
    reason = find_obstacle(model)
    found = f"a LlamaForCausalLM computes differently from position {start} on: hidden states"
    assert reason.startswith(found)


def test_experts_of_other_kinds_are_left_to_transformers(tmp_path):
    sizes = {**EXPERTS, "shared_expert_intermediate_size": 64}
    CONFIGS["shared"] = (Qwen2MoeConfig(**sizes), Recipe(skip=r"lm_head|gate$"))
    assert find_obstacle(load(tmp_path, "shared")) == (
        "a block has shared_expert beside its experts"
    )
    model = load(tmp_path / "router", "experts")
    router = model.model.layers[1].mlp.gate
    router.register_buffer("correction", torch.zeros(6))
    assert find_obstacle(model) == (
        "the router of its experts has weight, correction, not just a weight"
    )


def test_experts_without_a_router_are_refused(tmp_path):
    decoder = NativeDecoder(load(tmp_path, "experts"), 8)
    decoder._blocks[1].router = None
    with pytest.raises(ConfigError, match="does not support these sizes or types"):
        decoder.step(3, 0)


def test_missing_parts_are_named(tmp_path):
    model = load(tmp_path, "llama")
    del model.model.layers[1].post_attention_layernorm
    assert find_obstacle(model) == "a block (LlamaDecoderLayer) has no post_attention_layernorm"


def run_paged(decoder, sequences, cuts, *, page_tokens, together, prompt):
    """Hidden states of sequences that are run in pieces over pages of their own."""
    pages = -(-max(map(len, sequences)) // page_tokens)
    count = len(sequences)
    tables = [list(range(i, pages * count, count)) for i in range(count)]
    found = [[] for _ in sequences]
    done = [0] * len(sequences)
    for size in cuts:
        batch = [
            (i, place)
            for i, tokens in enumerate(sequences)
            for place in range(done[i], min(done[i] + size, len(tokens)))
        ]
        done = [done[i] + size for i in range(len(sequences))]
        groups = [batch] if together else [[row] for row in batch]
        for group in groups:
            if not group:
                continue
            states = decoder.run(
                [sequences[i][place] for i, place in group],
                [place for _, place in group],
                [page for table in tables for page in table],
                [i * pages for i, _ in group],
                prompt=prompt,
            )
            for (i, _), state in zip(group, states, strict=True):
                found[i].append(state)
    return [torch.stack(states) for states in found]


@pytest.mark.parametrize("name", ["llama", "act-order", "8 bits", "norms of heads", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [False, True])
def test_a_row_does_not_depend_on_its_neighbours_pieces_or_pages(
    tmp_path, name, dtype, prompt, isa
):
    model = load(tmp_path, name, dtype)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (40, 9, 23)]
    config = model.config

    def make(page_tokens):
        shape = (30, config.num_key_value_heads, page_tokens, config.head_dim)
        layers = range(config.num_hidden_layers)
        # What no row has written must not be read.
        cache = [[torch.full(shape, torch.nan, dtype=dtype) for _ in layers] for _ in "kv"]
        return NativeDecoder(model, 48, tuple(cache))

    with torch.inference_mode():
        one = run_paged(make(48), sequences, [40], page_tokens=48, together=False, prompt=prompt)
        for cuts in ([40], [1] * 40, [13, 2, 1, 1, 7, 8, 8]):
            for page_tokens in (16, 32):
                found = run_paged(
                    make(page_tokens),
                    sequences,
                    cuts,
                    page_tokens=page_tokens,
                    together=True,
                    prompt=prompt,
                )
                for mine, expected in zip(found, one, strict=True):
                    assert torch.equal(mine, expected)
        if dtype == torch.float32:
            ids = torch.tensor([sequences[0]])
            expected = model.model(ids, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(one[0], expected, rtol=5e-4, atol=5e-4)


def test_an_empty_cache_takes_no_memory(tmp_path):
    model = load(tmp_path, "llama")
    before = resident_memory_bytes()
    decoder = NativeDecoder(model, 2**18)
    cache = sum(part.nbytes for part in (*decoder.keys, *decoder.values))
    assert cache == 2**27
    # There are 2**25 bytes of angles.
    assert resident_memory_bytes() - before < cache / 2


@pytest.mark.parametrize("prompt", [False, True])
def test_no_tokens_give_no_states_where_nothing_ran_before(tmp_path, prompt, isa):
    decoder = NativeDecoder(load(tmp_path, "llama", torch.bfloat16), 4)
    with torch.inference_mode(), ThreadPoolExecutor(1) as fresh:
        states = fresh.submit(decoder.run, [], [], [0], [], prompt=prompt).result()
    assert states.shape == (0, 64)


def test_pages_that_the_cache_does_not_have_are_refused(tmp_path):
    decoder = NativeDecoder(load(tmp_path, "llama"), 8)
    with torch.inference_mode(), pytest.raises(ConfigError, match="at position 0 of 8"):
        decoder.run([5], [0], [1], [0])


def test_pages_of_another_size_are_refused(tmp_path):
    model = load(tmp_path, "llama")
    shape = (3, 2, 3, 16)
    cache = [[torch.zeros(shape) for _ in range(2)] for _ in "kv"]
    decoder = NativeDecoder(model, 9, tuple(cache))
    with torch.inference_mode(), pytest.raises(ConfigError, match="at position 3 of 9"):
        decoder.run([5] * 4, [0, 1, 2, 3], [0, 1, 2], [0] * 4)


def test_positions_beyond_the_cache_are_refused(tmp_path):
    decoder = NativeDecoder(load(tmp_path, "llama"), 4)
    with torch.inference_mode(), pytest.raises(ConfigError, match="at position 4 of 4"):
        decoder.step(5, 4)


def test_not_a_number_reaches_the_result(tmp_path, isa):
    model = load(tmp_path, "llama")
    with torch.inference_mode():
        decoder = NativeDecoder(model, 4)
        model.get_input_embeddings().weight[9] = float("nan")
        decoder.step(5, 0)
        assert not torch.isfinite(decoder.step(9, 1)).any()
