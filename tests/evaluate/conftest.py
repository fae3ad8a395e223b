import pytest
import torch
from tests.helpers.tiny_llama import build_model, build_tokenizer


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """A base model as a Hugging Face folder."""
    path = tmp_path / "base"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(5)
    return " ".join(f"w{i}" for i in torch.randint(0, 60, (100,), generator=generator).tolist())
