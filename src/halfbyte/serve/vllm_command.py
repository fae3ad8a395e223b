"""Builds the command line of ``vllm serve`` for a checkpoint, and checks that vLLM supports it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from halfbyte.checkpoint.check import check_consumers
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.serve.text.tool_calls import HERMES, LLAMA, MISTRAL, detect_call_format

PARSERS = {HERMES.name: "hermes", MISTRAL.name: "mistral", LLAMA.name: "llama3_json"}
"""vLLM's tool call parsers, by our names of the formats."""

RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Allowed values of vLLM's --max-lora-rank; the smallest one is its default."""


def make_command(
    folder: Path,
    *,
    executable: str,
    name: str,
    template: str | None,
    template_file: Path | None = None,
    context: int | None = None,
    dtype: str = "auto",
    adapters: Path | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """Build the command line of ``vllm serve`` for a checkpoint.

    Args:
        folder: The model's folder.
        executable: ``vllm``, or its path.
        name: The model's name for clients.
        template: Source of the chat template; None: the model has none.
        template_file: File that replaces the model's chat template.
        context: Maximum length of a request in tokens; None: the model's maximum.
        dtype: Data type for the computation.
        adapters: Folder with one subfolder for each adapter; None: no adapters.
        more: Further arguments from the user, which come last.

    Returns:
        The command and its arguments, without host and port.

    Raises:
        ConfigError: The program or a folder does not exist.
    """
    path = shutil.which(executable)
    if path is None:
        raise ConfigError(
            f"Cannot start vLLM: there is no program '{executable}'. Install vLLM in a separate "
            "environment, and give its path: --vllm-command /path/to/vllm."
        )
    # "vllm" ignores the model's own sampling settings, which are not OpenAI's defaults.
    words = [
        path,
        "serve",
        str(folder),
        "--served-model-name",
        name,
        "--generation-config",
        "vllm",
    ]
    if context is not None:
        words += ["--max-model-len", str(context)]
    if dtype != "auto":
        words += ["--dtype", dtype]
    if template_file is not None:
        words += ["--chat-template", str(template_file)]
    if template is not None and "tools" in template:
        parser = PARSERS[detect_call_format(template).name]
        words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if adapters is not None:
        words += ["--enable-lora", "--max-lora-rank", str(find_rank(adapters))]
    return [*words, *more]


def check_for_vllm(folder: Path, *, has_gpu: bool) -> None:
    """Reject a checkpoint that vLLM would reject after a minute of loading.

    Args:
        folder: The model's folder.
        has_gpu: Whether vLLM will run on a GPU.

    Raises:
        ConfigError: None of vLLM's kernels supports it; with the reasons for each kernel.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return  # not GPTQ: vLLM supports formats that this program does not know
    kernels = ("vllm-marlin", "vllm-machete") if has_gpu else ("vllm-cpu",)
    verdicts = [
        verdict
        for verdict in check_consumers(checkpoint).verdicts
        if verdict.consumer in kernels and verdict.tensor_parallel == 1
    ]
    if any(verdict.loads for verdict in verdicts):
        return
    reasons = "; ".join(f"{verdict.label}: {', '.join(verdict.reasons)}" for verdict in verdicts)
    raise ConfigError(
        f"vLLM cannot load '{folder}': {reasons}. Use --engine embedded, or quantize the model "
        "again with 4 bits, symmetric, group size 64."
    )


def find_rank(adapters: Path) -> int:
    """Choose the maximum adapter rank: enough for all adapters in a folder.

    Args:
        adapters: Folder with one subfolder for each adapter.

    Returns:
        One of :data:`RANKS`.

    Raises:
        ConfigError: The folder does not exist.
    """
    if not adapters.is_dir():
        raise ConfigError(f"The folder of adapters '{adapters}' does not exist.")
    ranks = [_read_rank(file) for file in adapters.glob("*/adapter_config.json")]
    largest = max(ranks, default=0)
    return next((rank for rank in RANKS if rank >= largest), RANKS[-1])


def _read_rank(file: Path) -> int:
    """Return an adapter's largest rank; 0 if the file is invalid, which loading will report."""
    try:
        config = json.loads(file.read_bytes())
        return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {0: 0}).values()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return 0
