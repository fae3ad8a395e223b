"""Tiny quantized models that can be converted, and comparisons of two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.helpers.tiny_gptq import TinyLinear, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from halfbyte.checkpoint.read import open_checkpoint

HEADS = 4

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 260,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": True,
    "dtype": "float16",
}

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE with 256 bytes, two merges and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    vocabulary |= {"th": 258, "the": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        {"id": number, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for number, text in ((256, "<s>"), (257, "</s>"))
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


BLOCK_SHAPES = {
    "model.layers.0.input_layernorm": (64,),
    "model.layers.0.post_attention_layernorm": (64,),
    **{f"{ATTENTION}.{part}_proj": (64, 64) for part in "qkvo"},
    f"{MLP}.gate_proj": (96, 64),
    f"{MLP}.up_proj": (96, 64),
    f"{MLP}.down_proj": (64, 96),
}


def write_source(
    folder: Path,
    linears: Mapping[str, TinyLinear],
    seed: int = 0,
    *,
    is_whole: bool = False,
    **labels: object,
) -> dict[str, torch.Tensor]:
    """Write a GPTQ model; return its weights in float64 by module.

    ``is_whole`` adds the rest of the block, which GGUF requires.
    """
    weights = write_model(folder, linears, labels=labels, seed=seed)
    if is_whole:
        file = folder / "model.safetensors"
        rest = {
            f"{name}.weight": torch.ones(shape, dtype=torch.float16)
            for name, shape in BLOCK_SHAPES.items()
            if name not in linears
        }
        save_file(load_file(file) | rest, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**TINY_CONFIG, **config}))
    write_tokenizer(folder)
    return weights


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Assert that all tensors of two GPTQ checkpoints are bitwise equal."""
    one, two = open_checkpoint(first), open_checkpoint(second)
    assert set(one.files.infos) == set(two.files.infos)
    for name in one.files.infos:
        left, right = one.files.load([name])[name], two.files.load([name])[name]
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name


def assert_same_weights(first: Path, second: Path) -> None:
    """Assert that all dequantized weights of two GPTQ checkpoints are bitwise equal."""
    one, two = open_checkpoint(first), open_checkpoint(second)
    assert set(one.linears) == set(two.linears)
    for name in one.linears:
        assert torch.equal(one.dequantize(name), two.dequantize(name)), name
