"""Which folder a run reads, which it may write into, and whether there is work at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

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
"""Key of what a run was given: the software that it began with."""
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Which files of a model are meant, and how to fetch them; the words are Transformers'."""

    revision: str | None = None
    """Branch, tag or commit; of a name on the Hub."""
    subfolder: str = ""
    """Of the repository or of the local folder."""
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Take these options out of the settings for loading a model.

        Args:
            settings: Keyword arguments of a ``from_pretrained``; None is as not given.

        Returns:
            The options, and all other settings.
        """
        names = {field.name for field in fields(cls)}
        own = {
            name: value for name, value in settings.items() if name in names and value is not None
        }
        return cls(**own), {name: settings[name] for name in settings if name not in names}


def find_model(
    model: str | Path, hub: HubOptions = HubOptions(), *, with_code: bool = False
) -> Path:
    """Give the folder of a model: a local one, or a snapshot fetched from the Hugging Face Hub.

    Args:
        model: A folder, or a name such as ``org/model``.
        hub: Which of its files, and how to fetch them.
        with_code: Fetch the code that the repository brings, too.

    Returns:
        The folder.

    Raises:
        ModelError: There is no such folder, and it cannot be fetched.
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
    if Path(model).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"There is no model folder {model}. Give a Hugging Face model folder, or a name on the "
            "Hub such as org/model."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_PATTERNS, "*.py"] if with_code else HUB_PATTERNS
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
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {hub.revision}" if hub.revision else ""
        raise ModelError(
            f"There is no folder {model}, and it cannot be fetched from the Hugging Face Hub{at}: "
            f"{first_line(error)}. Check the name, the network and your access."
        ) from error


def check_apart(source: Path, output: Path) -> None:
    """Refuse to write into the folder of the model that is read, or under it.

    Args:
        source: The model's folder.
        output: The checkpoint's.

    Raises:
        ConfigError: It is there.
    """
    if output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"The output {output} is inside the model's own folder {source}, which is left as it "
            "is. Choose a folder outside of it."
        )


def check_output(output: Path, *, resume: bool, report_file: str = REPORT_FILE) -> bool:
    """Make sure that a run may write into a folder.

    Args:
        output: The folder.
        resume: Whether an unfinished run is to go on.
        report_file: What a complete run of this kind leaves in its folder.

    Returns:
        Whether the run that was to be resumed is complete already.

    Raises:
        ConfigError: The folder holds something else.
        JournalError: It holds an unfinished run, and it was not said to go on with it.
    """
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            where = "" if path == output else f"lies in {path}, which "
            raise ConfigError(f"The output {output} {where}is a file. Name a folder.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if (output / WORK_FOLDER / JOURNAL_FILE).is_file():
        if not resume:
            raise JournalError(
                f"{output} holds an unfinished run. Add --resume to go on with it, or remove the "
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
    """Refuse to give a complete run back for one with other inputs or options.

    Args:
        output: Of the run that is complete.
        then: What it was given.
        now: What is given now. The versions of the software may be others: nothing is computed.

    Raises:
        JournalError: Something differs; names each difference with both values.
    """
    kept, given = ({k: v for k, v in side.items() if k != VERSIONS} for side in (then, now))
    differences = describe_differences(kept, given)
    if differences:
        raise JournalError(
            f"The run in {output} is complete and was made with other inputs or options "
            f"({differences}). Choose another output folder."
        )


def check_something_to_do(weights: ModelWeights, config: QuantConfig) -> None:
    """Refuse to stream a whole model of which nothing is to be rounded, or can be.

    Args:
        weights: The model, nothing of it loaded.
        config: With the skip patterns and the group size.

    Raises:
        ConfigError: They match every linear, or it fits none; says how many.
    """
    if find_fused_experts(weights.model) or config.lm_head:
        return  # names of experts are known when they are split
    linears = {
        weights.disk_name(f"{weights.blocks.name(index)}.{name}"): linear_weight(linear).shape
        for index, block in enumerate(weights.blocks.modules)
        for name, linear in quantizable_linears(block).items()
    }
    schemes = {name: scheme for name in linears if (scheme := config.scheme_for(name))}
    if not schemes:
        raise ConfigError(
            f"The skip patterns match all {len(linears)} linears of {weights.folder.name}: nothing "
            "is left to quantize. Loosen them."
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
        f"group_size is {schemes[name].group_size}, and none of the {len(reasons)} linears of "
        f"{weights.folder.name} can be quantized so, {name} because {why}. Use another "
        "--group-size, such as 32, 64 or 128."
    )
