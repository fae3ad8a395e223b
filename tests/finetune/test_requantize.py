from __future__ import annotations

import os

import peft
import pytest
import torch
from tests.helpers.adapters import load, write_adapter
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.processes import CONTEXT
from tests.helpers.tiny_llama import build_tokenizer

from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.cli.main import main
from halfbyte.errors import CheckpointError, ConfigError, JournalError, ModelError
from halfbyte.finetune import requantize
from halfbyte.finetune.data import Example, Examples
from halfbyte.finetune.merge import merge_layers
from halfbyte.finetune.merge_check import MAX_SCORED, split_task_examples
from halfbyte.finetune.requantize import (
    MERGED_FOLDER,
    merge_and_quantize,
    merging_config,
    scheme_of,
    task_calibration,
)
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize import run_text
from halfbyte.quantize.report import load_report

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_examples(count: int, length: int = 6) -> list[Example]:
    return [
        Example((*range(i, i + length),), (-100, -100, *range(i + 2, i + length)))
        for i in range(count)
    ]


def test_merges_and_quantizes_as_the_base_was(base, tmp_path, data):
    adapter = write_adapter(base, tmp_path / "adapter")
    out = tmp_path / "out"
    report = merge_and_quantize(
        base, adapter, out, data=data, calibration=CalibrationConfig(samples=8, length=32)
    )
    assert report.quantized
    assert set(report.scores) == {"adapted", "merged", "quantized"}
    checkpoint = open_checkpoint(out)
    assert len(checkpoint.linears) == 14
    assert {linear.bits for linear in checkpoint.linears.values()} == {4}
    assert {linear.group_size for linear in checkpoint.linears.values()} == {32}
    assert load_report(out).config["match_base"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".halfbyte")] == []
    name = "model.layers.0.self_attn.q_proj"
    merged = peft.PeftModel.from_pretrained(load(base, torch.float32), adapter)
    merged = merge_layers(merged, torch.float32).get_submodule(name).weight
    error = (checkpoint.dequantize(name).float() - merged).norm() / merged.norm()
    assert error < 0.2


class Killing:
    """A progress that ends its process at a block, as SIGTERM does: nothing is cleaned up."""

    def block_started(self, index, count):
        if index:
            os._exit(9)

    def __getattr__(self, name):
        return lambda *_: None


def work(base, adapter, out, data, progress=None, resume=False):
    merge_and_quantize(
        base, adapter, out, data=data, calibration=CalibrationConfig(samples=8, length=32),
        progress=progress, resume=resume,
    )  # fmt: skip


def test_killed_run_is_resumed_and_leaves_nothing_outside_its_folder(base, tmp_path, data):
    adapter, out = write_adapter(base, tmp_path / "adapter"), tmp_path / "out" / "model"
    process = CONTEXT.Process(target=work, args=(base, adapter, out, data, Killing()))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert (out / ".halfbyte" / MERGED_FOLDER / "base-merged" / "model.safetensors").is_file()
    with pytest.raises(JournalError, match=r"holds an unfinished run\. Add --resume"):
        work(base, adapter, out, data)
    first = (out / "model-00001-of-00003.safetensors").stat()
    work(base, adapter, out, data, resume=True)
    assert not (out / ".halfbyte").exists()
    assert "# base-merged in 4 bits" in (out / "README.md").read_text()
    assert (out / "model-00001-of-00003.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    work(base, adapter, tmp_path / "whole", data)
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_output_is_checked_first_and_a_failed_merge_leaves_nothing(
    base, tmp_path, data, monkeypatch
):
    def fail(*_args, **_keywords):
        raise ModelError("no merge")

    monkeypatch.setattr(requantize, "merge", fail)
    (tmp_path / "in-use").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        work(base, "adapter", tmp_path, data)
    with pytest.raises(ConfigError, match=r"/out is inside the model's own folder"):
        work(base, "adapter", base / "out", data)
    with pytest.raises(ModelError, match="no merge"):
        work(base, "adapter", tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def test_scheme_of_the_base_is_reused(base, tmp_path):
    config = merging_config(base, end_to_end_steps=7)
    assert (config.bits, config.group_size, config.symmetric, config.desc_act) == (
        4, 32, False, True,
    )  # fmt: skip
    assert (config.match_base, config.polish, config.end_to_end_steps) == (True, 0, 7)
    plain = load(base, torch.bfloat16)
    plain.dequantize()
    plain.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"names no bits and group size.*--bits"):
        scheme_of(tmp_path)


@pytest.mark.parametrize(("group_size", "ragged"), [(32, False), (64, True)])
def test_groups_are_ragged_only_if_those_of_the_base_are(group_size, ragged, tmp_path):
    # Linears of 64 and 96 inputs, and overrides as a skipped module or a smaller group leaves them.
    recipe = Recipe(group_size=group_size, labels={"dynamic": {"-:^lm_head$": {}}})
    write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    assert scheme_of(tmp_path)["ragged_groups"] is ragged


def test_examples_are_separate_sequences_with_half_of_the_tokens(base):
    examples = make_examples(40)
    calibration = CalibrationConfig(samples=10, length=16)
    text = task_calibration(examples, build_tokenizer(), calibration)
    ours = [row for row in text if "labels" in row]
    others = [row for row in text if "labels" not in row]
    assert len(others) == 5
    # 40 examples of 6 tokens in the room of 5 x 16: every third.
    assert [tuple(row["input_ids"]) for row in ours] == [e.ids for e in examples[::3]]
    assert [tuple(row["labels"]) for row in ours] == [e.labels for e in examples[::3]]
    assert sum(len(row["input_ids"]) for row in ours) <= 5 * 16 + 6
    few = task_calibration(examples[:4], build_tokenizer(), calibration)
    assert sum("labels" in row for row in few) == 4


def test_held_out_examples_are_not_in_the_calibration(base, tmp_path, data, monkeypatch):
    examples = Examples(examples=tuple(make_examples(50)), notes=())
    fitted, judging = split_task_examples(examples)
    assert len(judging) == 10
    assert len(fitted) == 40
    assert not {e.ids for e in fitted} & {e.ids for e in judging}
    many = Examples(examples=tuple(make_examples(4000)), notes=())
    assert len(split_task_examples(many)[1]) <= MAX_SCORED
    same = Examples(examples=(make_examples(1)[0],) * 3, notes=())
    assert split_task_examples(same) == (same.examples, same.examples)

    seen = []
    real = run_text.load_calibration

    def watch(text, *rest):
        seen.extend(text)
        return real(text, *rest)

    monkeypatch.setattr(run_text, "load_calibration", watch)
    adapter = write_adapter(base, tmp_path / "adapter")
    report = merge_and_quantize(
        base, adapter, tmp_path / "out", data=data,
        config=merging_config(base, end_to_end_steps=2),
        calibration=CalibrationConfig(samples=64, length=32),
    )  # fmt: skip
    assert sum("labels" in row for row in seen) == 40
    assert load_report(tmp_path / "out").end_to_end is not None
    assert report.scores["quantized"].loss > 0


@pytest.mark.parametrize("other", [["--quantize"], ["--original", "x"]])
def test_an_exact_merge_keeps_the_codes(capsys, tmp_path, other):
    code = main(["merge", "base", "adapter", "-o", str(tmp_path / "out"), "--exact", *other])
    assert code != 0
    assert f"--exact cannot be combined with {other[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--bits", "2", "--group-size", "32"], "Options without effect: bits, group_size. They"),
        (["--samples", "4"], "effect: samples."),
        (["--memory", "4GB"], "effect: memory."),
        (["--resume"], "effect: resume."),
        (["--exact", "--seed", "1"], "effect: seed."),
    ],
)
def test_options_of_quantizing_are_refused_without_it(capsys, tmp_path, given, named):
    assert main(["merge", "base", "adapter", "-o", str(tmp_path / "out"), *given]) == 2
    assert named in capsys.readouterr().err
