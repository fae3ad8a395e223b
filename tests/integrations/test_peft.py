"""Adapters on a quantized model, through PEFT's code path for ``nn.Linear``."""

from __future__ import annotations

import math

import pytest
import torch
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import halfbyte
from halfbyte.errors import ModelError

peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT calls what Transformers has deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # What prepare_model_for_kbit_training leaves to torch's default.
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint.*use_reentrant:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.fixture
def folder(tmp_path):
    halfbyte.install_transformers()
    # Columns out of order and zeros of their own: the hardest layer that a checkpoint holds.
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(symmetric=False, act_order=True))
    return tmp_path


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def add_adapter(model, **settings):
    settings = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def fill_adapter(model, seed=0):
    """Random numbers for the whole adapter; a fresh one's second factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise / 8)


def train(model, steps=8):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_snippet_of_the_article(folder):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = halfbyte.load(folder, dtype=torch.float32)

    model = prepare_model_for_kbit_training(model)
    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora_config)

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)
    assert model.is_gradient_checkpointing
    model.train()
    losses = train(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dequantized_model_in_float64(folder, variant, checkpointing):
    gradients, losses = [], []
    for dense in (False, True):
        base = load(folder, torch.float64)
        if dense:
            base.dequantize()
        elif checkpointing:
            base = peft.prepare_model_for_kbit_training(base)
        model = add_adapter(base, **VARIANTS[variant])
        fill_adapter(model)
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    # float64 throughout: what is left is the order of sums.
    assert math.isclose(*losses, rel_tol=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 14 * (3 if variant == "dora" else 2)
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float64
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_on_all_linears_learns_and_is_loaded_again(folder, tmp_path, dtype, variant):
    base = peft.prepare_model_for_kbit_training(load(folder, dtype))
    model = add_adapter(base, **VARIANTS[variant])
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(adapted) == 14
    losses = train(model, steps=16)
    assert losses[-1] < losses[0] - 0.3
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder, dtype), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_adapter_trained_on_codes_is_one_for_the_dense_model(folder, tmp_path):
    model = add_adapter(load(folder))
    fill_adapter(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    dense = load(folder)
    dense.dequantize()
    again = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_adapters_take_turns(folder, tmp_path):
    alone = []
    for seed in (1, 2):
        model = add_adapter(load(folder), r=4 * seed)
        fill_adapter(model, seed)
        model.eval().save_pretrained(tmp_path / str(seed))
        alone.append(model(IDS).logits)
    base = load(folder)
    plain = base(IDS).logits
    both = peft.PeftModel.from_pretrained(base, tmp_path / "1", adapter_name="one")
    both.load_adapter(tmp_path / "2", adapter_name="two")
    both.eval()
    assert not torch.allclose(alone[0], alone[1])
    for name, logits in (("one", alone[0]), ("two", alone[1]), ("one", alone[0])):
        both.set_adapter(name)
        assert torch.equal(both(IDS).logits, logits)
    with both.disable_adapter():
        assert torch.equal(both(IDS).logits, plain)
    mixed = both(IDS, adapter_names=["one", "two", "__base__", "one"]).logits
    for row, expected in enumerate((alone[0], alone[1], plain, alone[0])):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)
    both.delete_adapter("one")
    both.set_adapter("two")
    assert torch.equal(both(IDS).logits, alone[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trains_with_the_trainer(folder, tmp_path, use_reentrant):
    kwargs = {"use_reentrant": use_reentrant}
    base = peft.prepare_model_for_kbit_training(
        load(folder, torch.bfloat16), gradient_checkpointing_kwargs=kwargs
    )
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(add_adapter(base), arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.filterwarnings("ignore")
def test_trains_with_trl(folder, tmp_path):
    # Seconds to import, and only needed here.
    import datasets
    import trl
    from tests.helpers.tiny_llama import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<pad>"
    texts = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(16)]
    config = trl.SFTConfig(
        tmp_path / "run",
        max_steps=6,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
        dataset_num_proc=None,
    )
    trainer = trl.SFTTrainer(
        load(folder),
        config,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_merging_into_codes_is_refused(folder):
    model = add_adapter(load(folder))
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq"):
        model.merge_and_unload()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter", "layer"])
def test_merging_is_refused_where_the_mark_was_removed(folder, variant, safe_merge, way):
    base = load(folder)
    del base.quantization_method
    base.is_quantized = False
    model = add_adapter(base, **VARIANTS[variant])
    fill_adapter(model)
    with torch.no_grad():
        before = model.eval()(IDS).logits
    merge = {
        "merge_and_unload": model.merge_and_unload,
        "merge_adapter": model.merge_adapter,
        "layer": model.base_model.model.model.layers[0].self_attn.q_proj.merge,
    }[way]
    with pytest.raises(ModelError, match=r"the weight of a quantized linear .* halfbyte merge"):
        merge(safe_merge=safe_merge)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initialisation_that_changes_the_weight_is_refused(folder, start):
    with pytest.raises(ModelError, match="Cannot write to the weight of a quantized linear"):
        add_adapter(load(folder), init_lora_weights=start, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("q_proj", r"names a linear, 64 -> 64, which is quantized"),
        ("mlp", r"names gate_proj of a LlamaMLP, 64 -> 96, which is quantized"),
    ],
)
def test_training_a_quantized_linear_in_full_is_refused(folder, named, told):
    with pytest.raises(ModelError, match=rf"{told}.* with target_modules, or quantize"):
        add_adapter(load(folder), modules_to_save=[named], target_modules=["v_proj"])


def test_training_a_dense_module_in_full_is_allowed(folder):
    model = add_adapter(load(folder), modules_to_save=["lm_head", "norm"])
    assert "base_model.model.model.norm.modules_to_save.default.weight" in {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
