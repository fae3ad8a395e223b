"""A Hugging Face tokenizer as GGUF pairs, so that llama.cpp cuts text as Transformers does.

Byte-level BPE becomes "gpt2" with the name of its way of cutting words; BPE with byte fallback,
which is SentencePiece's, becomes "llama" with scores that follow from the order of the merges.

Source:
    llama.cpp ``src/llama-vocab.cpp`` (names and regular expressions of the pre-tokenizers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PARTS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    ("ByteLevel+regex",): "gpt-2",
    ("Digits", "ByteLevel+regex"): "smollm",
    (f"Split {_PARTS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}", "ByteLevel"): "llama-bpe",
    (f"Split {_PARTS}|{_LETTERS}|\\p{{N}}|{_REST}", "ByteLevel"): "qwen2",
}
"""The steps of ``pre_tokenizer`` in tokenizer.json -> llama.cpp's name."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def describe_tokenizer(
    folder: Path, config: Mapping[str, Any], pre_tokenizer: str | None = None
) -> dict[str, Any]:
    """Read a folder's tokenizer.

    Args:
        folder: Holds ``tokenizer.json``.
        config: The model's; gives the size of the vocabulary and special ids.
        pre_tokenizer: llama.cpp's name of the way of cutting words; None: found out.

    Returns:
        The pairs.

    Raises:
        ConfigError: There is no tokenizer.json, or it is of a kind that is not written.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"Cannot write GGUF: {folder} has no tokenizer.json. Save the tokenizer there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or, where the source is a "
            ".gguf file, give the original model's folder with --base."
        )
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE":
        raise ConfigError(
            f"Cannot write GGUF: the tokenizer is of the type '{model.get('type')}'; written is "
            "BPE, byte-level or with byte fallback."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, kinds = _list_tokens(tokenizer, int(config["vocab_size"]))
    pairs: dict[str, Any] = {}
    if model.get("byte_fallback"):
        pairs["tokenizer.ggml.model"] = "llama"
        pairs["tokenizer.ggml.pre"] = "default"
        pairs["tokenizer.ggml.scores"] = _make_scores(tokens, model["merges"])
        pairs["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
    else:
        pairs["tokenizer.ggml.model"] = "gpt2"
        pairs["tokenizer.ggml.pre"] = pre_tokenizer or find_pre_tokenizer(tokenizer)
        pairs["tokenizer.ggml.merges"] = merges
    pairs["tokenizer.ggml.tokens"] = tokens
    pairs["tokenizer.ggml.token_type"] = kinds
    return pairs | _describe_special(folder, path, config, tokens)


def find_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Find llama.cpp's name for the way a tokenizer cuts words.

    Args:
        tokenizer: ``tokenizer.json``.

    Returns:
        The name.

    Raises:
        ConfigError: It has none that is known here; shows the steps.
    """
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    names = tuple(_name_step(step) for step in steps)
    if names not in PRE_TOKENIZERS:
        raise ConfigError(
            f"Cannot write GGUF: the tokenizer cuts words in a way without a known name in "
            f"llama.cpp ({' then '.join(names)}). Give it with --pre-tokenizer; llama.cpp lists "
            "the names in src/llama-vocab.cpp."
        )
    return PRE_TOKENIZERS[names]


def _name_step(step: Mapping[str, Any]) -> str:
    kind = str(step.get("type"))
    if kind == "ByteLevel":
        return "ByteLevel+regex" if step.get("use_regex", True) else "ByteLevel"
    if kind == "Split":
        pattern = step.get("pattern", {})
        return f"Split {pattern.get('Regex') or pattern.get('String')}"
    if kind == "Digits" and not step.get("individual_digits"):
        return "Digits in groups"
    return kind


def _list_tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Give text and kind of every id; ids without a token are padding."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [UNUSED] * size
    unknown = tokenizer["model"].get("unk_token")
    is_spm = tokenizer["model"].get("byte_fallback")
    numbers = {**tokenizer["model"]["vocab"]}
    numbers |= {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
    last = max(numbers, key=lambda text: numbers[text])
    if numbers[last] >= size:
        raise ConfigError(
            f"Cannot write GGUF: token '{last}' has the id {numbers[last]}, and the model has "
            f"{size} tokens. The tokenizer belongs to another model."
        )
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number] = text
        kinds[number] = NORMAL
        if is_spm and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[number] = BYTE
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    if is_spm and unknown in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN
    return tokens, kinds


def _make_scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Earlier merges have higher scores, as in the SentencePiece model they came from."""
    parts = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    ranks = {"".join(pair): float(-rank) for rank, pair in reversed(list(enumerate(parts)))}
    lowest = float(-len(parts))
    return [ranks.get(token, lowest) for token in tokens]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, by the normalizer or the pre-tokenizer."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(s.get("type") == "Prepend" and s.get("prepend") == SPACE for s in steps):
        return True
    step = tokenizer.get("pre_tokenizer") or {}
    return step.get("type") == "Metaspace" and step.get("prepend_scheme", "never") != "never"


def _describe_special(
    folder: Path, path: Path, config: Mapping[str, Any], tokens: list[str]
) -> dict[str, Any]:
    """Give special ids, whether they are added by themselves, and the chat template."""
    from tokenizers import Tokenizer

    settings = _read_json(folder / "tokenizer_config.json")
    numbers = {token: number for number, token in enumerate(tokens)}
    pairs: dict[str, Any] = {}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for kind, theirs in keys.items():
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(text) if isinstance(text, str) else config.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < len(tokens):
            pairs[f"tokenizer.ggml.{theirs}_token_id"] = number
    ids = Tokenizer.from_file(str(path)).encode("a").ids
    first, last = pairs.get("tokenizer.ggml.bos_token_id"), pairs.get("tokenizer.ggml.eos_token_id")
    pairs["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == first
    pairs["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == last
    template = folder / "chat_template.jinja"
    text = settings.get("chat_template")
    if template.is_file():
        text = template.read_text(encoding="utf-8")
    if isinstance(text, str) and text:
        pairs["tokenizer.chat_template"] = text
    return pairs


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
