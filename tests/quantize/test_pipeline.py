"""From a model folder to a checkpoint: every option, on tiny models, down to the logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.families import VOCABULARY, token_lists, write_family
from tests.helpers.runs import SMALL, assert_loads_and_computes, bytes_of, quantize, run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import halfbyte
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    JournalError,
    ModelError,
)
from halfbyte.model.blocks import linear_weight
from halfbyte.quant_config import Override, QuantConfig, ResourceConfig
from halfbyte.quantize.progress import SilentProgress
from halfbyte.quantize.report import QuantizationReport, load_report

# ── bits, groups, grids, order ────────────────────────────────────────────────

GRID = [
    # A Latin square: every bit width and every group size meets all four kinds of grid and order.
    (bits, group_size, *[(True, False), (False, False), (True, True), (False, True)][(i + j) % 4])
    for i, bits in enumerate((2, 3, 4, 8))
    for j, group_size in enumerate((-1, 16, 32, 64))
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "desc_act"), GRID)
def test_every_kind_of_grid_loads_and_computes(
    bits: int, group_size: int, symmetric: bool, desc_act: bool, tmp_path: Path
) -> None:
    config = QuantConfig(bits=bits, group_size=group_size, symmetric=symmetric, desc_act=desc_act)
    # 128 is divided by every group size.
    changes = {"num_hidden_layers": 1, "intermediate_size": 128}
    model, report, checkpoint = run(tmp_path, config, changes=changes)
    assert len(report.modules) == len(checkpoint.linears) == 7
    assert {(m.bits, m.group_size, m.symmetric) for m in report.modules} == {
        (bits, group_size, symmetric)
    }
    assert {layout.bits for layout in checkpoint.linears.values()} == {bits}
    for name, layout in checkpoint.linears.items():
        facts = checkpoint.load_info(name)
        groups = 1 if group_size == -1 else layout.in_features // group_size
        assert layout.num_groups == groups
        assert facts.has_trivial_groups == (not desc_act or groups == 1), name
        if symmetric:
            assert facts.zeros.is_symmetric
    labels = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (labels["bits"], labels["group_size"]) == (bits, group_size)
    assert (labels["sym"], labels["desc_act"]) == (symmetric, desc_act)
    assert_loads_and_computes(model, checkpoint)


def test_more_bits_and_smaller_groups_lose_less(tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama", **SMALL)

    def error(**options: Any) -> float:
        output = tmp_path / "-".join(map(str, options.values()))
        report = quantize(tmp_path / "base", output, QuantConfig(**options))
        return sum(m.relative_error or 0 for m in report.modules)

    errors = [error(bits=bits, group_size=32) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]
    assert error(bits=4, group_size=16) < error(bits=4, group_size=64)


def test_calibration_is_used(tmp_path: Path) -> None:
    """The solver must do better than rounding to nearest on what it was calibrated on."""
    _, report, _ = run(tmp_path, QuantConfig(bits=3, group_size=32))
    for module in report.modules:
        assert module.relative_error is not None
        assert module.round_to_nearest_error is not None
        assert module.relative_error <= module.round_to_nearest_error
    total = sum(m.relative_error for m in report.modules)
    assert total < 0.8 * sum(m.round_to_nearest_error for m in report.modules)


# ── skips and overrides ───────────────────────────────────────────────────────


def test_skipped_modules_are_unchanged(tmp_path: Path) -> None:
    model, report, checkpoint = run(
        tmp_path, QuantConfig(group_size=32, skip=(r"layers\.0\.", "v_proj"))
    )
    left = {m.name: m.reason for m in report.skipped}
    assert len(left) == 8
    assert set(left.values()) == {"a skip pattern matches its name"}
    assert not left.keys() & checkpoint.linears.keys()
    for name in left:
        found = checkpoint.files.load([f"{name}.weight"])[f"{name}.weight"]
        assert torch.equal(found, model.get_submodule(name).weight)
    assert_loads_and_computes(model, checkpoint)


def test_overrides_change_single_modules_and_are_recorded(tmp_path: Path) -> None:
    config = QuantConfig(
        group_size=32,
        overrides=(
            Override(pattern="down_proj", bits=8),
            Override(pattern=r"1\.self_attn", group_size=16, symmetric=False),
            Override(pattern=r"1\.self_attn\.o_proj", bits=2),
        ),
    )
    model, report, checkpoint = run(tmp_path, config)
    schemes = {m.name: (m.bits, m.group_size, m.symmetric) for m in report.modules}
    assert schemes["model.layers.0.mlp.down_proj"] == (8, 32, True)
    assert schemes["model.layers.1.self_attn.q_proj"] == (4, 16, False)
    assert schemes["model.layers.1.self_attn.o_proj"] == (2, 16, False)
    assert schemes["model.layers.0.self_attn.q_proj"] == (4, 32, True)
    for name, (bits, group_size, _) in schemes.items():
        layout = checkpoint.linears[name]
        assert layout.bits == bits
        assert layout.num_groups == layout.in_features // group_size
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert labels["bits"] == 4
    assert {"bits": 8} in [
        {k: v for k, v in rule.items() if k == "bits"} for rule in labels["dynamic"].values()
    ]
    assert_loads_and_computes(model, checkpoint)


def test_override_of_one_among_linears_that_share_an_input(tmp_path: Path) -> None:
    """They share the Hessian, not the grid."""
    config = QuantConfig(group_size=32, overrides=(Override(pattern="k_proj", bits=8),))
    model, report, checkpoint = run(tmp_path, config)
    tokens = {m.num_tokens for m in report.modules}
    assert tokens == {6 * 32}
    errors = {m.name.rpartition(".")[2]: m.relative_error or 0 for m in report.modules}
    assert errors["k_proj"] < 0.05 * errors["q_proj"]
    assert_loads_and_computes(model, checkpoint)


def test_patterns_that_match_nothing_are_noted(tmp_path: Path) -> None:
    config = QuantConfig(
        group_size=32,
        skip=("o_proj", "wo_proj"),
        overrides=(Override(pattern="experts", bits=8),),
    )
    _, report, _ = run(tmp_path, config)
    assert [note for note in report.notes if "matches no module" in note] == [
        "the skip pattern 'wo_proj' matches no module",
        "the override pattern 'experts' matches no module",
    ]


@pytest.mark.parametrize("name", ["config", "calibration", "resources"])
def test_dict_of_settings_is_refused(tmp_path: Path, name: str) -> None:
    message = r"\{'bits': 4\} is a dict; a \w+Config is needed\. Make one with halfbyte\.\w+Config"
    with pytest.raises(ConfigError, match=message):
        halfbyte.quantize(tmp_path, tmp_path / "out", **{name: {"bits": 4}})


def test_everything_skipped_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"match all 14 linears of .*nothing is left to quantize"):
        run(tmp_path, QuantConfig(skip=(".",)))
    with pytest.raises(CheckpointError, match=r"no linear is quantized\. Loosen the skip patterns"):
        run(tmp_path, QuantConfig(skip=(".",)), family="mixtral")


def test_group_size_that_fits_no_layer_is_refused_before_the_run(tmp_path: Path) -> None:
    found = r"group_size is 7, but none of the 14 linears .* 7 divides \d+ inputs\. .*--group-size"
    with pytest.raises(ConfigError, match=found):
        run(tmp_path, QuantConfig(group_size=7))
    assert not (tmp_path / "out" / ".halfbyte" / "journal.jsonl").exists()


def test_a_disk_that_is_too_small_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(
        ConfigError, match=r"has 3\.0 kB free; the checkpoint needs \d.* temporarily"
    ):
        run(tmp_path, QuantConfig())
    monkeypatch.undo()
    # and nothing stands in the way of the next try
    run(tmp_path, QuantConfig())


def test_output_inside_the_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"model/4bit is inside the model's own folder .*model"):
        halfbyte.quantize(tmp_path / "model", tmp_path / "model" / "4bit")


# ── widths that do not fit ────────────────────────────────────────────────────


def test_width_that_the_group_size_does_not_divide_gets_a_smaller_one(tmp_path: Path) -> None:
    model, report, checkpoint = run(tmp_path, QuantConfig(group_size=64))
    for module in report.modules:
        if module.name.endswith("down_proj"):
            assert module.group_size == 32
            assert "group size 32: 64 does not divide 96 inputs" in module.notes
        else:
            assert module.group_size == 64
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert labels["group_size"] == 64
    assert [rule["group_size"] for rule in labels["dynamic"].values()] == [32]
    assert_loads_and_computes(model, checkpoint)


@pytest.mark.parametrize("desc_act", [False, True])
def test_ragged_last_group(desc_act: bool, tmp_path: Path) -> None:
    config = QuantConfig(group_size=64, ragged_groups=True, desc_act=desc_act)
    model, report, checkpoint = run(tmp_path, config)
    assert {m.group_size for m in report.modules} == {64}
    for name, layout in checkpoint.linears.items():
        assert layout.num_groups == (2 if "down_proj" in name else 1)
    facts = checkpoint.load_linear("model.layers.0.mlp.down_proj")
    assert facts.g_idx.bincount().tolist() == [64, 32]
    assert_loads_and_computes(model, checkpoint)


def test_linear_that_cannot_be_packed_is_skipped_with_a_reason(tmp_path: Path) -> None:
    changes = {**SMALL, "intermediate_size": 80}
    model, report, checkpoint = run(tmp_path, QuantConfig(group_size=32), changes=changes)
    assert {m.name.rpartition(".")[2]: m.reason for m in report.skipped} == {
        "gate_proj": "80 outputs are not a multiple of 32",
        "up_proj": "80 outputs are not a multiple of 32",
        "down_proj": "80 inputs are not a multiple of 32",
    }
    assert len(checkpoint.linears) == 2 * 4
    assert_loads_and_computes(model, checkpoint)


# ── what is written beside the weights ────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_two_runs_write_the_same_bytes(family: str, tmp_path: Path) -> None:
    write_family(tmp_path / "base", family, **SMALL)
    config = QuantConfig(group_size=32, lm_head=True, symmetric=False)
    for name in ("one", "two"):
        quantize(tmp_path / "base", tmp_path / name, config)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def write_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"[UNK]": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def test_folder_has_all_files_of_a_checkpoint(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_family(base, "llama", **SMALL)
    write_tokenizer(base)
    (base / "LICENSE").write_text("do what you want")
    (base / "modeling_own.py").write_text("raise SystemExit")
    report = quantize(base, tmp_path / "out", QuantConfig(group_size=32))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "LICENSE",
        "README.md",
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "quantization_error.png",
        "quantization_report.json",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load_report(tmp_path / "out") == report
    assert QuantizationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model_relation: quantized" in card
    assert report.calibration.digest[:12] in card
    png = (tmp_path / "out" / "quantization_error.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    configs = [
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"],
        json.loads((tmp_path / "out" / "quantize_config.json").read_text()),
    ]
    assert configs[0] == configs[1]
    assert report.checkpoint_bytes == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    )
    assert set(report.seconds_by_phase) >= {"load", "forward and Hessians", "solve", "write"}


def test_quality_is_measured_on_held_out_text(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_family(base, "llama", **SMALL)
    write_tokenizer(base)
    report = quantize(base, tmp_path / "out", QuantConfig(bits=2, group_size=32))
    quality = report.quality
    assert quality is not None
    assert (quality.windows, quality.window) == (8, 128)
    assert quality.kl_nats_mean > 0
    assert "evaluation" in quality.text
    less = quantize(base, tmp_path / "less", QuantConfig(bits=8, group_size=32))
    assert less.quality is not None
    assert less.quality.base_perplexity == quality.base_perplexity
    assert less.quality.kl_nats_mean < 0.1 * quality.kl_nats_mean
    without = quantize(base, tmp_path / "without", QuantConfig(group_size=32), quality=False)
    assert without.quality is None
    assert not any("quality" in note for note in without.notes)


@pytest.mark.parametrize(
    ("vocabulary", "reason"),
    [
        (None, "the model folder has no tokenizer"),
        (VOCABULARY + 5, "the tokenizer gives ids up to 132, the embedding has 128 rows"),
    ],
)
def test_unmeasured_quality_is_noted_with_the_reason(
    vocabulary: int | None, reason: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    write_family(base, "llama", **SMALL)
    if vocabulary is not None:
        write_tokenizer(base, vocabulary)
    report = quantize(base, tmp_path / "out", QuantConfig(group_size=32))
    assert report.quality is None
    assert f"quality was not measured: {reason}" in report.notes


# ── refusals ──────────────────────────────────────────────────────────────────


def test_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama", **SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(ConfigError, match=r"out is not empty \(1 files, such as thesis\.tex\)"):
        quantize(tmp_path / "base", tmp_path / "out", QuantConfig())
    inside = tmp_path / "out" / "thesis.tex" / "x" / "y"
    with pytest.raises(ConfigError, match=r"x/y lies in .*thesis\.tex, which is a file\. Name"):
        quantize(tmp_path / "base", inside, QuantConfig())
    with pytest.raises(ConfigError, match=r"thesis\.tex is a file. Name a folder"):
        quantize(tmp_path / "base", tmp_path / "out" / "thesis.tex", QuantConfig())
    assert (tmp_path / "out" / "thesis.tex").read_text() == "irreplaceable"


@pytest.mark.parametrize("name", ["no-such-folder-here", "./no/where", "a/b/c", "~/no-such-folder"])
def test_missing_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model folder"):
        halfbyte.quantize(name, tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "found"), [("model.safetensors", r"it is a file\."), ("m.gguf", "it is a GGUF file")]
)
def test_file_given_as_a_model_is_said_to_be_one(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=rf"Cannot use .*{name} as a model: {found}"):
        halfbyte.quantize(tmp_path / name, tmp_path / "o")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_missing_device_is_refused(device: str, tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama", **SMALL)
    with pytest.raises(ConfigError, match=f"device is '{device}', which this machine"):
        quantize(
            tmp_path / "base",
            tmp_path / "out",
            QuantConfig(),
            resources=ResourceConfig(device=device),
        )


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"token ids 5\.\.500; .* embedding has 128 rows"):
        run(tmp_path, QuantConfig(), text=[[5, 500]])


def test_failed_run_can_be_restarted_in_the_same_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError):
        run(tmp_path, QuantConfig(group_size=32), text=[[5, 500]])
    assert quantize(tmp_path / "base", tmp_path / "out", QuantConfig(group_size=32)).modules


def test_complete_run_is_returned_only_for_the_same_inputs(tmp_path: Path) -> None:
    config = QuantConfig(group_size=32)
    _, report, _ = run(tmp_path, config, changes={"num_hidden_layers": 1})
    plans: list[str] = []
    progress = SilentProgress()
    progress.started = plans.extend  # type: ignore[method-assign,assignment]
    base, out = tmp_path / "base", tmp_path / "out"
    again = quantize(base, out, config, resume=True, progress=progress)
    assert again == load_report(out)
    assert again.modules == report.modules
    assert plans == ["complete already; nothing was done"]
    write_family(tmp_path / "other", "llama", num_hidden_layers=1, intermediate_size=128)
    same: dict[str, Any] = {"model": base, "config": config}
    for change, told in (
        ({"config": QuantConfig(bits=3, group_size=32)}, r"config\.bits: 4 then, 3 now"),
        ({"text": token_lists(6, 32, seed=9)}, r"calibration\.digest: \".*\.\.\. then, \""),
        ({"text": "self"}, r"calibration\.digest: \".*\.\.\. then, \"input-self-"),
        ({"model": tmp_path / "other"}, r"model: \".*\.\.\. then, \""),
        (
            {"resources": ResourceConfig(dtype="bfloat16")},
            r"resources\.dtype: \"auto\" then, \"bfloat16\" now",
        ),
    ):
        given = {**same, **change}
        with pytest.raises(JournalError, match=rf"is complete and was made with .* \({told}"):
            quantize(given.pop("model"), out, given.pop("config"), resume=True, **given)


def test_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    run(tmp_path, QuantConfig(group_size=32))
    with pytest.raises(ModelError, match=r"is already quantized \(gptq\)"):
        quantize(tmp_path / "out", tmp_path / "again", QuantConfig())


def test_source_folder_is_unchanged(tmp_path: Path) -> None:
    write_family(tmp_path / "base", "llama", **SMALL)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    quantize(tmp_path / "base", tmp_path / "out", QuantConfig(group_size=32, lm_head=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    assert TensorFiles.open(tmp_path / "base").infos


def test_weights_and_embedding_dtype_survive(tmp_path: Path) -> None:
    model, _, checkpoint = run(
        tmp_path, QuantConfig(group_size=32), prepare=lambda m: m.to(torch.bfloat16)
    )
    infos = checkpoint.files.infos
    assert infos["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert infos["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16
    assert linear_weight(model.lm_head).dtype == torch.bfloat16


def test_license_that_cannot_be_copied_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "LICENSE").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match=r"missing the file LICENSE, which is a link to"):
        halfbyte.quantize(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
