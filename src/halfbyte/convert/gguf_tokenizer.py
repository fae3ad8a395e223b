"""Convert a Hugging Face tokenizer to GGUF metadata, for the same tokenization in llama.cpp.

Byte-level BPE becomes "gpt2" with the name of a pre-tokenizer; BPE with byte fallback, as in
SentencePiece, becomes "llama" with scores derived from the order of the merges.

Source:
    llama.cpp ``src/llama-vocab.cpp`` (names and regular expressions of the pre-tokenizers).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoint.companions import EXTRA_TEMPLATES_FOLDER
from halfbyte.checkpoint.header import parse_json_object
from halfbyte.convert.gguf_fields import require_number
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
"""llama.cpp's pre-tokenizer name by the steps of ``pre_tokenizer`` in tokenizer.json."""
_ALWAYS_MERGING = {"llama-bpe": "dbrx"}
"""Equivalents of pre-tokenizers with ``ignore_merges`` (whole words are looked up before merging)
that always merge."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_SPACED = ({"type": "Prepend", "prepend": SPACE},
           {"type": "Replace", "pattern": {"String": " "}, "content": SPACE})  # fmt: skip
"""Normalizers of SentencePiece that llama.cpp applies too."""
_UNICODE = ("NFC", "NFKC", "Precompiled")
"""Normalizers that do not change most text, so that a note is enough."""


DEFAULT, CHAT_TEMPLATE = "default", "chat_template.jinja"


def describe_tokenizer(
    folder: Path, config: Mapping[str, Any], pre_tokenizer: str | None = None
) -> dict[str, Any]:
    """Describe a folder's tokenizer as GGUF metadata.

    Args:
        folder: Folder with ``tokenizer.json``.
        config: The model config: vocabulary size and special token ids.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer; None to detect it.

    Returns:
        The key-value pairs.

    Raises:
        ConfigError: There is no tokenizer.json, or its kind is not supported.
        CheckpointError: tokenizer_config.json is not JSON.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"Cannot write GGUF: the folder {folder} has no tokenizer.json. Save the tokenizer "
            "there with AutoTokenizer.from_pretrained(...).save_pretrained(...), or, where the "
            "source is a .gguf file, give the original model's folder with --base."
        )
    loaded, tokenizer = _load(path)
    model, kind = tokenizer["model"], type(loaded.model).__name__
    if kind != "BPE" or not model["merges"]:
        what = f"is of the type '{kind}'" if kind != "BPE" else "has no merges"
        raise ConfigError(
            f"Cannot write GGUF: the tokenizer {what}; only BPE is supported, byte-level or with "
            "byte fallback. Choose another format."
        )
    _check_normalizers(tokenizer)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, kinds = _list_tokens(tokenizer, require_number(config, "vocab_size", int))
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
    settings = _read_json(folder / "tokenizer_config.json")
    pairs |= _describe_special(settings, loaded, config, tokens)
    return pairs | _describe_templates(folder, settings)


def list_tokenizer_limitations(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """List the differences between a tokenizer and what llama.cpp does.

    Args:
        folder: Folder with ``tokenizer.json``.
        config: The model config.

    Returns:
        The notes.
    """
    _, tokenizer = _load(folder / "tokenizer.json")
    notes = []
    found = [step["type"] for step in _list_normalizers(tokenizer) if step["type"] in _UNICODE]
    if found:
        notes.append(
            f"the tokenizer normalizes Unicode ({', '.join(found)}), but llama.cpp does not: "
            "combining accents are tokenized differently"
        )
    size = require_number(config, "vocab_size", int)
    beyond = [added["content"] for added in _list_added(tokenizer) if added["id"] >= size]
    if beyond:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        notes.append(
            f"left out of the tokenizer: {beyond[0]}{more}, with ids beyond the model's {size} "
            "tokens"
        )
    return tuple(notes)


def find_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Find llama.cpp's name of a tokenizer's pre-tokenizer.

    Args:
        tokenizer: ``tokenizer.json``.

    Returns:
        The name.

    Raises:
        ConfigError: The pre-tokenizer is unknown; shows its steps.
    """
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    names = tuple(_name_step(step) for step in steps)
    if names not in PRE_TOKENIZERS:
        raise ConfigError(
            f"Cannot write GGUF: llama.cpp's name of the tokenizer's pre-tokenizer is unknown "
            f"({' then '.join(names)}). Give it with --pre-tokenizer; llama.cpp lists the names "
            "in src/llama-vocab.cpp."
        )
    found, model = PRE_TOKENIZERS[names], tokenizer.get("model") or {}
    return found if model.get("ignore_merges") else _ALWAYS_MERGING.get(found, found)


def _name_step(step: Mapping[str, Any]) -> str:
    """Name a pre-tokenizer step by all of its settings that change the result."""
    kind = str(step.get("type"))
    if kind == "ByteLevel":
        prefix = " with a space in front" if step.get("add_prefix_space") else ""
        return ("ByteLevel+regex" if step.get("use_regex", True) else "ByteLevel") + prefix
    if kind == "Split":
        pattern, behavior = step.get("pattern", {}), step.get("behavior")
        # These two are equivalent if the pattern matches all text, as all known ones do.
        is_usual = (behavior, bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
        suffix = "" if is_usual else f" ({behavior}, inverted or not)"
        return f"Split {pattern.get('Regex') or pattern.get('String')}{suffix}"
    if kind == "Digits" and not step.get("individual_digits"):
        return "Digits in groups"
    return kind


def _load(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Read tokenizer.json with the tokenizers library and as JSON."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)), json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"Cannot write GGUF: {path} is not a valid tokenizer ({error}). Download it again, or "
            "save the tokenizer there with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        ) from error


def _list_normalizers(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the normalizers of a tokenizer, with sequences flattened."""
    steps = [tokenizer.get("normalizer") or {"type": "Sequence", "normalizers": []}]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [part for step in steps for part in step.get("normalizers", [step])]
    return steps


def _check_normalizers(tokenizer: Mapping[str, Any]) -> None:
    known = _SPACED if tokenizer["model"].get("byte_fallback") else ()
    others = [
        step["type"]
        for step in _list_normalizers(tokenizer)
        if step not in known and step["type"] not in _UNICODE
    ]
    if others:
        raise ConfigError(
            f"Cannot write GGUF: the tokenizer normalizes text ({', '.join(others)}), which "
            "llama.cpp does not. Choose another format."
        )


def _list_tokens(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return text and kind of every token id; ids without a token become padding."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [UNUSED] * size
    unknown = tokenizer["model"].get("unk_token")
    is_spm = tokenizer["model"].get("byte_fallback")
    numbers = tokenizer["model"]["vocab"]
    last = max(numbers, key=lambda text: numbers[text])
    if numbers[last] >= size:
        raise ConfigError(
            f"Cannot write GGUF: token '{last}' has the id {numbers[last]}, but the model has only "
            f"{size} tokens. The tokenizer belongs to another model."
        )
    for text, number in numbers.items():
        tokens[number] = text
        kinds[number] = NORMAL
        if is_spm and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[number] = BYTE
    for added in _list_added(tokenizer):
        if added["id"] < size:  # text-only Gemma 3 models have no embedding of the image token
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    if is_spm and unknown in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN
    return tokens, kinds


def _list_added(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return tokenizer.get("added_tokens") or []


def _make_scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Compute scores: earlier merges have higher ones, as in the original SentencePiece model."""
    parts = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    ranks = {"".join(pair): float(-rank) for rank, pair in reversed(list(enumerate(parts)))}
    lowest = float(-len(parts))
    return [ranks.get(token, lowest) for token in tokens]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the normalizer or the pre-tokenizer adds a space before a text."""
    if _SPACED[0] in _list_normalizers(tokenizer):
        return True
    step = tokenizer.get("pre_tokenizer") or {}
    return step.get("type") == "Metaspace" and step.get("prepend_scheme", "never") != "never"


def _describe_special(
    settings: Mapping[str, Any], loaded: Tokenizer, config: Mapping[str, Any], tokens: list[str]
) -> dict[str, Any]:
    """Describe the special tokens, and which of them are added automatically."""
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
    ids = loaded.encode("a").ids
    first, last = pairs.get("tokenizer.ggml.bos_token_id"), pairs.get("tokenizer.ggml.eos_token_id")
    pairs["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == first
    pairs["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == last
    return pairs


def _describe_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the chat templates: the default one and any others.

    Template files take precedence over tokenizer_config.json, as in Transformers.

    Source:
        llama.cpp ``gguf-py/gguf/gguf_writer.py``, ``add_chat_template`` (keys and their names).
    """
    value = settings.get("chat_template")
    listed = value if isinstance(value, list) else [{"name": DEFAULT, "template": value}]
    templates = {
        entry.get("name"): entry.get("template") for entry in listed if isinstance(entry, dict)
    }
    files = {DEFAULT: folder / CHAT_TEMPLATE}
    files |= {path.stem: path for path in sorted((folder / EXTRA_TEMPLATES_FOLDER).glob("*.jinja"))}
    templates |= {
        name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()
    }
    pairs: dict[str, Any] = {}
    names = []
    for name, text in templates.items():
        if not (isinstance(name, str) and isinstance(text, str) and text):
            continue
        if name == DEFAULT:
            pairs["tokenizer.chat_template"] = text
            continue
        names.append(re.sub("[^A-Za-z0-9]", "_", name))
        pairs[f"tokenizer.chat_template.{names[-1]}"] = text
    return pairs | ({"tokenizer.chat_templates": names} if names else {})


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json_object(path.read_bytes(), str(path)) if path.is_file() else {}
