"""Runs the whole pipeline on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.helpers.families import build_family, token_lists
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import halfbyte
from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
from halfbyte.model.blocks import set_linear_weight
from halfbyte.model.experts import unfuse_experts
from halfbyte.model.naming import module_key_map
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize.report import QuantizationReport

CALIBRATION = CalibrationConfig(samples=6, length=32, batch_size=3)
SMALL = {"num_hidden_layers": 2}


def quantize(base: Path, output: Path, config: QuantConfig, **changes: Any) -> QuantizationReport:
    keywords = {"calibration": CALIBRATION, "text": token_lists(6, 32), **changes}
    return halfbyte.quantize(base, output, config=config, **keywords)


def run(
    tmp_path: Path,
    config: QuantConfig,
    *,
    family: str = "llama",
    prepare: Callable[[PreTrainedModel], object] | None = None,
    changes: dict[str, Any] = SMALL,
    **keywords: Any,
) -> tuple[PreTrainedModel, QuantizationReport, Checkpoint]:
    """Write a tiny model, quantize it, and open the checkpoint."""
    model = build_family(family, **changes)
    if prepare is not None:
        prepare(model)
    model.save_pretrained(tmp_path / "base")
    report = quantize(tmp_path / "base", tmp_path / "out", config, **keywords)
    return model, report, open_checkpoint(tmp_path / "out")


@torch.no_grad()
def assert_loads_and_computes(base: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Assert that Transformers loads the checkpoint with the logits of the dequantized weights."""
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    base = base.float()
    unfuse_experts(base)
    names = module_key_map(base, [f"{name}.qweight" for name in checkpoint.linears])
    head = base.get_output_embeddings()
    if any(base.get_submodule(n.removesuffix(".qweight")) is head for n in names.values()):
        head.weight = nn.Parameter(head.weight.data.clone())
    for key, name in names.items():
        weight = checkpoint.dequantize(key.removesuffix(".qweight"))
        set_linear_weight(base.get_submodule(name.removesuffix(".qweight")), weight)
    ids = torch.tensor(token_lists(2, 24, seed=2))
    torch.testing.assert_close(loaded(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Read all files of a checkpoint by name, except those that report times."""
    reports = ("quantization_report.json", "README.md", "quantization_error.png")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in reports}
