"""Recorded steps under the engine, interpreted on the CPU, against Transformers' forward."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.interpreted import interpret
from tests.serve.helpers_engine import write_model

import halfbyte
from halfbyte.kernels import triton_decode
from halfbyte.nn import gpu_step
from halfbyte.nn.gpu_step import NotCapturable
from halfbyte.serve.engine import gpu_runner
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.gpu_runner import GpuRunner
from halfbyte.serve.engine.loading import choose_runner
from halfbyte.serve.engine.runner import Pages, Piece, sample_layers
from halfbyte.serve.engine.transformers_runner import TransformersRunner

pytest.importorskip("triton")

PROMPTS = ([5, 9, 14, 3, 77], [8] * 17, [40, 41])
TABLES = ([3, 0], [1, 4, 5], [2, 6])
PAGE = 8


@pytest.fixture
def load(tmp_path, monkeypatch):
    interpret(monkeypatch, "halfbyte.kernels.triton_decode_kernels")
    monkeypatch.setattr(gpu_step, "DEVICES", ("cpu",))
    monkeypatch.setattr(triton_decode, "choose_splits", lambda device, programs: 2)
    write_model(tmp_path)
    return lambda: halfbyte.load(tmp_path, dtype=torch.float16)


def begin(runner, prompts=PROMPTS):
    """Logits of some sequences' prompts and of two tokens after each."""
    runner.make_pages(8, 32)
    found = runner.run(
        [
            Piece(tokens=tokens, start=0, pages=pages, logits=1, is_prompt=True)
            for tokens, pages in zip(prompts, TABLES, strict=True)
        ]
    )
    for step, token in enumerate((11, 200)):
        found += runner.run(
            [
                Piece(
                    tokens=[token + i],
                    start=len(tokens) + step,
                    pages=pages,
                    logits=1,
                    is_prompt=False,
                )
                for i, (tokens, pages) in enumerate(zip(prompts, TABLES, strict=True))
            ]
        )
    return torch.cat(found)


def test_decode_logits_match_transformers_forward(load, monkeypatch):
    model = load()
    expected = begin(TransformersRunner(model, Pages(sample_layers(model), PAGE)))
    model = load()
    runner = GpuRunner(model, Pages(sample_layers(model), PAGE))
    assert runner.obstacle is None
    assert runner.description.startswith("recorded steps on cpu")
    plain = runner._plain._run_group

    def only_prompts(pieces):
        assert all(piece.is_prompt for piece in pieces), "an answer was not run by a step"
        return plain(pieces)

    monkeypatch.setattr(runner._plain, "_run_group", only_prompts)
    torch.testing.assert_close(begin(runner), expected, rtol=1e-2, atol=1e-2)
    # Three sequences are run as four; the row that nobody needs writes to no page of the pool.
    assert list(runner._recorded) == [4]
    assert not bool(runner.pages.keys[0][7].any())


def test_deviating_model_falls_back_to_transformers(load, monkeypatch):
    model = load()
    plain = model.model.layers[1].mlp.forward
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: plain(x) * 3)
    runner = GpuRunner(model, Pages(sample_layers(model), PAGE))
    assert "computes something else" in runner.obstacle
    assert "no recorded steps: a LlamaForCausalLM" in runner.description
    assert bool(torch.isfinite(begin(runner)).all())
    assert runner._recorded == {}


def test_gpu_runner_is_chosen_if_supported(load, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")  # none for the compiled decoder
    assert isinstance(choose_runner(load(), EngineConfig()), GpuRunner)
    plain = choose_runner(load(), EngineConfig(runner="transformers"))
    assert isinstance(plain, TransformersRunner)
    monkeypatch.setattr(gpu_runner, "find_mismatch", lambda model: "no")
    monkeypatch.setattr("halfbyte.serve.engine.loading.find_mismatch", lambda model: "no")
    assert isinstance(choose_runner(load(), EngineConfig()), TransformersRunner)


def test_steps_that_would_run_an_adapter_are_not_used(load, monkeypatch):
    """Adapters of a mixture of experts are inside the module that the step runs."""
    model = load()
    runner = GpuRunner(model, Pages(sample_layers(model), PAGE))
    runner.make_pages(8, 32)
    assert runner._step is not None
    monkeypatch.setattr(gpu_runner, "find_mismatch", lambda model: "it has adapters")
    runner._gather_weights()
    assert bool(torch.isfinite(begin(runner)).all())
    assert runner._recorded == {}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_steps_do_not_run_adapters_of_embeddings_and_head(load, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    peft.get_peft_model(load(), settings).save_pretrained(tmp_path / "adapter")
    model = load()
    runner = GpuRunner(model, Pages(sample_layers(model), PAGE))
    before = begin(runner)
    runner.load_adapter("x", str(tmp_path / "adapter"))
    piece = Piece(
        tokens=PROMPTS[0], start=0, pages=TABLES[0], logits=1, is_prompt=True, adapter="x"
    )
    assert not torch.allclose(runner.run([piece])[0], before[:1], rtol=0.1, atol=0.1)
    torch.testing.assert_close(begin(runner), before, rtol=1e-2, atol=1e-2)


def test_a_step_that_cannot_be_recorded_falls_back_to_transformers(load, monkeypatch):
    model = load()
    expected = begin(TransformersRunner(model, Pages(sample_layers(model), PAGE)))
    model = load()
    runner = GpuRunner(model, Pages(sample_layers(model), PAGE))

    def refuse(*_):
        raise NotCapturable("its forward waits for the GPU")

    monkeypatch.setattr(gpu_runner, "_RecordedStep", refuse)
    torch.testing.assert_close(begin(runner), expected, rtol=1e-2, atol=1e-2)
    assert "no recorded steps: its forward waits" in runner.description
