"""Small model folders for a store."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CARD = "---\nlicense: mit\nbase_model: org/base\n---\n\n# Model\n"


def write_folder(folder: Path, seed: int = 0, *, card: str | None = CARD) -> Path:
    """Weights of a kilobyte, a config, a report and a card."""
    folder.mkdir(parents=True, exist_ok=True)
    values = torch.randn(256, generator=torch.Generator().manual_seed(seed))
    save_file({"x": values}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    report = {
        "config": {"bits": 4, "group_size": 64 + seed},
        "calibration": {"digest": f"{seed:064x}"},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "quantization_report.json").write_text(json.dumps(report))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def write_verdict(path: Path, verdict: str) -> Path:
    path.write_text(json.dumps({"verdict": verdict, "flips": 3}))
    return path
