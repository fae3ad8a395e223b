"""Runs every part of halfbyte that computes on a GPU, on a real GPU.

Left out unless asked for: ``pytest -m gpu``. Kernels are measured and checked in every
configuration by ``bench/gpu_session.sh``; this is what stands between them and a user.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from tests.helpers.checkpoints import Recipe, read_tensors, tiny_llama_config, write_checkpoint
from tests.helpers.families import token_lists
from transformers import Qwen3Config, Qwen3MoeConfig

import halfbyte
from halfbyte.integrations.generation import Generator, Sampling
from halfbyte.kernels import cuda_linear
from halfbyte.nn.linear import QuantLinear
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 256,
    "initializer_range": 0.2,
}
LLAMA = partial(tiny_llama_config, **SIZES)
PROMPT = [1, 17, 40, 99, 3]


def deviation(found, expected):
    return float((found.float().cpu() - expected.float().cpu()).norm() / expected.float().norm())


@pytest.mark.parametrize("kernel", ["cuda", "triton", "torch_reference"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(group_size=64),
        Recipe(symmetric=False, act_order=True),
        Recipe(bits=8, group_size=64, size=1 / 16),
    ],
    ids=str,
)
def test_a_checkpoint_computes_the_same_and_is_saved_the_same(
    tmp_path, monkeypatch, kernel, recipe
):
    monkeypatch.setenv("HALFBYTE_KERNEL", kernel)
    expected_model = write_checkpoint(tmp_path / "in", LLAMA(), recipe)
    model = halfbyte.load(tmp_path / "in", device="cuda")
    chosen = {m.selection.kernel.name for m in model.modules() if isinstance(m, QuantLinear)}
    assert chosen == {kernel}
    for count in (1, 5, 40, 200):
        ids = torch.randint(3, 200, (1, count))
        with torch.inference_mode():
            found, expected = model(ids.cuda()).logits[0], expected_model(ids).logits[0]
        assert deviation(found, expected) < 0.02
    model.save_pretrained(tmp_path / "out")
    before, after = read_tensors(tmp_path / "in"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    "config",
    [LLAMA(), Qwen3Config(**{**LLAMA().to_dict(), **SIZES, "head_dim": 64})],
    ids=lambda config: config.model_type,
)
def test_recorded_steps_write_what_transformers_writes(tmp_path, config):
    write_checkpoint(tmp_path, config, Recipe(group_size=64))
    model = halfbyte.load(tmp_path, device="cuda")
    generator = Generator(model)
    generator.ends = frozenset()
    found = list(generator.stream(PROMPT, Sampling(max_new_tokens=60)))
    assert generator.describe_decoding() == "one CUDA graph per token"
    # Logits are held to each other along the text that was found: where two tokens are nearly as
    # likely, rounding may choose.
    ids = torch.tensor([PROMPT + found], device="cuda")
    with torch.inference_mode():
        logits = model(ids).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(PROMPT) :, None])[:, 0]
    assert bool((logits.amax(1) - chosen <= 0.02 * logits.std()).all())
    again = list(generator.stream(PROMPT, Sampling(max_new_tokens=60)))
    drawn = list(generator.stream(PROMPT, Sampling(max_new_tokens=60, temperature=1.0, seed=1)))
    assert again == found
    assert drawn != found


@pytest.mark.parametrize(
    "recipe",
    [Recipe(group_size=64), Recipe(symmetric=False, act_order=True), Recipe(bits=3, group_size=64)],
    ids=str,
)
def test_experts_run_together(tmp_path, recipe):
    sizes = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
    config = Qwen3MoeConfig(**{**LLAMA().to_dict(), **SIZES, **sizes, "head_dim": 64})
    write_checkpoint(tmp_path, config, recipe)
    model = halfbyte.load(tmp_path, device="cuda")
    experts = model.model.layers[1].mlp.experts
    for tokens in (1, 3, 16, 70, 400):
        x = torch.randn(tokens, 256, dtype=model.dtype, device="cuda")
        weights, ids = torch.rand(tokens, 16, device="cuda").topk(4)
        given = (x, ids, weights.to(model.dtype))
        with torch.inference_mode():
            found = experts.grouped(*given)
            grouped, experts.grouped = experts.grouped, None
            expected = experts(*given)
            experts.grouped = grouped
        assert deviation(found, expected) < 0.02
    generator = Generator(model)
    generator.ends = frozenset()
    first, second = (list(generator.stream(PROMPT, Sampling(max_new_tokens=60))) for _ in range(2))
    assert generator.describe_decoding() == "one CUDA graph per token"
    assert first == second


def test_a_step_that_waits_is_not_recorded(tmp_path):
    from tests.helpers.families import write_family

    write_family(tmp_path, "opt", num_hidden_layers=1)
    generator = Generator(halfbyte.load(tmp_path, device="cuda"))
    generator.ends = frozenset()
    assert len(list(generator.stream(PROMPT, Sampling(max_new_tokens=8)))) == 8
    assert "the CPU waits for results of the GPU" in generator.describe_decoding()


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_thread_computes_on_the_gpu_of_its_tensors(tmp_path, monkeypatch, index, kernel):
    # Its own current GPU is the first one, and nothing of CUDA was called in it yet.
    if index >= torch.cuda.device_count():
        pytest.skip("there is one GPU only")
    monkeypatch.setenv("HALFBYTE_KERNEL", kernel)
    write_checkpoint(tmp_path, LLAMA(), Recipe(group_size=64))
    model = halfbyte.load(tmp_path, device=f"cuda:{index}")
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    x = torch.randn(3, layer.in_features, dtype=layer.spec.dtype, device=f"cuda:{index}")
    expected = x @ layer.dequantize().t()
    torch.cuda.synchronize(index)
    with torch.inference_mode(), ThreadPoolExecutor(1) as pool:
        assert deviation(pool.submit(layer, x).result(), expected) < 0.02
        found = pool.submit(write_text, model).result()
    assert found == write_text(model)


def write_text(model):
    generator = Generator(model)
    generator.ends = frozenset()
    return list(generator.stream(PROMPT, Sampling(max_new_tokens=20)))


@pytest.mark.parametrize("sequences", [1, 3, 9])
def test_the_engine_serves_several_at_once(tmp_path, sequences):
    from halfbyte.serve.engine.gpu_runner import GpuRunner
    from halfbyte.serve.engine.runner import Pages, Piece, sample_layers

    write_checkpoint(tmp_path, LLAMA(), Recipe(group_size=64))
    model = halfbyte.load(tmp_path, device="cuda")
    texts = token_lists(sequences, 40)
    with torch.inference_mode():
        expected = [model(torch.tensor([ids], device="cuda")).logits[0] for ids in texts]
    runner = GpuRunner(model, Pages(sample_layers(model), 16))
    assert runner.description.startswith("recorded steps on cuda")
    runner.make_pages(3 * sequences, 256)
    tables = [list(range(3 * i, 3 * i + 3)) for i in range(sequences)]
    for first, last in ((0, 30), *((n, n + 1) for n in range(30, 40))):
        pieces = [
            Piece(tokens=ids[first:last], start=first, pages=table, logits=1, is_prompt=last == 30)
            for ids, table in zip(texts, tables, strict=True)
        ]
        for found, wanted in zip(runner.run(pieces), expected, strict=True):
            assert deviation(found[0], wanted[last - 1]) < 0.02


def test_bulk_copies_compute_the_same_when_a_table_chooses_them(tmp_path, monkeypatch):
    from halfbyte.kernels import cuda_stream
    from halfbyte.kernels.gpu_table import GpuTable

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    expected_model = write_checkpoint(tmp_path, LLAMA(), Recipe(group_size=64))
    model = halfbyte.load(tmp_path, device="cuda")
    shapes = {
        (m.in_features, m.out_features) for m in model.modules() if isinstance(m, QuantLinear)
    }
    config = {"row_tiles": 1, "tiles": 2, "warps_out": 1, "warps_in": 2, "stages": 3}
    fused = {(inputs, outputs * parts) for inputs, outputs in shapes for parts in (1, 2)}
    table = GpuTable(stream={(shape, 8): config for shape in fused})
    monkeypatch.setattr(cuda_stream, "load_table", lambda architecture: table)
    multiply, called = cuda_stream.multiply, []
    monkeypatch.setattr(
        cuda_stream, "multiply", lambda *args: called.append(args) or multiply(*args)
    )
    cuda_linear.choose_tier.cache_clear()
    try:
        ids = torch.randint(3, 200, (1, 5))
        with torch.inference_mode():
            found, expected = model(ids.cuda()).logits[0], expected_model(ids).logits[0]
    finally:
        cuda_linear.choose_tier.cache_clear()
    assert len(called) >= 4
    assert deviation(found, expected) < 0.02


def test_a_turned_model_is_the_one_that_the_cpu_turns(tmp_path):
    from tests.helpers.families import build_random

    build_random(LLAMA(), std=0.05).save_pretrained(tmp_path / "base")
    for device in ("cpu", "cuda"):
        halfbyte.rotate(tmp_path / "base", tmp_path / device, device=device)
    expected = read_tensors(tmp_path / "cpu")
    found = read_tensors(tmp_path / "cuda")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert deviation(found[name], tensor) < 0.005, name


def test_gradients_are_those_of_the_dequantized_weight(tmp_path):
    write_checkpoint(tmp_path, LLAMA(), Recipe(group_size=64))
    model = halfbyte.load(tmp_path, device="cuda")
    linear = model.model.layers[0].mlp.down_proj
    x = torch.randn(70, linear.in_features, device="cuda", dtype=torch.float16, requires_grad=True)
    direction = torch.randn(70, linear.out_features, device="cuda", dtype=torch.float16)
    linear(x).backward(direction)
    expected = direction.double() @ linear.dequantize(torch.float64)
    assert deviation(x.grad, expected) < 0.002


def test_a_run_that_fills_the_gpu_goes_on_with_less(tmp_path):
    from tests.helpers.families import build_random

    build_random(LLAMA(), std=0.05).save_pretrained(tmp_path / "base")
    free, _ = torch.cuda.mem_get_info()
    others = torch.empty(free - 700_000_000, dtype=torch.uint8, device="cuda")
    try:
        # 131,072 tokens at a time take some 1.6 GB of activations.
        report = halfbyte.quantize(
            tmp_path / "base",
            tmp_path / "out",
            config=QuantConfig(group_size=64),
            calibration=CalibrationConfig(samples=512, length=256, batch_size=512),
            text=token_lists(512, 256),
            resources=ResourceConfig(device="cuda", dtype="float32", memory="64GB"),
            quality=False,
        )
    finally:
        del others
        torch.cuda.empty_cache()
    told = [note for note in report.notes if "out of memory" in note]
    assert any("sequences per batch" in note for note in told), report.notes


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_quantizing_is_as_good_as_on_the_cpu(tmp_path, preset):
    from tests.helpers.families import build_random

    build_random(LLAMA(), std=0.05).save_pretrained(tmp_path / "base")
    config = QuantConfig.from_preset(preset, group_size=64)
    calibration = CalibrationConfig(samples=24, length=64, batch_size=8)
    first, second = (
        halfbyte.quantize(
            tmp_path / "base",
            tmp_path / device,
            config=config,
            calibration=calibration,
            text=token_lists(24, 64),
            resources=ResourceConfig(device=device, dtype="float32"),
        )
        for device in ("cpu", "cuda")
    )
    # Inputs are multiplied in bfloat16 there: codes differ where errors are nearly balanced, the
    # sum of errors does not.
    for a, b in zip(first.modules, second.modules, strict=True):
        assert a.name == b.name
        assert b.relative_error == pytest.approx(a.relative_error, rel=0.05), a.name
