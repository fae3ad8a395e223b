"""Merge a group-constant adapter exactly, without changing the codes of the base.

::

    A constant over each group: B A x = B a (sums of x over the groups)
    base's files + offsets = alpha / rank * (B a)^T [groups, out] per linear ──> checkpoint

Such an adapter (QA-LoRA) adds the same value to every weight of a group, so it only moves the
group's zero point, which is then no longer an integer. The standard format stores integer zero
points only. So the offsets are extra tensors, and only halfbyte loads the checkpoint. With other
programs, use the adapter unmerged, as an ordinary LoRA.

Source:
    Xu et al. 2023, "QA-LoRA", https://arxiv.org/abs/2309.14717
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.checksums import ShardDigest, write_checksums
from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.labels import read_model_config
from halfbyte.checkpoint.layout import OFFSETS, OWN_METHOD
from halfbyte.checkpoint.output_folder import check_new_folder
from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
from halfbyte.checkpoint.shards import read_shard
from halfbyte.checkpoint.write import write_configs, write_index, write_shard
from halfbyte.errors import ConfigError, VerificationError
from halfbyte.evaluate.loading import open_subject
from halfbyte.finetune.adapter import check_adapter, require_peft
from halfbyte.finetune.groups import find_groups, is_constant
from halfbyte.finetune.merge_check import MergeReport, adapt
from halfbyte.finetune.third_party_output import quiet_libraries
from halfbyte.nn.linear import QuantLinear
from halfbyte.quantize.source import find_model

LOST_SHARE = 1e-3
"""Divergence that an exact merge may have in float32, as a share of that without the adapter."""
FLOAT_KL = 1e-7
"""Divergence that another order of summation may cause. Unit: nats per token."""
NO_EXTRAS = {
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
}
"""PEFT settings that add more than A and B to an adapter, with their values for "nothing"."""


@quiet_libraries()
def merge_exactly(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    data: str | Path | None = None,
    device: str = "auto",
) -> MergeReport:
    """Merge a group-constant adapter without touching a code or a scale.

    Args:
        base: The quantized model that the adapter was trained on.
        adapter: Folder of an adapter from ``halfbyte finetune --variant qalora``.
        output: New folder for the checkpoint.
        data: Examples of the task, to evaluate the merge on.
        device: Device for the comparison.

    Returns:
        The report.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: The output is not empty, or the adapter cannot be merged exactly; says why.
        CheckpointError: The base is no GPTQ checkpoint.
        VerificationError: The checkpoint does not compute what base plus adapter does.
    """
    require_peft("Merging an adapter")
    target, folder = Path(output), find_model(base)
    check_new_folder(target, folder)
    check_adapter(adapter)
    checkpoint = open_checkpoint(folder)
    subject = open_subject(folder, dtype=torch.float32, device=device)
    disk_names = dict(subject.model.hf_quantizer.disk_names)
    adapted, expected = adapt(subject, adapter, data)
    offsets = {
        disk_names[name]: tensor for name, tensor in find_offsets(adapted, str(adapter)).items()
    }
    del adapted, subject
    target.mkdir(parents=True, exist_ok=True)
    _write(checkpoint, offsets, target)
    merged = open_subject(target, dtype=torch.float32, device=device).model
    kl = expected.kl_of(merged)
    if not kl <= max(FLOAT_KL, LOST_SHARE * expected.kl_without):
        raise VerificationError(
            f"{target} does not compute the same as {folder} with {adapter}: they are {kl:.2g} "
            f"nats per token apart, the base alone {expected.kl_without:.2g}. Do not use it, and "
            "report this bug."
        )
    return expected.report(merged, kl, base=folder, adapter=adapter, output=target)


@torch.no_grad()
def find_offsets(adapted: Any, adapter: str) -> dict[str, Tensor]:
    """Compute the offset that a group-constant adapter adds to each group.

    Args:
        adapted: PEFT's model.
        adapter: For messages.

    Returns:
        float32 [groups, out] by the linear's name in the base model, including offsets that the
        base already has.

    Raises:
        ConfigError: The adapter is not group-constant, or not on packed linears only.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Tensor] = {}
    inner = adapted.get_base_model()
    for name, module in inner.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        linear = module.get_base_layer()
        plain = isinstance(module, LoraLinear) and not module.lora_variant
        if not plain or not isinstance(linear, QuantLinear):
            raise ConfigError(
                f"Cannot merge {adapter} exactly: {name} has a {type(module).__name__} on a "
                f"{type(linear).__name__}; only an ordinary LoRA on a packed linear can be merged "
                "exactly. Merge into 16 bits instead (without --exact)."
            )
        found[name] = _offsets_of(name, module, linear, adapter)
    extras = [
        f"it also has {key} {value}"
        for config in adapted.peft_config.values()
        for key, none in NO_EXTRAS.items()
        if (value := getattr(config, key, none)) not in (none, [], None)
    ]
    if extras or not found:
        raise ConfigError(
            f"Cannot merge {adapter} exactly: {[*extras, 'it adapts nothing'][0]}. Merge into 16 "
            "bits instead (without --exact)."
        )
    return found


def _offsets_of(name: str, module: Any, linear: QuantLinear, adapter: str) -> Tensor:
    groups = find_groups(linear)
    total = torch.zeros(linear.spec.num_groups, linear.out_features, dtype=torch.float64)
    if linear.offsets is not None:
        total += linear.offsets.double().cpu()
    for active in module.active_adapters:
        a = module.lora_A[active].weight
        if not is_constant(a, groups):
            raise ConfigError(
                f"Cannot merge {adapter} exactly: its A on {name} is not constant over the groups "
                f"of {linear.spec.group_size} columns. Train it with --variant qalora on this "
                "base, or merge into 16 bits (without --exact)."
            )
        b = module.lora_B[active].weight.double().cpu()
        total += module.scaling[active] * (b @ a.double().cpu()[:, groups.first]).t()
    return total.float()


def _write(checkpoint: Checkpoint, offsets: Mapping[str, Tensor], target: Path) -> None:
    """Copy the base's files, and add the offsets of each linear next to its codes."""
    shards: list[ShardDigest] = []
    places: dict[str, str] = {}
    for file in checkpoint.files.files:
        tensors = dict(read_shard(file))
        for name, tensor in offsets.items():
            if f"{name}.qweight" in tensors:
                tensors[f"{name}.{OFFSETS}"] = tensor
        digest = write_shard(target / file.name, tensors)
        shards.append(digest)
        places |= dict.fromkeys(tensors, file.name)
    if len(shards) > 1:
        write_index(target, places, sum(shard.tensor_bytes for shard in shards))
    labels = {**checkpoint.labels.raw, "quant_method": OWN_METHOD}
    write_configs(target, read_model_config(checkpoint.folder), labels)
    write_checksums(target, shards, labels)
    copy_companions(checkpoint.folder, target)
