from __future__ import annotations

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.adapters import load, write_adapter
from tests.helpers.checkpoints import Recipe, build_model, tiny_llama_config, write_checkpoint
from transformers import GPT2Config
from transformers.pytorch_utils import Conv1D

import halfbyte
from halfbyte.errors import ConfigError, VerificationError
from halfbyte.finetune import merge as merging
from halfbyte.finetune.config import TrainConfig
from halfbyte.finetune.merge import merge, merge_layers
from halfbyte.finetune.merge_check import MergeReport, TaskScore, log_probs, mean_kl
from halfbyte.finetune.train import finetune

VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

GPT2 = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
IDS = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_base_plus_adapter_rounded_once(base, tmp_path, variant):
    adapter = write_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    # In float64: what each adapted layer does to the unit vectors is its weight.
    exact = peft.PeftModel.from_pretrained(load(base, torch.float64), adapter).double().eval()
    weights = {
        name.removeprefix("base_model.model."): module(
            torch.eye(module.in_features, dtype=torch.float64)
        ).t()
        for name, module in exact.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert len(weights) == 4
    merged = merge_layers(
        peft.PeftModel.from_pretrained(load(base, torch.bfloat16), adapter), torch.bfloat16
    )
    for name, weight in weights.items():
        found = merged.get_submodule(name)
        assert type(found) is torch.nn.Linear
        assert found.weight.dtype == torch.bfloat16
        # One rounding to 8 bits, after float32 sums.
        error = (found.weight.double() - weight).abs()
        assert (error <= 2**-8 * weight.abs() + 1e-6).all()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("quantized", [True, False])
def test_written_gpt2_has_its_weights_in_the_order_of_its_class(quantized, tmp_path):
    base = tmp_path / "base"
    if quantized:
        write_checkpoint(base, GPT2, Recipe(dtype=torch.bfloat16))
    else:
        build_model(GPT2).bfloat16().save_pretrained(base)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"])
    merge(base, adapter, tmp_path / "out", device="cpu")
    expected = peft.PeftModel.from_pretrained(load(base, torch.float32), adapter)
    found = load(tmp_path / "out", torch.float32)
    assert type(found.transformer.h[0].mlp.c_fc) is Conv1D
    want, have, without = (
        model(IDS).logits.log_softmax(-1) for model in (expected, found, load(base, torch.float32))
    )
    assert (have - want).norm() < 0.02 * (without - want).norm()


def test_merge_that_loads_as_something_else_is_refused(base, tmp_path, monkeypatch, data):
    adapter = write_adapter(base, tmp_path / "adapter")

    def merge_and_save_wrongly(adapted, dtype):
        merged = merge_layers(adapted, dtype)
        save = merged.save_pretrained

        def save_wrongly(folder):
            merged.lm_head.weight.data.mul_(-50)
            save(folder)

        merged.save_pretrained = save_wrongly
        return merged

    monkeypatch.setattr(merging, "merge_layers", merge_and_save_wrongly)
    with pytest.raises(
        VerificationError, match=r"out does not compute what .*: loaded again, it is \d.* allowed"
    ):
        merge(base, adapter, tmp_path / "out", data=data, device="cpu")


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_written_model_is_plain_and_computes_base_plus_adapter(base, tmp_path, variant, data):
    adapter = write_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    report = merge(base, adapter, tmp_path / "out", data=data, device="cpu")
    assert report.kl_to_adapted < 0.01 * report.kl_without
    assert set(report.scores) == {"adapted", "merged"}
    assert report.scores["merged"].loss == pytest.approx(report.scores["adapted"].loss, abs=0.05)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    # Readable by whoever may read the folder, not by the owner only.
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    merged = load(tmp_path / "out", torch.float32)
    adapted = peft.PeftModel.from_pretrained(load(base, torch.float32), adapter).eval()
    plain = load(base, torch.float32)(IDS).logits
    difference = (merged(IDS).logits - adapted(IDS).logits).norm()
    assert difference < 0.05 * (plain - adapted(IDS).logits).norm()


def test_merges_into_the_original(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    original = load(base, torch.bfloat16)
    original.dequantize()
    original.model.layers[0].self_attn.q_proj.weight.data.add_(0.5)
    original.save_pretrained(tmp_path / "original")
    merge(base, adapter, tmp_path / "out", original=tmp_path / "original", device="cpu")
    merge(base, adapter, tmp_path / "other", device="cpu")
    name = "model.layers.0.self_attn.q_proj"
    shift = (
        load(tmp_path / "out", torch.float32).get_submodule(name).weight
        - load(tmp_path / "other", torch.float32).get_submodule(name).weight
    )
    torch.testing.assert_close(shift, torch.full_like(shift, 0.5), rtol=0, atol=0.01)


def test_merge_that_loses_the_adapter_is_refused(base, tmp_path, monkeypatch, data):
    adapter = write_adapter(base, tmp_path / "adapter", size=1.0)
    merge_layers = merging.merge_layers

    def lose(adapted, dtype):
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return merge_layers(adapted, dtype)

    monkeypatch.setattr(merging, "merge_layers", lose)
    with pytest.raises(VerificationError, match=r"lost it: the merged model is \d"):
        merge(base, adapter, tmp_path / "out", data=data, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_weak_adapter_that_a_layer_loses_is_noticed(base, tmp_path, monkeypatch, variant):
    adapter = write_adapter(base, tmp_path / "adapter", size=1e-4, **VARIANTS[variant])
    merge_layers(peft.PeftModel.from_pretrained(load(base, torch.bfloat16), adapter), torch.float16)
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda *_args, **_keywords: None)
    with pytest.raises(VerificationError, match=r"linear of \(128, 128\) lost it: the output is"):
        merge(base, adapter, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_computing_in_float32_changes_no_weight(base):
    model = load(base, torch.bfloat16)
    model.dequantize()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = list(IDS)
    found = log_probs(model, probe)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])
    torch.testing.assert_close(found, log_probs(model.float(), probe), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of tied weights
def test_head_is_untied_if_only_the_embeddings_have_an_adapter(tmp_path):
    folder = tmp_path / "base"
    config = tiny_llama_config(vocab_size=64, hidden_size=128, tie_word_embeddings=True)
    write_checkpoint(folder, config, Recipe(dtype=torch.bfloat16))
    adapter = write_adapter(folder, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    model = peft.PeftModel.from_pretrained(load(folder, torch.float32), adapter)
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name:
            parameter.normal_()
    model.save_pretrained(adapter)
    report = merge(folder, adapter, tmp_path / "out", device="cpu")
    expected = log_probs(model.eval(), list(IDS))
    assert mean_kl(expected, log_probs(load(folder, torch.float32), list(IDS))) > 0.02
    assert mean_kl(expected, log_probs(load(tmp_path / "out", torch.float32), list(IDS))) < 1e-4
    assert report.kl_to_adapted < 1e-4


def test_output_in_use_is_refused(base, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merge(base, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"/out is inside the model's own folder"):
        merge(base, tmp_path, base / "out")


def test_folder_that_is_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"There is no adapter in .*: no adapter_config\.json in"):
        merge(base, tmp_path, tmp_path / "out", device="cpu")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match=r"(?s)Cannot put the adapter .* on .*[^.]\. Give the"):
        merge(base, tmp_path, tmp_path / "out", device="cpu")


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_bias": True}, r"with biases \(lora_bias\): the model's linears have none"),
        ({"layer_replication": [(0, 1), (0, 2)]}, r"it repeats layers .*\(layer_replication\)\."),
    ],
)
def test_adapter_that_needs_another_architecture_is_refused(base, tmp_path, settings, reason):
    adapter = write_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ConfigError, match=reason):
        merge(base, adapter, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_adapter_whose_weights_have_other_names_is_refused(base, tmp_path, data):
    adapter = write_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    renamed = {name.replace("layers", "blocks"): v for name, v in load_file(file).items()}
    save_file(renamed, file)
    reason, config = r"its file has no .*layers\.0.*lora_A.*weight\.", TrainConfig(length=32)
    with pytest.raises(ConfigError, match=reason):
        merge(base, adapter, tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match=reason):
        finetune(base, tmp_path / "out", data=data, config=config, start_from=adapter)
    assert not (tmp_path / "out" / "config.json").exists()


def test_peft_refuses_to_merge_packed_codes(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(halfbyte.load(base), adapter)
    with pytest.raises(ValueError, match="gptq quantized"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        # Loss, share of examples right, share of tokens right.
        ((0.1, 0.90, 0.97), (0.12, 0.89, 0.965), "Keeps the task: 90.0% of the examples right bef"),
        ((0.1, 0.90, 0.97), (0.15, 0.85, 0.96), "Loses part of the task: 90.0% of the examples"),
        (
            (4.3, 0.0, 0.30),
            (6.9, 0.0, 0.10),
            "Loses .* tokens 30.0% and 10.0%, at a loss of 4.3000",
        ),
        ((4.3, 0.0, 0.02), (6.9, 0.0, 0.01), "Loses part of the task: 0.0%"),
        ((4.3, 0.0, 0.02), (torch.nan, 0.0, 0.01), "Loses part of the task: 0.0%"),
        (
            (2.1, 0.0, 0.45),
            (2.2, 0.0, 0.44),
            "Cannot tell whether it keeps the task, .* too few",
        ),
    ],
)
def test_verdict_looks_at_examples_tokens_and_loss(before, after, verdict):
    names = ("loss", "right", "right_tokens")
    report = MergeReport(
        base="", adapter="", output="", kl_to_adapted=0.0, kl_without=1.0, quantized=False,
        scores={
            "adapted": TaskScore(**dict(zip(names, before, strict=True))),
            "merged": TaskScore(**dict(zip(names, after, strict=True))),
        },
    )  # fmt: skip
    assert re.match(verdict, report.verdict), report.verdict
