"""PEFT's adapters on a base of ours: a new one to train, or a finished one to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError, require_extra
from halfbyte.evaluate.loading import Subject
from halfbyte.finetune.config import ALL_LINEAR, QALORA, AdapterConfig

CONFIG_FILE = "adapter_config.json"
PEFT_VARIANTS: dict[str, dict[str, bool]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    # To PEFT an ordinary one: groups.py does the rest.
    QALORA: {},
}


def require_peft(purpose: str) -> None:
    """Make sure that PEFT is there.

    Args:
        purpose: What it is needed for, for the message.

    Raises:
        MissingExtraError: It is not; the message has the install command.
    """
    with require_extra("peft", "finetune", purpose):
        import peft  # noqa: F401 - looked for before a model is loaded


def check_adapter(folder: str | Path) -> None:
    """Make sure that a folder holds an adapter: PEFT would look for any other name on the Hub.

    Args:
        folder: PEFT's.

    Raises:
        ConfigError: It holds none.
    """
    if not (Path(folder) / CONFIG_FILE).is_file():
        found = f"no {CONFIG_FILE} in it" if Path(folder).is_dir() else "no such folder"
        raise ConfigError(
            f"There is no adapter in {folder}: {found}. Give the folder of a PEFT adapter, such as "
            "halfbyte finetune or halfbyte repair writes."
        )


def attach_adapter(model: Any, adapter: AdapterConfig, start_from: str | Path | None = None) -> Any:
    """Put an adapter to be trained on a model, whose own weights are frozen.

    Args:
        model: Changed in place.
        adapter: What to make.
        start_from: An adapter's folder, taken instead.

    Returns:
        PEFT's model.

    Raises:
        ConfigError: The model has no such linears, or the folder no such adapter.
    """
    import peft

    model.requires_grad_(False)
    try:
        if start_from is not None:
            return peft.PeftModel.from_pretrained(model, str(start_from), is_trainable=True)
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=list(adapter.targets) or ALL_LINEAR,
                bias="none",
                task_type="CAUSAL_LM",
                **PEFT_VARIANTS[adapter.variant],
            ),
        )
    except (ValueError, OSError, RuntimeError) as error:
        what, advice = "an adapter", "Name linears of this model with --target, or none for all."
        if start_from is not None:
            what, advice = f"the adapter {start_from}", "Give one that was trained on this model."
        raise ConfigError(
            f"Cannot put {what} on a {type(model).__name__}: {_sentence(error)} {advice}"
        ) from error


def load_adapter(subject: Subject, adapter: str | Path) -> Any:
    """Put a finished adapter on its base.

    Args:
        subject: The base.
        adapter: PEFT's folder.

    Returns:
        PEFT's model, in evaluation mode.

    Raises:
        ConfigError: It is none, or does not fit.
    """
    import peft

    try:
        return peft.PeftModel.from_pretrained(subject.model, str(adapter)).eval()
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"Cannot put the adapter {adapter} on {subject.name}: {_sentence(error)} Give the "
            "folder of a PEFT adapter that was trained on this model."
        ) from error


def _sentence(error: Exception) -> str:
    """Give what an error says, with an end to it."""
    said = str(error).strip()[:300].rstrip(".")
    return f"{said}."
