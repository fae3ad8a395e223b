"""Loads the model to measure, with its tokenizer and its limits.

GPTQ folders load like any other, because ``import halfbyte`` registers the format in Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.labels import describe_missing_config
from halfbyte.checkpoint.shards import explain_missing_weights
from halfbyte.data import evaluation_text
from halfbyte.errors import CheckpointError, ConfigError, HalfbyteError, ModelError, first_line
from halfbyte.evaluate.windows import DEFAULT_WINDOW, Windows, split_windows, tokenize_text
from halfbyte.machine.devices import resolve_device
from halfbyte.model.context_length import max_context_length
from halfbyte.run_config import DTYPES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder with one of these files has a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A loaded model to measure, with its tokenizer."""

    name: str
    """Folder or class of the model, for messages."""
    model: Any
    tokenizer: Any
    """None if neither the caller nor the folder has one."""

    @property
    def dtype_name(self) -> str:
        """Compute dtype of the model, for example "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def input_device(self) -> torch.device:
        """Device of the token ids."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def vocabulary(self) -> int | None:
        """Size of the vocabulary; None if the config does not say."""
        size = getattr(_text_config(self.model), "vocab_size", None)
        return size if isinstance(size, int) else None

    @property
    def longest(self) -> int | None:
        """Context length in tokens; None if the model has no limit."""
        return max_context_length(_text_config(self.model))


def open_subject(
    model: Any | str | Path,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> Subject:
    """Wrap a loaded model, or load one from a folder.

    Args:
        model: A Hugging Face model, or a folder.
        tokenizer: Used instead of the folder's.
        dtype: Compute dtype for a folder; "auto": float32 on a CPU, as stored elsewhere.
        device: Device for a folder; "auto": the first GPU, or the CPU.

    Returns:
        The model, in evaluation mode, with its tokenizer.

    Raises:
        ConfigError: The dtype is unknown, or there is no such device.
        ModelError: Transformers cannot load the folder; says why.
    """
    if not isinstance(model, str | Path):
        model.eval()
        return Subject(name=type(model).__name__, model=model, tokenizer=tokenizer)
    folder = Path(model)
    check_folder(folder)
    resolved = resolve_device(device)
    return Subject(
        name=str(folder),
        model=_load_model(folder, _resolve_dtype(dtype, resolved), resolved),
        tokenizer=tokenizer if tokenizer is not None else load_tokenizer(folder),
    )


def check_folder(folder: Path) -> None:
    """Reject a folder without a model, or with weights only in pickle files.

    Args:
        folder: A Hugging Face folder.

    Raises:
        ModelError: There is no such folder, or no config.json in it.
        CheckpointError: It has no weights in safetensors.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"Cannot load the model '{folder}': {describe_missing_config(folder)}. Give a folder "
            "written by save_pretrained or halfbyte, or a downloaded Hugging Face repository."
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(explain_missing_weights(folder))


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer.

    Args:
        folder: A Hugging Face folder.

    Returns:
        The tokenizer, or None if the folder has none.

    Raises:
        ModelError: Its files are damaged.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"Cannot load the tokenizer of '{folder}': {first_line(error)}. Copy the tokenizer "
            "files of the original model into the folder."
        ) from error


def resolve_windows(
    subject: Subject,
    text: str | Tensor | Sequence[int] | None,
    *,
    window: int | None,
    limit: int | None,
    add_bos: bool,
    second: Subject | None = None,
) -> Windows:
    """Tokenize a text and split it into windows that the models can take.

    Args:
        subject: The model; its tokenizer encodes the text.
        text: A text, token ids, or None for the text that ships with halfbyte.
        window: Tokens per window; None: 2048, or the models' context length if that is shorter.
        limit: Use at most this many windows; None: all.
        add_bos: Add a BOS token at the start of the text.
        second: A second model that gets the same windows.

    Returns:
        The windows.

    Raises:
        ConfigError: There is no tokenizer, a window exceeds a model's context length, an id is
            outside a vocabulary, or the text is too short.
    """
    subjects = [subject] if second is None else [subject, second]
    limits = [s.longest for s in subjects if s.longest is not None]
    if window is None:
        window = min([DEFAULT_WINDOW, *limits])
    for one in subjects:
        if one.longest is not None and window > one.longest:
            raise ConfigError(
                f"Cannot measure '{one.name}' on windows of {window} tokens: it takes at most "
                f"{one.longest}. Use window {one.longest} or less."
            )
    windows = split_windows(_token_ids(subject, text, add_bos), window, limit=limit)
    for one in subjects:
        _check_ids(one, windows.ids)
    return windows


def check_same_tokenizer(
    base: Subject, quantized: Subject, text: str | Tensor | Sequence[int] | None
) -> None:
    """Reject two models whose tokenizers encode the text differently.

    Args:
        base: The base.
        quantized: The quantized model; accepted if it has no tokenizer.
        text: The text to measure on; None: the one that ships with halfbyte. Token ids are accepted
            without a check.

    Raises:
        ConfigError: The token ids differ; says where first.
    """
    if text is None:
        text = evaluation_text()
    if not isinstance(text, str) or base.tokenizer is None or quantized.tokenizer is None:
        return
    base_ids = tokenize_text(base.tokenizer, text)
    quantized_ids = tokenize_text(quantized.tokenizer, text)
    if torch.equal(base_ids, quantized_ids):
        return
    common = min(len(base_ids), len(quantized_ids))
    differing = (base_ids[:common] != quantized_ids[:common]).nonzero()
    first = int(differing[0]) if len(differing) else common
    raise ConfigError(
        f"Cannot compare '{base.name}' with '{quantized.name}': their tokenizers give "
        f"{len(base_ids)} and {len(quantized_ids)} tokens for the same text, which differ from "
        f"token {first} on. Compare a model with its own quantized version."
    )


@contextmanager
def explain_loading(folder: Path) -> Iterator[None]:
    """Turn Transformers' errors about a model, such as a missing package, into ModelErrors.

    Args:
        folder: The model that is loaded inside.

    Raises:
        HalfbyteError: Loading raised it.
        ModelError: Loading raised another error.
    """
    from safetensors import SafetensorError

    try:
        yield
    except HalfbyteError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"Cannot load the model '{folder}' through Transformers: {first_line(error)}. "
            "Check that the folder is complete and holds a causal language model."
        ) from error


def _load_model(folder: Path, dtype: torch.dtype | str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    # Transformers loads to the CPU by default; a device map would need accelerate.
    placement = {} if device.type == "cpu" else {"device_map": {"": device}}
    with explain_loading(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, **placement
        )
    return model.eval()


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """Resolve "auto": float32 on a CPU, where it is no slower than 16 bits and more exact."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype is '{dtype}'; allowed are {', '.join(DTYPES)}. Use auto if unsure."
        )
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def _token_ids(
    subject: Subject, text: str | Tensor | Sequence[int] | None, add_bos: bool
) -> Tensor | Sequence[int]:
    if text is None:
        text = evaluation_text()
    if not isinstance(text, str):
        return text
    if subject.tokenizer is None:
        raise ConfigError(
            f"Cannot tokenize the text for '{subject.name}': it has no tokenizer. "
            "Pass tokenizer=..., or token ids instead of the text."
        )
    return tokenize_text(subject.tokenizer, text, add_bos=add_bos)


def _check_ids(subject: Subject, ids: Tensor) -> None:
    vocabulary = subject.vocabulary
    if vocabulary is None:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ConfigError(
            f"Cannot measure '{subject.name}': the text has token id {low if low < 0 else high}; "
            f"the model's vocabulary is 0..{vocabulary - 1}. Use the model's own tokenizer."
        )


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
