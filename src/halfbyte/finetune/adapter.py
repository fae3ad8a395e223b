"""PEFT adapters on a base model: attach a new one to train, or load a finished one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.checkpoint.labels import ADAPTER_CONFIG
from halfbyte.errors import ConfigError, require_extra
from halfbyte.evaluate.loading import Subject
from halfbyte.finetune.config import ALL_LINEAR, QALORA, AdapterConfig
from halfbyte.model.experts import UnfusedExperts, find_fused_experts, projection_names
from halfbyte.model.naming import Renaming

PEFT_VARIANTS: dict[str, dict[str, bool]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    # An ordinary LoRA for PEFT; groups.py adds the constraint.
    QALORA: {},
}
MISSING_WEIGHTS = "Found missing adapter keys"
"""Beginning of PEFT's warning; layers without weights would change nothing."""


def require_peft(purpose: str) -> None:
    """Check that PEFT is installed.

    Args:
        purpose: What needs it, for the message.

    Raises:
        MissingExtraError: It is not installed; the message has the install command.
    """
    with require_extra("peft", "finetune", purpose):
        import peft  # noqa: F401 - checked before a model is loaded


def check_adapter(folder: str | Path) -> None:
    """Check that a folder holds an adapter; PEFT would look up any other name on the Hub.

    Args:
        folder: Of a PEFT adapter.

    Raises:
        ConfigError: The folder holds no adapter.
    """
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        found = f"no {ADAPTER_CONFIG} in it" if Path(folder).is_dir() else "no such folder"
        raise ConfigError(
            f"There is no adapter in {folder}: {found}. Give the folder of a PEFT adapter, such as "
            "one written by halfbyte finetune or halfbyte repair."
        )


def attach_adapter(model: Any, adapter: AdapterConfig, start_from: str | Path | None = None) -> Any:
    """Attach a trainable adapter to a model, and freeze the model's own weights.

    Args:
        model: Changed in place.
        adapter: Settings of a new adapter.
        start_from: Folder of an adapter to load instead.

    Returns:
        PEFT's model.

    Raises:
        ConfigError: The model lacks the target linears, or the adapter does not fit it.
    """
    import peft

    model.requires_grad_(False)
    try:
        if start_from is not None:
            return _read_adapter(model, start_from, is_trainable=True)
        settings = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=list(adapter.targets) or _default_targets(model),
            bias="none",
            task_type="CAUSAL_LM",
            **PEFT_VARIANTS[adapter.variant],
        )
        with warnings.catch_warnings():
            # Of targets that are not found: an error below.
            warnings.simplefilter("ignore", RuntimeWarning)
            adapted = peft.get_peft_model(model, settings)
    except (ValueError, OSError, RuntimeError) as error:
        what, advice = "an adapter", "Use --target with linears of this model, or omit it for all."
        if start_from is not None:
            what, advice = f"the adapter {start_from}", "Use one that was trained on this model."
        raise ConfigError(
            f"Cannot put {what} on a {type(model).__name__}: {_sentence(error)} {advice}"
        ) from error
    _check_targets(adapted, adapter.targets)
    return adapted


def load_adapter(subject: Subject, adapter: str | Path) -> Any:
    """Attach a trained adapter to its base.

    Args:
        subject: The base.
        adapter: Folder of a PEFT adapter.

    Returns:
        PEFT's model, in evaluation mode.

    Raises:
        ConfigError: It is no adapter, or does not fit the base.
    """
    try:
        return _read_adapter(subject.model, adapter).eval()
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"Cannot put the adapter {adapter} on {subject.name}: {_sentence(error)} Give the "
            "folder of a PEFT adapter that was trained on this model."
        ) from error


def _read_adapter(model: Any, folder: str | Path, *, is_trainable: bool = False) -> Any:
    """Put a saved adapter on a model; PEFT only warns if its file lacks weights."""
    import peft

    if getattr(peft.PeftConfig.from_pretrained(str(folder)), "layer_replication", None):
        raise ValueError("it repeats layers of the model (layer_replication)")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", MISSING_WEIGHTS)
        try:
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
        except UserWarning as warning:
            name = str(warning).partition("['")[2].partition("'")[0]
            raise ValueError(f"its file has no {name}.") from warning


def _default_targets(model: Any) -> list[str] | str:
    """Return PEFT's target of all linears; of a mixture of experts, those outside of the experts.

    PEFT would put adapters with weights of all experts on the fused parameters, which a quantized
    model does not have, and on the router.
    """
    containers = {
        name for name, module in model.named_modules() if isinstance(module, UnfusedExperts)
    }
    containers |= set(find_fused_experts(model))
    if not containers:
        return ALL_LINEAR
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        # Not the gate of a shared expert.
        and module.out_features > 1
        and not any(name.startswith(f"{container}.") for container in containers)
    }
    # PEFT takes linears of these names, such as those of a shared expert, for the experts'.
    names -= set(asdict(projection_names(Renaming(model))).values())
    return sorted(names) or ALL_LINEAR


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Check that each target got an adapter: PEFT only warns if some are not found."""
    adapted = model.base_model.targeted_module_names
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in adapted):
            names = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
            raise ConfigError(
                f"PEFT cannot put an adapter on {target} of this model; it found {names}. Experts "
                f"of a mixture cannot have adapters. Leave out --target {target}."
            )


def _sentence(error: Exception) -> str:
    """Return an error's message, shortened, with one full stop."""
    return str(error).strip()[:300].rstrip(".") + "."
