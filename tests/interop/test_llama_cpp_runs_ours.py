"""Our GGUF files in llama.cpp's own library: the same tokens from a text, the same answers."""

from __future__ import annotations

import subprocess

import pytest
import torch
from bench.peers.environments import PEERS
from tests.helpers.checkpoints import Recipe, write_checkpoint
from tests.helpers.families import FAMILIES
from tests.interop.greedy import check_is_greedy
from tests.interop.peers import needs, peer_environ
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte
from halfbyte.checkpoint.companions import copy_companions
from halfbyte.convert import gguf_write
from halfbyte.convert.gguf_architecture import ARCHITECTURES
from halfbyte.convert.gguf_file import F32
from halfbyte.convert.run import ConversionConfig, convert

PEER = PEERS["llamacpp"]

pytestmark = [pytest.mark.interop, needs("llamacpp")]

NEW_TOKENS = 32
TEXTS = (
    "The capital of France is",
    "Water boils at 100 degrees\n\n  and 3.14159 is pi",
    "Héllo wörld 你好 123456, tabs\tand    spaces",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
)


def ask(model, questions, count=NEW_TOKENS):
    done = subprocess.run(
        [PEER.folder / "bin" / PEER.builds, model, str(count)],
        input="\n".join(questions) + "\n",
        env=peer_environ(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]


def continue_ids(model, prompts, count=NEW_TOKENS):
    """Give the tokens and their logits for each prompt."""
    lines = ask(model, ["ids " + " ".join(map(str, prompt)) for prompt in prompts], count)
    pairs = [[word.split(":") for word in line] for line in lines]
    return [([int(i) for i, _ in line], [float(x) for _, x in line]) for line in pairs]


@pytest.fixture
def in_float32(monkeypatch):
    """Write linears as the numbers that their codes stand for: llama.cpp then rounds nothing."""
    kinds = lambda specs, options: (dict.fromkeys(specs, F32), {})  # noqa: E731
    monkeypatch.setattr(gguf_write, "choose_types", kinds)


def test_text_becomes_the_same_tokens(ours, tmp_path):
    report = convert(ours.folder, tmp_path / "x.gguf", config=ConversionConfig(to="gguf"))
    found = ask(report.output, ["text " + text.replace("\n", "\\n") for text in TEXTS])
    assert [[int(word) for word in line] for line in found] == [
        ours.tokenizer(text)["input_ids"] for text in TEXTS
    ]


def test_answers_are_ours_but_for_the_rounding_of_activations(ours, tmp_path):
    """llama.cpp rounds what goes into a Q4_0 layer to 8 bits, about as bfloat16 does."""
    report = convert(ours.folder, tmp_path / "x.gguf", config=ConversionConfig(to="gguf"))
    assert report.is_exact
    others = 0
    replies = continue_ids(report.output, ours.prompts)
    for prompt, (reply, _) in zip(ours.prompts, replies, strict=True):
        others += check_is_greedy(ours.float32, ours.bfloat16, prompt, reply)
    assert others <= 0.1 * NEW_TOKENS * len(ours.prompts)


@torch.no_grad()
def test_the_same_numbers_in_float32_give_the_same_logits(ours, tmp_path, in_float32):
    """All that is left is the 16-bit embedding, by which llama.cpp multiplies in bfloat16."""
    report = convert(ours.folder, tmp_path / "x.gguf", config=ConversionConfig(to="gguf"))
    replies = continue_ids(report.output, ours.prompts)
    for prompt, (reply, logits) in zip(ours.prompts, replies, strict=True):
        ids = torch.tensor([[*prompt, *reply]])
        exact = ours.float32(ids).logits[0, len(prompt) - 1 : -1]
        chosen = exact.gather(-1, torch.tensor(reply)[:, None])[:, 0]
        assert (chosen - torch.tensor(logits)).abs().max() < 0.1
        assert (exact.amax(-1) - chosen).max() < 0.1


CHANGES = {
    "mistral": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.03,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt_neox": {"hidden_act": "gelu_new"},
}
"""Windows that llama.cpp has not are left out; what a family alone has is made to matter."""


def stretch(original):
    """Positions of Phi 3 for long contexts; texts longer than ``original`` get the long factors."""
    factors = torch.linspace(1, 3, 16).tolist()
    return {
        "max_position_embeddings": 4 * original,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [2 * factor for factor in factors],
        },
    }


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}

CASES = [
    *((found.model_class, found.model_type, {}) for found in ARCHITECTURES),
    *(
        (f"{found.model_class} with a tied head", found.model_type, {"tie_word_embeddings": True})
        for found in ARCHITECTURES
        if not found.ties_embeddings
    ),
    ("Phi3 within its first length", "phi3", stretch(2048)),
    ("Phi3 beyond its first length", "phi3", stretch(16)),
    ("Llama with YaRN", "llama", {"rope_parameters": YARN}),
    (
        "Llama with YaRN and mscale",
        "llama",
        {
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    (
        "Qwen2 with YaRN and its own growth",
        "qwen2",
        {
            "rope_parameters": {**YARN, "attention_factor": 1.7},
        },
    ),
    ("GPTNeoX one after another", "gpt_neox", {"use_parallel_residual": False}),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "family", "more"), CASES, ids=[case[0] for case in CASES])
def test_every_family_computes_the_same(name, family, more, sample_model, tmp_path, in_float32):
    wide = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 128}
    facts = {**FAMILIES[family], "vocab_size": 49152, **wide, **CHANGES.get(family, {}), **more}
    if "head_dim" in facts:
        facts["head_dim"] = 32
    config = AutoConfig.for_model(family, **facts)
    halfbyte.install_transformers()
    write_checkpoint(tmp_path / "a", config, Recipe(dtype=torch.float32))
    write = tmp_path / "a"
    kept = {path.name: path.read_bytes() for path in write.iterdir()}
    copy_companions(sample_model, write)
    (write / "config.json").write_bytes(kept["config.json"])
    convert(write, tmp_path / "x.gguf", config=ConversionConfig(to="gguf"))
    prompt = list(range(10, 30))
    ((reply, logits),) = continue_ids(tmp_path / "x.gguf", [prompt], 8)
    model = AutoModelForCausalLM.from_pretrained(write, dtype=torch.float32)
    exact = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    assert exact.argmax(-1).tolist() == reply
    chosen = exact.gather(-1, torch.tensor(reply)[:, None])[:, 0]
    torch.testing.assert_close(chosen, torch.tensor(logits), rtol=0, atol=1e-3)
