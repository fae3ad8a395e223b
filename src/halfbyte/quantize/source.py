"""Locates and downloads the model, and checks the output folder and the work to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from halfbyte.checkpoint.labels import describe_missing_config
from halfbyte.errors import ConfigError, JournalError, ModelError, first_line
from halfbyte.model.blocks import linear_weight, quantizable_linears
from halfbyte.model.experts import find_fused_experts
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.block_plan import fit_scheme
from halfbyte.quantize.journal import JOURNAL_FILE, WORK_FOLDER, describe_differences
from halfbyte.quantize.report import REPORT_FILE

COMPLETE = "complete already; nothing was done"
VERSIONS = "versions"
"""Key, among a run's inputs, of the software versions that it was started with."""
HUB_PATTERNS = (
    *("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"),
    *("README.md", "LICENSE*"),
)
OTHER_WEIGHTS = "*/*.safetensors"
"""The same model in another format, such as ``original/``; a ``*`` of the Hub matches slashes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Which files of a model to use, and how to download them; named as in ``from_pretrained``."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    subfolder: str = ""
    """Subfolder of the repository or of the local folder."""
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Separate these options from other settings for loading a model.

        Args:
            settings: Keyword arguments of ``from_pretrained``; None means not given.

        Returns:
            The options, and all other settings.
        """
        names = {field.name for field in fields(cls)}
        options = {
            name: value for name, value in settings.items() if name in names and value is not None
        }
        return cls(**options), {name: settings[name] for name in settings if name not in names}


def find_model(
    model: str | Path, hub: HubOptions = HubOptions(), *, with_code: bool = False
) -> Path:
    """Return the folder of a model, downloading it from the Hugging Face Hub if it is not local.

    Args:
        model: A folder, or a name such as ``org/model``.
        hub: Which of its files to use, and how to download them.
        with_code: Also download the repository's Python code.

    Returns:
        The folder.

    Raises:
        ModelError: There is no such folder, and it cannot be downloaded.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _fetch(model, hub, with_code)
    folder = path / hub.subfolder
    if not folder.is_dir():
        raise ModelError(f"The model {model} has no subfolder {hub.subfolder}.")
    return folder


def _fetch(model: str | Path, hub: HubOptions, with_code: bool) -> Path:
    name = str(model)
    if Path(model).exists():
        found = describe_missing_config(Path(model))
        raise ModelError(
            f"Cannot use {model} as a model: {found}. Give a Hugging Face model folder."
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"There is no model folder {model}. Give a Hugging Face model folder, or a name on the "
            "Hub such as org/model."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = (*HUB_PATTERNS, "*.py") if with_code else HUB_PATTERNS
    try:
        return Path(
            snapshot_download(
                name,
                revision=hub.revision,
                cache_dir=hub.cache_dir,
                token=hub.token,
                local_files_only=hub.local_files_only,
                force_download=hub.force_download,
                allow_patterns=[str(Path(hub.subfolder, pattern)) for pattern in patterns],
                ignore_patterns=str(Path(hub.subfolder, OTHER_WEIGHTS)),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {hub.revision}" if hub.revision else ""
        raise ModelError(
            f"There is no folder {model}, and it cannot be fetched from the Hugging Face Hub{at}: "
            f"{first_line(error)}. Check the name, the network and your access."
        ) from error


def check_output(output: Path, *, resume: bool, report_file: str = REPORT_FILE) -> bool:
    """Check that a run may write into a folder.

    Args:
        output: The folder.
        resume: Whether an unfinished run is to be resumed.
        report_file: Name of the report that a complete run of this kind writes.

    Returns:
        Whether the run to be resumed is already complete.

    Raises:
        ConfigError: The folder holds other files, or the path is a file.
        JournalError: It holds an unfinished run, and ``resume`` is false.
    """
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            where = "" if path == output else f"lies in {path}, which "
            raise ConfigError(f"The output {output} {where}is a file. Name a folder.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if (output / WORK_FOLDER / JOURNAL_FILE).is_file():
        if not resume:
            raise JournalError(
                f"{output} holds an unfinished run. Add --resume to continue it, or remove the "
                "folder to start again."
            )
        return False
    if resume and report_file in names:
        return True
    if names - {WORK_FOLDER}:
        raise ConfigError(
            f"The output folder {output} is not empty ({len(names)} files, such as {min(names)}). "
            "Choose a new folder, or remove this one."
        )
    return False


def check_same_inputs(output: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a complete run had the same inputs and options as those given now.

    Args:
        output: The folder of the complete run.
        then: Its inputs.
        now: The inputs given now. Software versions may differ, because nothing is computed.

    Raises:
        JournalError: An input differs; names each difference with both values. Or the inputs are
            not known.
    """
    if not then:
        raise JournalError(
            f"The run in {output} is complete. Its report, by an earlier version of halfbyte, does "
            "not say which inputs and options it had. Use the folder as it is, or choose another "
            "output folder to run again."
        )
    kept, given = ({k: v for k, v in side.items() if k != VERSIONS} for side in (then, now))
    differences = describe_differences(kept, given)
    if differences:
        raise JournalError(
            f"The run in {output} is complete and was made with other inputs or options "
            f"({differences}). Choose another output folder."
        )


def check_something_to_do(weights: ModelWeights, config: QuantConfig) -> None:
    """Check, before streaming a model, that at least one linear will be quantized.

    Args:
        weights: The model; nothing needs to be loaded.
        config: The configuration, with skip patterns and group size.

    Raises:
        ConfigError: The skip patterns match every linear, or the group size fits none.
    """
    if find_fused_experts(weights.model) or config.lm_head:
        return  # the names of experts are known only once they are split
    linears = {
        weights.disk_name(f"{weights.blocks.name(index)}.{name}"): linear_weight(linear).shape
        for index, block in enumerate(weights.blocks.modules)
        for name, linear in quantizable_linears(block).items()
    }
    schemes = {name: scheme for name in linears if (scheme := config.scheme_for(name))}
    if not schemes:
        raise ConfigError(
            f"The skip patterns match all {len(linears)} linears of {weights.folder.name}: nothing "
            "is left to quantize. Remove a pattern or make it match less."
        )
    reasons = {}
    for name, scheme in schemes.items():
        rows, columns = linears[name]
        fitted, why = fit_scheme(scheme, columns, rows, ragged_groups=config.ragged_groups)
        if fitted is not None:
            return
        reasons[name] = why
    name, why = next(iter(reasons.items()))
    raise ConfigError(
        f"group_size is {schemes[name].group_size}, but none of the {len(reasons)} linears of "
        f"{weights.folder.name} can be quantized with it, for example {name} because {why}. Use "
        "another --group-size, such as 32, 64 or 128."
    )
