from __future__ import annotations

import re
from dataclasses import replace

import pytest
from huggingface_hub.repocard import metadata_load

from halfbyte.quant_config import Override, QuantConfig
from halfbyte.quantize.model_card import base_model_name, save_model_card, write_card_body
from halfbyte.quantize.report import EndToEndReport, SkippedModule


def test_front_matter_names_base_relation_and_license(make_report, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- x\n---\n")
    path = save_model_card(make_report(), base, tmp_path)
    assert metadata_load(path) == {
        "base_model": "owner/Tiny-1M",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["gptq", "4-bit", "halfbyte"],
    }


@pytest.mark.parametrize("readme", [None, "# No front matter\n"])
def test_base_without_a_license_gives_none(make_report, tmp_path, readme):
    base = tmp_path / "base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme)
    path = save_model_card(make_report(), base, tmp_path)
    assert "license" not in metadata_load(path)


def test_card_holds_recipe_quality_versions_and_size(make_report):
    body = write_card_body(make_report(), "owner/Tiny-1M")
    assert body.startswith("# Tiny-1M in 4 bits\n")
    assert "4.28 bits per quantized weight, 112.7 MB" in body
    assert "On 10 windows of 256 tokens of held-out text (sha256 `cdcdcdcdcdcdcdcd`)" in body
    assert "| perplexity, this | 23.910 |" in body
    assert "0.1743 nats per token (standard error 0.0042)" in body
    assert "78.0% of tokens" in body
    assert "| symmetric | yes |" in body
    assert f"`{'ab' * 32}`" in body
    assert "2048 in 4 samples of 512" in body
    assert "halfbyte 0.1.0, torch 2.13.0." in body
    assert "In 2 min 10 s, with 1.2 GB of peak memory" in body


def test_card_says_that_quality_was_not_measured(make_report):
    body = write_card_body(make_report(quality=None), "owner/Tiny-1M")
    assert "Not measured." in body


def test_experts_and_training_are_listed(make_report):
    names = [f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(3)]
    some = make_report().modules[0]
    modules = tuple(replace(some, name=n, num_tokens=7 * e) for e, n in enumerate(names))
    tuning = EndToEndReport(
        steps=40, kept_step=30, kl_before=0.05, kl_after=0.0461, looks=(), stopped=False
    )
    body = write_card_body(make_report(modules=modules, end_to_end=tuning), "owner/Tiny-1M")
    assert "| 1 | 3 | 0 | 7 | 14 | 0 |" in body
    assert "step 30 of 40 kept: KL on held-out calibration text 0.0500 to 0.0461" in body
    assert "Calibration tokens by expert" not in write_card_body(make_report(), "owner/Tiny-1M")


def test_overrides_and_skips_are_readable_and_keep_the_table_whole(make_report):
    config = QuantConfig(skip=("a|b",), overrides=(Override(pattern="down", bits=8),))
    body = write_card_body(make_report(config=config.to_dict()), "x")
    assert r"| skip | `a\|b` |" in body
    assert "| overrides | pattern `down` bits 8 |" in body


def test_errors_are_summarized_by_kind_and_the_worst_listed(make_report):
    body = write_card_body(make_report(), "x")
    assert "| `attn.q_proj` | 3 | 4 | 64 | 0.003 | 0.005 | 0.006 |" in body
    worst = re.findall(r"\| `(model\.layers\.\S+)` \| (\S+) \|", body)
    assert worst[0] == ("model.layers.2.mlp.down", "0.006")
    assert [float(error) for _, error in worst] == sorted(
        (float(e) for _, e in worst), reverse=True
    )


def test_only_ten_are_listed_and_a_kind_shows_all_its_settings(make_report, make_module):
    modules = [make_module(f"l.{i}.up", 0.01 * i, bits=4 if i else 8) for i in range(12)]
    body = write_card_body(make_report(modules=tuple(modules)), "x")
    assert "| `up` | 12 | 4, 8 | 64 |" in body
    assert body.count("| `l.") == 10
    assert "The worst 10:" in body


def test_skipped_modules_and_notes_are_listed_once_per_kind(make_report, make_module):
    notes = ("group 128 does not divide 576; 64 used",)
    modules = [make_module(f"l.{i}.up", notes=notes) for i in range(3)]
    modules.append(make_module("l.0.down", notes=("float64 retry",)))
    skipped = [SkippedModule(name=f"l.{i}.router", reason="routers stay whole") for i in range(3)]
    body = write_card_body(
        make_report(modules=tuple(modules), skipped=tuple(skipped), notes=("resumed",)), "x"
    )
    assert "| `router` | 3 | routers stay whole |" in body
    assert "- 3 of `up`: group 128 does not divide 576; 64 used" in body
    assert "- `l.0.down`: float64 retry" in body
    assert "- resumed" in body


def test_card_without_errors_has_no_plot(make_report, make_module):
    body = write_card_body(make_report(modules=(make_module("l.0.up", None),)), "x")
    assert "| `up` | 1 | 4 | 64 | none | none | none |" in body
    assert ".png" not in body


def test_base_name_is_never_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert base_model_name("owner/name") == "owner/name"
    assert base_model_name("models/tiny") == "tiny"
    assert base_model_name("models/tiny/../tiny/") == "tiny"
    assert base_model_name(str(tmp_path / "models" / "tiny")) == "tiny"
    assert base_model_name("/cache/hub/models--owner--na--me/snapshots/1f2e") == "owner/na/me"
