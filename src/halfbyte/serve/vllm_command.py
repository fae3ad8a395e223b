"""The command line of ``vllm serve`` for a checkpoint, and whether vLLM takes it at all."""

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
"""Our names of the forms of tool calls -> vLLM's."""

RANKS = (16, 32, 64, 128, 256, 320, 512)
"""That vLLM's --max-lora-rank may be; the least is its default."""


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
    """Write the command line of ``vllm serve`` for a checkpoint.

    Args:
        folder: Of the model.
        executable: ``vllm``, or where it is.
        name: That clients call it by.
        template: Source of its chat template; None: it has none.
        template_file: Where that takes the place of the model's own.
        context: Longest request in tokens; None: as long as the model has positions.
        dtype: To compute in.
        adapters: Holds a folder for each adapter that may be loaded; None: none may.
        more: Arguments of the user, which come last.

    Returns:
        The words, without host and port.

    Raises:
        ConfigError: There is no such program, or folder.
    """
    found = shutil.which(executable)
    if found is None:
        raise ConfigError(
            f"There is no program '{executable}'. Install vLLM in an environment of its own, and "
            "say where it is: --vllm-command /path/to/vllm."
        )
    # The model's own sampling settings would not be OpenAI's defaults.
    words = [
        found,
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
    """Refuse a checkpoint that vLLM would refuse after a minute of loading.

    Args:
        folder: Of the model.
        has_gpu: Whether vLLM will run on one.

    Raises:
        ConfigError: None of vLLM's kernels takes it, with the reasons of each.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return  # Not GPTQ: vLLM knows more kinds of models than this program.
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
        f"vLLM cannot load '{folder}': {reasons}. Serve it with --engine embedded, or quantize it "
        "again with 4 bits, symmetric, groups of 64."
    )


def find_rank(adapters: Path) -> int:
    """Choose the most that an adapter's rank may be: enough for those that are there now.

    Args:
        adapters: Holds one folder for each adapter.

    Returns:
        One of :data:`RANKS`.

    Raises:
        ConfigError: There is no such folder.
    """
    if not adapters.is_dir():
        raise ConfigError(f"The folder of adapters '{adapters}' does not exist.")
    found = [_read_rank(file) for file in adapters.glob("*/adapter_config.json")]
    most = max(found, default=0)
    return next((rank for rank in RANKS if rank >= most), RANKS[-1])


def _read_rank(file: Path) -> int:
    """Give an adapter's largest rank; 0 where it is none, which it is told when it is loaded."""
    try:
        config = json.loads(file.read_bytes())
        return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {0: 0}).values()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return 0
