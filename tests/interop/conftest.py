"""The sample model and a tiny one, quantized once for all tests here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.peers.environments import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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


OURS = {
    "group 64": QuantConfig(group_size=64),
    "group 128, ragged": QuantConfig(group_size=128, ragged_groups=True),
    "group 32": QuantConfig(group_size=32),
    "group 16": QuantConfig(group_size=16),
    "asymmetric": QuantConfig(group_size=64, symmetric=False),
    "desc_act": QuantConfig(group_size=64, desc_act=True),
    "desc_act, ragged, asymmetric": QuantConfig(
        group_size=128, ragged_groups=True, desc_act=True, symmetric=False
    ),
    "one group per row": QuantConfig(group_size=-1),
    "8 bits": QuantConfig(group_size=64, bits=8),
    "3 bits": QuantConfig(group_size=64, bits=3),
    "2 bits, asymmetric": QuantConfig(group_size=32, bits=2, symmetric=False),
    "two layers of 8 bits": QuantConfig(
        group_size=64, overrides=(halfbyte.Override(pattern="v_proj", bits=8),)
    ),
    "one layer left in 16 bits": QuantConfig(group_size=64, skip=(r"layers\.1\.mlp\.down_proj",)),
}
"""For the tiny model, whose widths 128 does not divide: 192 = 128 + 64."""

IDS = torch.randint(3, 512, (8, 128), generator=torch.Generator().manual_seed(0))


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


@pytest.fixture(scope="session")
def tiny(sample_model, tmp_path_factory):
    """Two blocks of random weights, whose widths 128 does not divide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=512,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    # GPTQModel loads nothing without a tokenizer; it is not used.
    AutoTokenizer.from_pretrained(sample_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ours_tiny(tiny, tmp_path_factory):
    """The tiny model, quantized by us in every way; folders by the names of OURS."""
    halfbyte.install_transformers()
    folder = tmp_path_factory.mktemp("ours-tiny")
    checkpoints = {name: folder / f"{i}" for i, name in enumerate(OURS)}
    calibration = CalibrationConfig(samples=len(IDS), length=IDS.shape[1])
    for name, config in OURS.items():
        halfbyte.quantize(
            tiny,
            checkpoints[name],
            config=config,
            calibration=calibration,
            text=IDS.tolist(),
            quality=False,
        )
    return checkpoints
