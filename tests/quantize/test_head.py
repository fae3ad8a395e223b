"""The output head: quantized if configured, otherwise unchanged with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.runs import SMALL, assert_loads_and_computes, run
from transformers import AutoModelForCausalLM

from halfbyte.quant_config import QuantConfig


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_is_quantized_and_untied(tied: bool, family: str, tmp_path: Path) -> None:
    changes = {**({} if family == "gpt2" else SMALL), "tie_word_embeddings": tied}
    config = QuantConfig(group_size=32, lm_head=True)
    model, report, checkpoint = run(tmp_path, config, family=family, changes=changes)
    assert "lm_head" in checkpoint.linears
    assert report.modules[-1].name == "lm_head"
    assert report.modules[-1].num_tokens == 6 * 32
    note = "the head was untied from the embeddings, which stay unchanged"
    assert (note in report.notes) == tied
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["quantization_config"]["lm_head"] is True
    files = checkpoint.files
    embedding = next(
        name for name in files.infos if name.endswith(("embed_tokens.weight", "wte.weight"))
    )
    assert torch.equal(files.load([embedding])[embedding], model.get_input_embeddings().weight)
    assert "lm_head.weight" not in files.infos
    assert_loads_and_computes(model, checkpoint)


def test_head_that_packed_tensors_would_not_reach_by_its_name_on_disk(tmp_path: Path) -> None:
    # Transformers renames head.weight, but not head.qweight.
    config = QuantConfig(group_size=32, lm_head=True)
    changes = {"num_hidden_layers": 1}
    model, _, checkpoint = run(tmp_path, config, family="deepseek_v4", changes=changes)
    assert "lm_head" in checkpoint.linears
    assert_loads_and_computes(model, checkpoint)


def test_head_stays_tied_by_default(tmp_path: Path) -> None:
    changes = {**SMALL, "tie_word_embeddings": True}
    model, _, checkpoint = run(tmp_path, QuantConfig(group_size=32), changes=changes)
    assert "lm_head" not in checkpoint.linears
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert_loads_and_computes(model, checkpoint)


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({"vocab_size": 120}, {}, "120 outputs are not a multiple of 32"),
        ({}, {"skip": ("lm_head",)}, "a skip pattern matches its name"),
    ],
)
def test_head_that_cannot_be_quantized_says_why(
    changes: dict[str, Any], config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model, report, checkpoint = run(
        tmp_path,
        QuantConfig(group_size=32, lm_head=True, **config),
        changes={**SMALL, **changes},
        text=[[5, 6, 7, 8] * 8, [9, 8, 7, 6] * 8],
    )
    assert f"the head was not quantized: {reason}" in report.notes
    assert not any("matches no module" in note for note in report.notes)
    assert "lm_head" not in checkpoint.linears
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
