"""Merge an adapter into 16-bit weights.

::

    base (dequantized, or its 16-bit original) + adapter ──float32, layer by layer──> 16-bit folder

Every merge is compared with base plus adapter before it is written, so an adapter cannot get lost,
and loaded again and compared afterwards.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.output_folder import check_new_folder, share_weights
from halfbyte.errors import ConfigError, ModelError, VerificationError
from halfbyte.evaluate.loading import open_subject
from halfbyte.finetune.adapter import check_adapter, require_peft
from halfbyte.finetune.merge_check import MergeReport, adapt
from halfbyte.finetune.third_party_output import quiet_libraries
from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import linear_weight
from halfbyte.model.weights import load_model_config
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import quantized_linears, restore_conv1d
from halfbyte.quantize.source import find_model

LOST_SHARE = 0.1
"""Divergence from base plus adapter that a merge may have, as a share of that of the base alone."""
ROUNDING_KL = 0.005
"""Divergence that is always allowed for rounding to 16 bits. Unit: nats per token.

SmolLM2-135M has 0.0001 to 0.0004. A weak adapter that gets lost is found layer by layer instead.
"""
MAX_DEVIATION = 1e-3
"""Error that an unrounded merge may have, as a share of the adapter's effect on a layer."""
FLOAT_NOISE = 1e-5
"""Additional error allowed for the order of float32 sums, as a share of the layer's output."""
PROBE_ROWS = 8


@quiet_libraries()
def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    original: str | Path | None = None,
    data: str | Path | None = None,
    device: str = "auto",
) -> MergeReport:
    """Merge an adapter into 16-bit weights and write the model.

    Args:
        base: The quantized model (or a 16-bit one) that the adapter was trained on.
        adapter: Folder of a PEFT adapter.
        output: New folder for the model.
        original: The 16-bit model that ``base`` was made from, to merge into instead. The adapter
            was trained with the rounding errors of ``base``, so compare both.
        data: Examples of the task, to evaluate the merge on.
        device: Device to compute on.

    Returns:
        The report.

    Raises:
        MissingExtraError: PEFT is not installed.
        ConfigError: The output is not empty, or the adapter does not fit the model.
        ModelError: A folder cannot be loaded.
        VerificationError: The merged model does not compute what base plus adapter does.
    """
    require_peft("Merging an adapter")
    target = Path(output)
    folder = find_model(original if original is not None else base)
    check_new_folder(target, folder)
    check_adapter(adapter)
    dtype = stored_dtype(folder)
    subject = open_subject(folder, dtype=dtype, device=device)
    for _, linear in quantized_linears(subject.model):
        linear.to(torch.float32)  # computes in float32, as computing_in_float32 explains
    adapted, expected = adapt(subject, adapter, data)
    merged = merge_layers(adapted, dtype)
    kl = expected.kl_of(merged)
    allowed = max(ROUNDING_KL, LOST_SHARE * expected.kl_without)
    if not kl <= allowed:
        raise VerificationError(
            f"Merging {adapter} into {folder} lost it: the merged model is {kl:.4f} nats per token "
            f"from base plus adapter, the base alone {expected.kl_without:.4f}. Serve the adapter "
            "unmerged, and report this bug."
        )
    report = expected.report(merged, kl, base=folder, adapter=adapter, output=target)
    target.mkdir(parents=True, exist_ok=True)
    copy_companions(folder, target)
    merged.save_pretrained(target)
    share_weights(target)
    del subject, adapted, merged
    release_memory()
    kl = expected.kl_of(open_subject(target, dtype=dtype, device=device).model)
    if not kl <= allowed:
        raise VerificationError(
            f"{target} does not compute what {folder} with {adapter} does: loaded again, it is "
            f"{kl:.4f} nats per token from it, allowed is {allowed:.4f}. Do not use it; serve the "
            "adapter unmerged, and report this bug."
        )
    return report


@torch.no_grad()
def merge_layers(adapted: Any, dtype: torch.dtype) -> Any:
    """Merge every adapted layer in float32, and round once.

    Args:
        adapted: PEFT's model; it is consumed.
        dtype: Dtype of the merged weights.

    Returns:
        The plain model, without adapters and quantization.
    """
    from peft.tuners.lora import Linear as LoraLinear

    inner = adapted.get_base_model()
    _untie(inner)
    transposed = []
    for name, module in list(inner.named_modules()):
        if not isinstance(module, LoraLinear):
            continue
        base = module.get_base_layer()
        if isinstance(base, Conv1D) or getattr(base, "replaces_conv1d", False):
            transposed.append(name)
        module.base_layer = _as_dense(base)
        module.fan_in_fan_out = False
        module.to(torch.float32)
        _merge_layer(module)
        dense = module.base_layer
        dense.weight = nn.Parameter(dense.weight.data.to(dtype), requires_grad=False)
        if dense.bias is not None:
            dense.bias = nn.Parameter(dense.bias.data.to(dtype), requires_grad=False)
    if getattr(inner, "hf_quantizer", None) is not None:
        # Layers without an adapter; also, PEFT refuses to unload a model marked as quantized.
        inner.dequantize()
    with warnings.catch_warnings():
        # PEFT only has to remove its layers; it warns that all are merged already.
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = adapted.merge_and_unload(safe_merge=True)
    for name in transposed:
        restore_conv1d(merged, name)
    return merged


def _untie(model: Any) -> None:
    """Untie the head from the embeddings if only the embeddings have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, BaseTunerLayer) or isinstance(head, BaseTunerLayer):
        return
    if table.weight is getattr(head, "weight", None):
        head.weight = nn.Parameter(head.weight.data.clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False


def _merge_layer(module: Any) -> None:
    """Merge a layer in float32, and check that it computes the same as base plus adapter."""
    if any(module.lora_bias.values()) and module.base_layer.bias is None:
        raise ConfigError(
            "Cannot merge an adapter with biases (lora_bias): the model's linears have none. Serve "
            "the adapter unmerged."
        )
    weight = module.base_layer.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, weight.shape[1], generator=generator).to(weight.device)
    bare, expected = module.base_layer(x), module.eval()(x)
    module.merge(safe_merge=True)
    error = (module.base_layer(x) - expected).norm()
    if not error <= MAX_DEVIATION * (expected - bare).norm() + FLOAT_NOISE * bare.norm():
        raise VerificationError(
            f"Merging an adapter into a linear of {tuple(weight.shape)} lost it: the output is "
            f"{error:.2g} from base plus adapter, the base alone {(expected - bare).norm():.2g}. "
            "Serve the adapter unmerged, and report this bug."
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the 16-bit dtype that a model's config names; bfloat16 if it names none."""
    dtype = getattr(load_model_config(folder), "dtype", None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _as_dense(base: nn.Module) -> nn.Linear:
    """Return a linear with the same weight in float32."""
    if not isinstance(base, nn.Linear | Conv1D):
        raise ModelError(
            f"Cannot merge an adapter on a {type(base).__name__}: only linears can be merged. "
            "Serve the adapter unmerged."
        )
    if isinstance(base, QuantLinear):
        weight = base.dequantize(torch.float32)
    else:
        weight = linear_weight(base).float()
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.data.float(), requires_grad=False)
    return dense
