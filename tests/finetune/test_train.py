from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.checkpoints import TINY_SIZES, Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.processes import CONTEXT
from tests.helpers.tiny_llama import build_tokenizer
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig

import halfbyte
from halfbyte.errors import ConfigError, DataError, JournalError, MissingExtraError, ModelError
from halfbyte.evaluate.loading import open_subject
from halfbyte.finetune import train
from halfbyte.finetune.adapter import attach_adapter
from halfbyte.finetune.base import check_packing, open_base
from halfbyte.finetune.config import AdapterConfig, TrainConfig
from halfbyte.finetune.report import TrainReport
from halfbyte.finetune.train import count_steps, finetune

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ADAPTER = AdapterConfig(rank=4, alpha=8.0, dropout=0.1)
SETTINGS = {
    "epochs": 3,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "length": 32,
    "device": "cpu",
    "dtype": "float32",
    "validation": 0.2,
    "evaluate_every": 4,
    "patience": 50,
}
CONFIG = TrainConfig(**SETTINGS)
B_OF_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


class Told:
    """A progress that goes to another process."""

    def __init__(self, out):
        self.out = out

    def started(self, plan, steps, done):
        self.out.send(("started", done))

    def stepped(self, step, loss):
        self.out.send(("step", step))

    def evaluated(self, step, loss, best): ...

    def finished(self): ...


def work(out, base, data, target, resume):
    """Train, in a process of its own."""
    finetune(
        base, target, data=data, adapter=ADAPTER, config=CONFIG, resume=resume, progress=Told(out)
    )


def start_process(*arguments):
    """Begin to train; what is told comes out of a pipe, until its end."""
    told, out = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(out, *arguments))
    process.start()
    out.close()
    return process, told


def read_all(told):
    found = []
    with contextlib.suppress(EOFError):
        while True:
            found.append(told.recv())
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, tiny_llama_config(vocab_size=64), Recipe())
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two words, then the two after them: a rule that a tiny model can learn."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 3}"} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "adapter"
    return out, finetune(base, out, data=data, adapter=ADAPTER, config=CONFIG)


def logits_of(base, adapter, ids):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()(ids).logits


def test_learns_and_reports_it(trained, base):
    _, report = trained
    assert report.steps == 30
    assert report.validation_after < report.validation_before - 0.1
    assert report.data["examples"] == 40
    assert report.data["validation_examples"] == 10
    assert report.data["counted_tokens"] == 40 * 3
    assert [entry["step"] for entry in report.history] == list(range(1, 31))
    judged = {e["step"]: e["validation"] for e in report.history if "validation" in e}
    assert list(judged) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert report.kept_step == min(judged, key=judged.get)
    assert report.validation_after == judged[report.kept_step]
    assert all(entry["loss"] > 0 and "learning_rate" in entry for entry in report.history)


@torch.no_grad()
def test_keeps_the_best_adapter_and_peft_loads_it(trained, base, data):
    out, report = trained
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
        "training.png",
    ]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # none for the owner only
    subject = open_subject(base, dtype="float32", device="cpu")
    held = train._read_data(subject.tokenizer, data, None, CONFIG)
    model = peft.PeftModel.from_pretrained(subject.model, out).eval()
    losses = [
        float(model(**train.collate(held.validation_rows[i : i + 4], 3)).loss) for i in (0, 4, 8)
    ]
    mean = (4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10
    assert mean == pytest.approx(report.validation_after, abs=1e-4)


def test_a_second_run_gives_the_same_bytes(trained, base, data, tmp_path):
    out, report = trained
    again = finetune(base, tmp_path / "again", data=data, adapter=ADAPTER, config=CONFIG)
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert again.history == report.history


@pytest.mark.parametrize(
    "kill_at",
    [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(17, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_gives_the_same_bytes(trained, base, data, tmp_path, kill_at):
    out, report = trained
    target = tmp_path / "adapter"
    process, told = start_process(base, data, target, False)
    while told.recv() != ("step", kill_at):
        pass
    process.kill()
    process.join()
    with pytest.raises(JournalError, match=r"holds an unfinished run\. Add --resume"):
        finetune(base, target, data=data, adapter=ADAPTER, config=CONFIG)
    process, told = start_process(base, data, target, True)
    ((_, started),) = [event for event in read_all(told) if event[0] == "started"]
    process.join()
    assert process.exitcode == 0
    assert started >= kill_at // 4 * 4 - 4
    assert started % 4 == 0
    name = "adapter_model.safetensors"
    assert (target / name).read_bytes() == (out / name).read_bytes()
    assert TrainReport.load(target).history == report.history


def test_resuming_with_other_options_is_refused(base, data, tmp_path, monkeypatch):
    def stop(*_args, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "make_trainer", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(base, tmp_path / "a", data=data, adapter=ADAPTER, config=CONFIG)
    other = TrainConfig(**{**SETTINGS, "learning_rate": 1e-3})
    with pytest.raises(JournalError, match=r"config\.learning_rate: 0\.01 then, 0\.001 now"):
        finetune(base, tmp_path / "a", data=data, adapter=ADAPTER, config=other, resume=True)


def test_resuming_a_finished_run_gives_its_report(trained, base, data):
    out, report = trained
    again = finetune(base, out, data=data, adapter=ADAPTER, config=CONFIG, resume=True)
    assert again == report
    other = TrainConfig(**{**SETTINGS, "epochs": 2})
    with pytest.raises(JournalError, match=r"is complete and .* \(config\.epochs: 3 then, 2 now\)"):
        finetune(base, out, data=data, adapter=ADAPTER, config=other, resume=True)
    with pytest.raises(ConfigError, match="is not empty"):
        finetune(base, out, data=data, adapter=ADAPTER, config=CONFIG)


def test_stops_early_without_improvement(base, data, tmp_path):
    config = TrainConfig(
        **{**SETTINGS, "learning_rate": 1.0, "patience": 2, "epochs": 20, "evaluate_every": 2}
    )
    report = finetune(base, tmp_path / "a", data=data, adapter=ADAPTER, config=config)
    assert report.stopped_early
    assert report.steps < 200
    assert report.steps - report.kept_step == 2 * 2


def test_starts_from_an_adapter(trained, base, data, tmp_path):
    out, report = trained
    config = TrainConfig(**{**SETTINGS, "epochs": 1, "learning_rate": 1e-6, "evaluate_every": 1})
    again = finetune(
        base, tmp_path / "a", data=data, config=config, start_from=out, adapter=ADAPTER
    )
    assert again.validation_before == pytest.approx(report.validation_after, abs=1e-4)


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_packing_and_no_validation(base, data, tmp_path, variant):
    config = TrainConfig(**{**SETTINGS, "packing": True, "validation": 0.0, "epochs": 4})
    report = finetune(
        base, tmp_path / "a", data=data, config=config,
        adapter=AdapterConfig(rank=4, variant=variant, targets=("q_proj", "down_proj")),
    )  # fmt: skip
    # 50 examples of 5 tokens, six to a row of 32.
    assert report.data["rows"] == 9
    assert report.validation_after is None
    assert report.kept_step == report.steps == 12
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config[f"use_{variant}"]
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 4 * (3 if variant == "dora" else 2)


def test_packing_is_refused_if_examples_see_each_other(base):
    subject = open_subject(base, dtype="float32", device="cpu")
    check_packing(subject)
    forward = subject.model.forward
    subject.model.forward = lambda input_ids, position_ids, **rest: forward(input_ids, **rest)
    with pytest.raises(ConfigError, match="with --packing: examples in one row see each other"):
        check_packing(subject)


def test_unknown_target_is_refused_with_its_name(base, data, tmp_path):
    adapter = AdapterConfig(targets=("query",))
    with pytest.raises(
        ConfigError, match=r"(?s)Cannot put an adapter on a LlamaForCausalLM.*query"
    ):
        finetune(base, tmp_path / "a", data=data, adapter=adapter, config=CONFIG)
    # The corrected command is not held up by an unfinished run.
    config = TrainConfig(**{**SETTINGS, "max_steps": 1, "warmup": 0.05})
    report = finetune(base, tmp_path / "a", data=data, adapter=ADAPTER, config=config)
    # One step is a step that teaches.
    assert report.history[0]["learning_rate"] == config.learning_rate
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")[B_OF_Q].abs().max() > 0


@pytest.mark.parametrize("kind", [Qwen3MoeConfig, Qwen2MoeConfig])
def test_experts_of_a_mixture_keep_their_weights(tmp_path, kind):
    """PEFT would adapt their fused weights, which a quantized model does not have."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = kind(**TINY_SIZES | sizes)
    write_checkpoint(tmp_path, config, Recipe(skip=r"lm_head|gate$"))
    adapted = attach_adapter(halfbyte.load(tmp_path), AdapterConfig())
    names = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 4
    assert all("self_attn" in name for name in names)


def test_targets_that_get_no_adapter_are_refused(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    write_checkpoint(tmp_path, Qwen3MoeConfig(**TINY_SIZES | sizes))
    targets = ("q_proj", "gate_proj", "up_proj", "down_proj")
    with pytest.raises(ConfigError, match=r"on gate_proj of this model; it found q_proj\. Experts"):
        attach_adapter(halfbyte.load(tmp_path), AdapterConfig(targets=targets, dropout=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e30}, r"failed: the loss is (nan|inf) after [12] steps\. No adapter "
         r"was written\. Remove .* with a lower --learning-rate \(it is 1e\+30\)\."),
        ({"learning_rate": 1e30, "evaluate_every": 1}, r"held-out loss is nan after 1 s"),
        ({"learning_rate": 1e30, "validation": 0.0, "max_steps": 2, "dtype": "bfloat16"},
         r"is (nan|inf) .* --dtype float32 \(it is bfloat16\)"),
    ],
)  # fmt: skip
def test_run_that_diverges_stops_there_and_writes_no_adapter(
    base, data, tmp_path, changes, message
):
    config = TrainConfig(**{**SETTINGS, **changes})
    with pytest.raises(ModelError, match=message):
        finetune(base, tmp_path / "a", data=data, adapter=ADAPTER, config=config)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".halfbyte"]


def test_base_with_values_that_are_not_finite_is_blamed(base, data, tmp_path, monkeypatch):
    def open_broken(*arguments):
        subject = open_base(*arguments)
        subject.model.model.norm.weight.data.fill_(torch.nan)
        return subject

    monkeypatch.setattr(train, "open_base", open_broken)
    with pytest.raises(
        ModelError, match=r"is nan after 0 steps\. .*on another base: this one does not"
    ):
        finetune(base, tmp_path / "a", data=data, adapter=ADAPTER, config=CONFIG)


def test_data_is_read_before_the_model(base, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_base", None)
    with pytest.raises(DataError, match="No such file"):
        finetune(base, tmp_path / "a", data=tmp_path / "none", config=CONFIG)


def test_folder_without_an_adapter_is_refused_before_anything_is_read(base, tmp_path):
    for folder, found in (("no/such", "no such folder"), (str(base), "no adapter_config.json")):
        with pytest.raises(ConfigError, match=rf"no adapter in {folder}: {found}.* Give the fold"):
            finetune(base, tmp_path / "a", data="none", start_from=folder)


def test_resuming_with_another_start_is_refused(trained, base, data, tmp_path, monkeypatch):
    start = shutil.copytree(trained[0], tmp_path / "start")
    settings = {"data": data, "adapter": ADAPTER, "config": CONFIG, "start_from": start}
    with monkeypatch.context() as patched:
        patched.setattr(train, "make_trainer", None)
        with pytest.raises(TypeError):
            finetune(base, tmp_path / "a", **settings)
    weights = start / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(JournalError, match=r"start_from\.adapter_model\.safetensors: "):
        finetune(base, tmp_path / "a", **settings, resume=True)


def test_length_beyond_the_model_is_refused(base, data, tmp_path):
    config = TrainConfig(**{**SETTINGS, "length": 65})
    with pytest.raises(ConfigError, match=r"length is 65; .* takes at most 64 tokens"):
        finetune(base, tmp_path / "a", data=data, config=config)


def test_tokens_of_another_model_are_refused(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train, "read_examples", lambda *_a, **_k: train.Examples(
            examples=(train.Example((5, 900), (5, 900)), train.Example((6, 7), (6, 7))), notes=()
        ),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"token id 900, and .* has ids 0\.\.63"):
        finetune(base, tmp_path / "a", data=data, config=CONFIG)


def test_missing_packages_are_named_with_the_command(base, data, tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingExtraError, match=r'pip install "halfbyte\[finetune\]"'):
            finetune(base, tmp_path / "a", data=data, config=CONFIG)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else 1
    )
    config = TrainConfig(**{**SETTINGS, "optimizer": "adamw_8bit"})
    with pytest.raises(ConfigError, match=r"optimizer is adamw_8bit, .* pip install bitsandbytes"):
        finetune(base, tmp_path / "a", data=data, config=config)


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (10, {}, 9),
        (10, {"gradient_accumulation_steps": 2}, 6),
        (10, {"epochs": 0.5}, 2),
        (10, {"max_steps": 4}, 4),
    ],
)
def test_counts_steps(rows, changes, steps):
    assert count_steps(rows, TrainConfig(**{"epochs": 3, "batch_size": 4, **changes})) == steps


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (TrainConfig, {"epochs": 0}, "epochs is 0; it must be a number above 0"),
        (TrainConfig, {"batch_size": 0}, "batch_size is 0; it must be a whole number, 1 or more"),
        (TrainConfig, {"validation": 1}, "validation is 1; it must be a share, 0 or more and less"),
        (TrainConfig, {"schedule": "x"}, "schedule is 'x'; allowed are cosine, linear, constant"),
        (AdapterConfig, {"rank": 1.5}, "rank is 1.5; it must be a whole number"),
        (AdapterConfig, {"variant": "vera"}, "variant is 'vera'; allowed are lora, rslora, dora"),
    ],
)
def test_settings_are_checked(cls, changes, message):
    with pytest.raises(ConfigError, match=message):
        cls(**changes)
