"""The steps of loading a quantized model, on a Transformers model under construction.

::

    files ──> collect_linears (headers, zeros, groups) ──> untie ──> replace (nn) ──> [weights]
          ──> prepare_linears (values checked, kernels selected)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.checkpoint.layout import LINEAR_SUFFIXES
from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
from halfbyte.checkpoint.shards import INDEX_SUFFIX, SINGLE_FILE, TensorFiles
from halfbyte.errors import CheckpointError
from halfbyte.model.experts import find_fused_experts, unfuse_experts
from halfbyte.model.naming import module_key_map
from halfbyte.nn.fusion import fuse_linears
from halfbyte.nn.grouped_experts import group_experts
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import StoredLinear, quantized_linears

logger = logging.getLogger("halfbyte")

SMALL_BYTES = 1 << 18
"""Larger than the norms and biases of any model; a head or embeddings would cost more to copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLinears:
    """The packed linears of a checkpoint that exist in a model, by name in the model."""

    stored: Mapping[str, StoredLinear]
    disk_names: Mapping[str, str]
    disk_keys: tuple[str, ...]
    """Names of all tensors in the files."""


def find_unusual_file(folder: Path) -> str | None:
    """Find the weights of a folder whose file name Transformers does not look for.

    Args:
        folder: A local model folder; may not exist.

    Returns:
        The name of the single file or index; None if Transformers finds the weights itself, or
        there is no such folder.
    """
    usual = (SINGLE_FILE, f"model{INDEX_SUFFIX}")
    if not folder.is_dir() or any((folder / name).is_file() for name in usual):
        return None
    indexes = [path.name for path in folder.glob(f"*{INDEX_SUFFIX}")]
    if len(indexes) == 1:
        return indexes[0]
    if not any(folder.glob("*.safetensors")):
        return None
    files = TensorFiles.open(folder).files
    return files[0].name if len(files) == 1 else None


def has_packed_linears(folder: Path) -> bool:
    """Return whether a folder's safetensors files can be read and have a packed linear."""
    try:
        names = TensorFiles.open(folder).infos
    except CheckpointError:
        return False
    return any(name.endswith(".qweight") for name in names)


def collect_linears(model: PreTrainedModel, files: Sequence[Path]) -> FoundLinears:
    """Find which linears of a model are packed in the files, and in which layout.

    Args:
        model: On the meta device; fused experts are split in place if some of them are packed.
        files: The safetensors files that will be loaded.

    Returns:
        The linears. One that the model does not have (such as the head of a model without one) is
        left out, for Transformers to report.

    Raises:
        CheckpointError: The files are not safetensors, no packed linear belongs to this model, or
            a tensor is missing or damaged.
    """
    checkpoint = _open(files, getattr(model.config, "transformers_weights", None))
    names = _model_names(model, checkpoint)
    fused = find_fused_experts(model)
    inside = {name for name in fused if any(_is_inside(m, name) for m in names.values())}
    if inside:
        unfuse_experts(model, inside.__contains__)
        # Transformers' prefix rule finds the new modules now.
        names = _model_names(model, checkpoint)
    modules = {name for name, _ in model.named_modules()}
    disk_names = {name: disk_name for disk_name, name in names.items() if name in modules}
    infos = checkpoint.files.infos
    stored = {}
    for name, disk_name in disk_names.items():
        keys = {suffix: f"{disk_name}.{suffix}" for suffix in LINEAR_SUFFIXES}
        dtypes = {suffix: infos[key].dtype for suffix, key in keys.items() if key in infos}
        # Transformers builds models under torch.device("meta"), but these tensors must be read.
        with torch.device("cpu"):
            facts = checkpoint.load_info(disk_name)
        stored[name] = StoredLinear(facts=facts, dtypes=dtypes)
    if not stored:
        raise CheckpointError(
            f"None of the {len(names)} packed linears of {checkpoint.folder} (such as "
            f"{next(iter(names))}) is in a {type(model).__name__}. config.json and the tensors "
            "belong to different models; download both again."
        )
    for note in checkpoint.notes:
        logger.warning("%s: %s", checkpoint.folder, note)
    _log_dialects(checkpoint, stored)
    return FoundLinears(stored=stored, disk_names=disk_names, disk_keys=tuple(infos))


def untie(model: PreTrainedModel, stored: Mapping[str, StoredLinear]) -> None:
    """Stop Transformers from tying a packed head to the embeddings.

    Args:
        model: Its config is changed if the head is packed.
        stored: The packed linears.
    """
    tied = [f"{name}.weight" for name in stored if f"{name}.weight" in model.all_tied_weights_keys]
    for key in tied:
        del model.all_tied_weights_keys[key]
    if tied:
        logger.info("%s is packed, so it is not tied to the embeddings.", tied[0])
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def prepare_linears(model: PreTrainedModel) -> None:
    """Check the loaded values, select kernels, fuse linears that benefit from it, and log all this.

    Args:
        model: With its weights loaded; offloaded linears stay as stored.
    """
    chosen: Counter[str] = Counter()
    for name, linear in quantized_linears(model):
        linear.check_finite(name)
        selection = linear.prepare(stored_layout=_is_offloaded(linear))
        rejected = [f"{other}: {reason}" for other, reason in selection.rejected.items()]
        chosen[f"{selection.kernel.name}: {'; '.join([selection.reason, *rejected])}"] += 1
    for text, count in chosen.items():
        logger.info("%d quantized linears run on %s", count, text)
    _release_files(model)
    fused = fuse_linears(model)
    if fused:
        logger.info(
            "%d groups of them (q, k and v; gate and up) are fused to one product each", fused
        )
    grouped = group_experts(model)
    if grouped:
        logger.info("The experts of %d layers run together, as three products", grouped)


def _release_files(model: PreTrainedModel) -> None:
    """Copy small tensors out of the memory-mapped files that they were loaded from.

    Packed weights have been repacked by now, but a single norm keeps its whole shard mapped, and
    the pages that repacking read count towards this process: as much again as the packed weights.
    """
    for parameter in model.parameters():
        if _is_small(parameter):
            parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if _is_small(buffer):
                # A new tensor: the old one is a view and would keep its base alive.
                module._buffers[name] = buffer.detach().clone()


def _is_small(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes <= SMALL_BYTES


def _open(files: Sequence[Path], weights_file: str | None) -> Checkpoint:
    if not files:
        raise CheckpointError(
            "Cannot load a GPTQ checkpoint from a state dict: its packed linears are found in the "
            "headers of the files. Pass the folder to from_pretrained."
        )
    checkpoint = open_checkpoint(files[0].parent, weights_file)
    expected = {file.name for file in checkpoint.files.files}
    found = {file.name for file in files}
    if expected != found:
        raise CheckpointError(
            f"Cannot load {checkpoint.folder}: Transformers is about to read "
            f"{', '.join(sorted(found))}, but the checkpoint in the folder is "
            f"{', '.join(sorted(expected))}. Keep only one checkpoint in the folder."
        )
    return checkpoint


def _model_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Map module names on disk to names in the model, for every packed linear."""
    keys = module_key_map(model, [f"{name}.qweight" for name in checkpoint.linears])
    return {
        key.removesuffix(".qweight"): name.removesuffix(".qweight") for key, name in keys.items()
    }


def _is_inside(module: str, experts: str) -> bool:
    """Whether a module is ``<experts>.<n>.<projection>``; either name may lack the base prefix."""
    container = ".".join(module.split(".")[:-2])
    return f".{experts}".endswith(f".{container}") or f".{container}".endswith(f".{experts}")


def _is_offloaded(linear: QuantLinear) -> bool:
    return any(tensor.is_meta for tensor in linear.buffers())


def _log_dialects(checkpoint: Checkpoint, stored: Mapping[str, StoredLinear]) -> None:
    notes = [linear.facts.zeros.note for linear in stored.values() if linear.facts.zeros.note]
    if notes:
        logger.warning("%s: %s (%d linears)", checkpoint.folder, notes[0], len(notes))
