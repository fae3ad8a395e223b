"""Adapters that a GPU trains, computes and merges: those of the CPU, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from tests.helpers.adapters import write_adapter
from tests.helpers.checkpoints import Recipe, read_tensors, tiny_llama_config, write_checkpoint
from tests.helpers.families import token_lists
from tests.helpers.runs import quantize
from tests.helpers.tiny_llama import build_model, build_tokenizer

import halfbyte
from halfbyte.finetune.config import AdapterConfig, TrainConfig
from halfbyte.finetune.exact_merge import merge_exactly
from halfbyte.finetune.merge import merge
from halfbyte.finetune.progress import SilentTrainProgress
from halfbyte.finetune.repair import repair
from halfbyte.finetune.requantize import merge_and_quantize
from halfbyte.finetune.train import finetune
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig

pytestmark = [
    pytest.mark.simulated_gpu,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CALIBRATION = CalibrationConfig(samples=8, length=32)


@pytest.fixture
def base(tmp_path):
    config = tiny_llama_config(vocab_size=64, num_hidden_layers=1)
    write_checkpoint(tmp_path / "base", config, Recipe(group_size=32, dtype=torch.bfloat16))
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 3}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_same_on_both(folder, write):
    for device in ("cpu", "cuda"):
        write(folder / device, device)
    found, expected = read_tensors(folder / "cuda"), read_tensors(folder / "cpu")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("lora", {"packing": True}), ("dora", {"dtype": "bfloat16"})],
)
def test_trained_adapter(base, data, tmp_path, variant, settings):
    # A GPU's dropout multiplies in another order.
    adapter = AdapterConfig(rank=4, dropout=0.0, variant=variant)
    shared = {"max_steps": 1, "batch_size": 4, "length": 32, "dtype": "float32"} | settings
    assert_same_on_both(
        tmp_path,
        lambda output, device: finetune(
            base,
            output,
            data=data,
            adapter=adapter,
            config=TrainConfig(**shared, validation=0.2, evaluate_every=1, device=device),
        ),
    )


def test_resumed_training(base, data, tmp_path):
    class Killed(SilentTrainProgress):
        def stepped(self, step, loss):
            if step == 2:
                raise KeyboardInterrupt

    settings = {"max_steps": 3, "batch_size": 4, "length": 32, "dtype": "float32"}
    settings |= {"validation": 0.2, "evaluate_every": 1}

    def train(output, device, **keywords):
        adapter, config = AdapterConfig(rank=4, dropout=0.0), TrainConfig(**settings, device=device)
        return finetune(base, output, data=data, adapter=adapter, config=config, **keywords)

    def train_twice(output, device):
        if device == "cuda":
            with pytest.raises(KeyboardInterrupt):
                train(output, device, progress=Killed())
        train(output, device, resume=True)

    assert_same_on_both(tmp_path, train_twice)


def test_exactly_merged_adapter(base, data, tmp_path):
    adapter = AdapterConfig(rank=4, dropout=0.0, variant="qalora")
    config = TrainConfig(
        max_steps=1, batch_size=4, length=32, learning_rate=0.02, dtype="float32", device="cuda"
    )
    finetune(base, tmp_path / "adapter", data=data, adapter=adapter, config=config)
    assert_same_on_both(
        tmp_path,
        lambda output, device: merge_exactly(
            base, tmp_path / "adapter", output, data=data, device=device
        ),
    )
    ids = torch.arange(4, 40)[None]
    logits = [
        halfbyte.load(tmp_path / "cpu", device=device, dtype=torch.float32)(ids.to(device)).logits
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(logits[0], logits[1].cpu())


def test_repairing_adapter(tmp_path):
    build_model(vocabulary=128).save_pretrained(tmp_path / "original")
    quantize(tmp_path / "original", tmp_path / "base", QuantConfig(bits=2, group_size=16))
    assert_same_on_both(
        tmp_path,
        lambda output, device: repair(
            tmp_path / "base",
            tmp_path / "original",
            output,
            calibration=CALIBRATION,
            text=token_lists(8, 32),
            device=device,
        ),
    )


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_model(base, data, tmp_path, variant):
    adapter = write_adapter(base, tmp_path / "adapter", **variant)
    assert_same_on_both(
        tmp_path, lambda output, device: merge(base, adapter, output, data=data, device=device)
    )


def test_merged_and_quantized_model(base, data, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    assert_same_on_both(
        tmp_path,
        lambda output, device: merge_and_quantize(
            base,
            adapter,
            output,
            data=data,
            calibration=CALIBRATION,
            resources=ResourceConfig(device=device, dtype="float32"),
        ),
    )
