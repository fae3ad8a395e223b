"""Adapters constant over groups: they stay so, merge exactly, and are plain LoRA to others."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.tiny_llama import build_tokenizer
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.checkpoint.check import check_consumers
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.convert.run import ConversionConfig, convert
from halfbyte.errors import ConfigError, VerificationError
from halfbyte.finetune import exact_merge
from halfbyte.finetune.config import AdapterConfig, TrainConfig
from halfbyte.finetune.exact_merge import merge_exactly
from halfbyte.finetune.merge import merge
from halfbyte.finetune.train import finetune
from halfbyte.nn.native_decoder import find_obstacle
from halfbyte.nn.replace import quantized_linears

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(0))
RECIPES = {
    "symmetric": Recipe(),
    "act-order": Recipe(symmetric=False, act_order=True),
    "ragged": Recipe(group_size=64, labels={"dynamic": {}}),
}
TRAIN = TrainConfig(
    epochs=2, batch_size=8, learning_rate=2e-2, length=32, device="cpu", dtype="float32"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 3}"} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, tmp_path_factory, data):
    """A base, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("exact")
    config = tiny_llama_config(vocab_size=64)
    write_checkpoint(folder / "base", config, RECIPES[request.param])
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder / "base")
    finetune(
        folder / "base",
        folder / "adapter",
        data=data,
        adapter=AdapterConfig(rank=4, alpha=8.0, variant="qalora"),
        config=TRAIN,
    )
    return folder / "base", folder / "adapter"


def load(folder, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_trained_adapter_is_an_ordinary_one_that_is_constant_over_groups(trained):
    base, adapter = trained
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config["use_qalora"], "to other programs it is a plain LoRA"
    checkpoint = open_checkpoint(base)
    changed = 0
    for name in checkpoint.linears:
        g_idx = checkpoint.load_linear(name).g_idx
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        for group in range(int(g_idx.max()) + 1):
            columns = a[:, g_idx == group]
            assert torch.equal(columns, columns[:, :1].expand_as(columns)), name
        assert a.unique(dim=1).shape[1] == int(g_idx.max()) + 1, "groups differ"
        changed += int(tensors[f"base_model.model.{name}.lora_B.weight"].any())
    assert changed == len(checkpoint.linears), "it was trained"


@torch.no_grad()
def test_logits_are_those_of_base_plus_adapter(trained, tmp_path, data):
    base, adapter = trained
    report = merge_exactly(base, adapter, tmp_path / "out", data=data, device="cpu")
    assert report.kl_to_adapted < 1e-6 < 1e-3 < report.kl_without
    assert report.scores["merged"].right == report.scores["adapted"].right
    adapted = peft.PeftModel.from_pretrained(load(base), adapter).double().eval()
    merged = load(tmp_path / "out")
    expected, found, plain = (model(IDS).logits for model in (adapted, merged, load(base)))
    # Offsets are stored in float32; all else is computed in float64.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    after.verify()
    for name in before.linears:
        one, two = before.load_linear(name), after.load_linear(name)
        for tensor in ("qweight", "qzeros", "scales"):
            assert torch.equal(getattr(one, tensor), getattr(two, tensor))
        torch.testing.assert_close(
            after.dequantize(name), merged.get_submodule(name).dequantize(torch.float32)
        )


@torch.no_grad()
def test_merged_checkpoint_saves_loads_and_dequantizes(trained, tmp_path):
    base, adapter = trained
    merge_exactly(base, adapter, tmp_path / "out", device="cpu")
    merged = halfbyte.load(tmp_path / "out", dtype=torch.float32)
    assert all(linear.offsets is not None for _, linear in quantized_linears(merged))
    assert "offsets" in str(find_obstacle(merged) or "offsets")
    expected = merged(IDS).logits
    merged.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "halfbyte"
    assert torch.equal(halfbyte.load(tmp_path / "again", dtype=torch.float32)(IDS).logits, expected)
    merged.dequantize()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_exact_merge_is_not_mistaken_for_a_standard_checkpoint(trained, tmp_path):
    base, adapter = trained
    merge_exactly(base, adapter, tmp_path / "out", device="cpu")
    for verdict in check_consumers(open_checkpoint(tmp_path / "out")).verdicts:
        refused = any("offsets of a merged adapter" in reason for reason in verdict.reasons)
        assert refused == (verdict.consumer != "transformers"), verdict
    with pytest.raises(ConfigError, match="has offsets of a merged adapter"):
        convert(tmp_path / "out", tmp_path / "other", config=ConversionConfig(to="gptq"))


def test_adapters_that_are_not_constant_are_refused(trained, tmp_path):
    base, adapter = trained
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] += 1e-6
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"is not constant over the groups of \d+ columns"):
        merge_exactly(base, other, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_qalora_starts_only_from_a_group_constant_adapter(trained, tmp_path, data):
    base, adapter = trained
    settings = {"data": data, "config": TRAIN}
    plain = tmp_path / "plain"
    finetune(base, plain, adapter=AdapterConfig(rank=4), **settings)
    qalora = AdapterConfig(rank=4, variant="qalora")
    with pytest.raises(ConfigError, match="is not constant over the base's groups"):
        finetune(base, tmp_path / "out", adapter=qalora, start_from=plain, **settings)
    finetune(base, tmp_path / "more", adapter=qalora, start_from=adapter, **settings)
    merge_exactly(base, tmp_path / "more", tmp_path / "merged", device="cpu")


def test_qalora_needs_packed_linears(trained, tmp_path, data):
    base, adapter = trained
    merge(base, adapter, tmp_path / "dense", device="cpu")
    with pytest.raises(ConfigError, match=r"with --variant qalora: it is a Linear"):
        finetune(
            tmp_path / "dense",
            tmp_path / "out",
            data=data,
            adapter=AdapterConfig(variant="qalora"),
            config=TRAIN,
        )


def test_merge_that_computes_something_else_is_refused(trained, tmp_path, monkeypatch, data):
    base, adapter = trained
    real = exact_merge.find_offsets
    monkeypatch.setattr(
        exact_merge, "find_offsets", lambda *a: {n: 0.8 * t for n, t in real(*a).items()}
    )
    with pytest.raises(VerificationError, match=r"nats per token apart, the base alone 0"):
        merge_exactly(base, adapter, tmp_path / "out", data=data, device="cpu")
