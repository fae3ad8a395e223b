"""The sample model, quantized once for all tests here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.peers.environments import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.data import calibration_text, evaluation_text
from halfbyte.evaluate.windows import split_windows, tokenize_text
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.sample_model import write_sample_model

SAMPLES, LENGTH = 16, 256

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time there was a small",
    "In 1969, the first people",
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint of ours, and what it is asked."""

    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def float32(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def bfloat16(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [tokenize_text(self.tokenizer, prompt).tolist() for prompt in PROMPTS]

    @cached_property
    def windows(self) -> torch.Tensor:
        """Held-out text, int64 [4, 512]."""
        return split_windows(tokenize_text(self.tokenizer, evaluation_text()), 512, limit=4).ids

    @cached_property
    @torch.no_grad()
    def reading(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What our model makes of the windows in float32: nll in nats and first choices."""
        logits = torch.cat([self.float32(ids[None]).logits for ids in self.windows])[:, :-1]
        nll = -logits.log_softmax(-1).gather(-1, self.windows[:, 1:, None])[..., 0]
        return nll, logits.argmax(-1)


@pytest.fixture(scope="session")
def sample_model():
    return write_sample_model(FOLDER / "sample-model").folder


@pytest.fixture(scope="session")
def ours(sample_model, tmp_path_factory):
    """The sample model at 4 bits, group 64, symmetric."""
    halfbyte.install_transformers()
    ids = tokenize_text(AutoTokenizer.from_pretrained(sample_model), calibration_text())
    folder = tmp_path_factory.mktemp("ours") / "sample-g64"
    halfbyte.quantize(
        sample_model,
        folder,
        config=QuantConfig(group_size=64),
        calibration=CalibrationConfig(samples=SAMPLES, length=LENGTH),
        text=ids[: SAMPLES * LENGTH].view(SAMPLES, LENGTH).tolist(),
        quality=False,
    )
    return Subject(folder=folder)
