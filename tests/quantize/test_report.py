from __future__ import annotations

import json
from dataclasses import replace

import pytest

from halfbyte.errors import CheckpointError
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.report import (
    REPORT_FILE,
    QualityReport,
    QuantizationReport,
    block_of,
    kind_of,
    load_report,
)


def test_report_round_trips_through_a_file(make_report, make_module, tmp_path):
    module = make_module("model.layers.3.mlp.up", None, notes=("float64 retry",))
    report = make_report(modules=(module,), notes=("resumed at block 2",))
    assert report.save(tmp_path) == tmp_path / REPORT_FILE
    loaded = load_report(tmp_path)
    # JSON has no tuples; the config itself knows which of its values are.
    assert QuantConfig.from_dict(loaded.config) == QuantConfig.from_dict(report.config)
    assert replace(loaded, config=report.config) == report


def test_report_without_quality_round_trips_through_json(make_report):
    report = make_report(quality=None, config={"bits": 4})
    assert QuantizationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", 12, "self_attn.q_proj"),
        ("transformer.h.0.mlp.c_fc", 0, "mlp.c_fc"),
        ("model.layers.3.mlp.experts.17.down_proj", 3, "mlp.experts.*.down_proj"),
        ("lm_head", None, "lm_head"),
        ("model.embed_out", None, "model.embed_out"),
    ],
)
def test_module_name_splits_into_block_and_kind(name, block, kind):
    assert block_of(name) == block
    assert kind_of(name) == kind


def test_unknown_and_missing_fields_are_named(make_report):
    values = make_report().to_dict()
    del values["seconds"]
    values["surprise"] = 1
    with pytest.raises(CheckpointError, match=r"unknown \['surprise'\], missing \['seconds'\]"):
        QuantizationReport.from_dict(values)


def test_unknown_field_of_a_module_is_named(make_report):
    values = make_report().to_dict()
    values["modules"][0]["colour"] = "red"
    with pytest.raises(CheckpointError, match=r"ModuleReport .* unknown \['colour'\]"):
        QuantizationReport.from_dict(values)


def test_folder_without_a_report_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=rf"has no {REPORT_FILE}.*resume the run"):
        load_report(tmp_path)


def test_damaged_report_is_refused(tmp_path):
    (tmp_path / REPORT_FILE).write_text('{"model": ')
    with pytest.raises(CheckpointError, match="it is not valid JSON"):
        load_report(tmp_path)


def test_quality_report_is_made_from_a_comparison():
    class Comparison:
        num_windows, window = 7, 128
        kl_nats, kl_standard_error, top1_agreement = 0.25, None, 0.8
        base = type("Result", (), {"perplexity": 10.0})
        quantized = type("Result", (), {"perplexity": 11.0})

    quality = QualityReport.from_divergence(Comparison(), text="t", text_digest="d")
    assert quality == QualityReport(
        text="t",
        text_digest="d",
        windows=7,
        window=128,
        base_perplexity=10.0,
        quantized_perplexity=11.0,
        kl_nats_mean=0.25,
        kl_standard_error=None,
        top1_agreement=0.8,
    )
