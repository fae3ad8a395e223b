"""Loads a model's weights from the shards on disk, one block at a time.

Embeddings, head and norms outside the blocks are memory-mapped: only the rows that the calibration
text uses become resident.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    dot_natural_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from halfbyte.checkpoint.labels import describe_missing_config
from halfbyte.checkpoint.shards import TensorFiles, TensorInfo
from halfbyte.errors import CheckpointError, ModelError, first_line
from halfbyte.model.blocks import Blocks, build_skeleton, find_blocks
from halfbyte.model.naming import Renaming
from halfbyte.model.renaming import align_renamings

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model_config(folder: Path) -> PretrainedConfig:
    """Read the ``config.json`` of a model folder; a repository's own code is never run.

    Args:
        folder: A Hugging Face model folder.

    Returns:
        The configuration.

    Raises:
        ModelError: There is no usable configuration, or it requires the repository's own code.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"Cannot read a model from {folder}: {describe_missing_config(folder)}. "
            "Give a Hugging Face model folder (config.json, tokenizer files, *.safetensors)."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"Cannot read the configuration in {folder}: {first_line(error)}. "
            "Only models built into Transformers are supported; a repository's code is never run."
        ) from error


class ModelWeights:
    """A model folder, and an empty model that its weights are loaded into block by block."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        prepare: Callable[[PreTrainedModel, TensorFiles], None] | None = None,
    ) -> None:
        """Read names and shapes; no weight is read yet.

        Args:
            folder: A Hugging Face model folder with safetensors files.
            device: Device of the loaded blocks.
            dtype: Dtype that parameters are loaded in; None: that in which most are stored.
            prepare: Modifies the empty model before anything is loaded. Required for a quantized
                model, whose linears it replaces; without it, quantized models are refused.

        Raises:
            ModelError: The model is already quantized or cannot be streamed.
            CheckpointError: The files are damaged or incomplete.
        """
        self.folder = folder
        self.device = device
        self.config = load_model_config(folder)
        quantized = getattr(self.config, "quantization_config", None)
        if quantized is not None and prepare is None:
            method = dict(quantized).get("quant_method", "an unknown method")
            raise ModelError(
                f"The model in {folder} is already quantized ({method}). Quantize the original "
                "16-bit model instead."
            )
        self.files = TensorFiles.open(folder)
        self.dtype = dtype or _main_dtype(folder, self.files.infos.values())
        self.model: PreTrainedModel = build_skeleton(self.config, self.dtype)
        if prepare is not None:
            prepare(self.model, self.files)
        self.blocks: Blocks = find_blocks(self.model)
        self._dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        rules = Renaming(self.model)
        self._renamed: dict[str, str] = {}
        self._block_keys: list[list[str]] = [[] for _ in self.blocks.modules]
        self._outside_keys: list[str] = []
        self._has_outside = False
        self._parameters: dict[str, list[str]] = {}
        self._prefetched: dict[int, Future[dict[str, Tensor]]] = {}
        # Natural order, because some of Transformers' rules depend on earlier keys.
        for key in sorted(self.files.infos, key=dot_natural_key):
            if rules.keeps_packed(key.removesuffix(".weight")):
                self._renamed[rules.model_key(key, convert=False)] = key
            self._parameters[key] = rules.parameters_of(key)
            block = self._block_of(self._parameters[key][0])
            (self._outside_keys if block is None else self._block_keys[block]).append(key)
        self._check_ties()

    def _check_ties(self) -> None:
        """Refuse a model whose files leave out weights of a block because it shares another's."""
        stored = {name for names in self._parameters.values() for name in names}
        for name, source in self.model.all_tied_weights_keys.items():
            block = self._block_of(name)
            if name not in stored and block is not None and block != self._block_of(source):
                raise ModelError(
                    f"Cannot stream {self.blocks.name(block)} of {self.folder}: {name} is tied to "
                    f"{source}. A model whose blocks share weights cannot be quantized."
                )

    def block_keys(self, index: int, without: Collection[str] = ()) -> list[str]:
        """List the disk names of one block's tensors.

        Args:
            index: Which block.
            without: Modules, by name in the model, whose tensors are left out, including those
                of their submodules and tensors that they share with other modules.

        Returns:
            The names, in natural order.
        """
        inside = tuple(f"{module}." for module in without)
        return [
            key
            for key in self._block_keys[index]
            if not any(name.startswith(inside) for name in self._parameters[key])
        ]

    def parameters_of(self, key: str) -> list[str]:
        """Return the parameters that a tensor on disk becomes; several if it is split."""
        return self._parameters[key]

    @property
    def outside_keys(self) -> list[str]:
        """Names on disk of the tensors outside the blocks."""
        return self._outside_keys

    def disk_name(self, module: str) -> str:
        """Return the name on disk for a linear's packed tensors.

        Args:
            module: Dotted name in the model.

        Returns:
            The linear's name in the source files, or its name in the model if they hold it fused
            or if Transformers would not rename its packed tensors as it renames its weight.
        """
        key = self._renamed.get(f"{module}.weight")
        return module if key is None else key.removesuffix(".weight")

    def load_outside(self) -> None:
        """Load (on a CPU: memory-map) everything outside the blocks, once, and tie tied weights.

        Raises:
            CheckpointError: A tensor is missing; names it.
        """
        if self._has_outside:
            return
        if self.device.type == "cpu":
            tensors = {key: map_tensor(self.files.infos[key]) for key in self._outside_keys}
        else:
            tensors = self.files.load(self._outside_keys)
        self._set_tensors(tensors)
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)  # rotary tables, masks
        inside = f"{self.blocks.prefix}."
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and not name.startswith(inside):
                raise self._missing(name)
        self._has_outside = True

    def prefetch_block(self, index: int) -> None:
        """Start reading the block that will be loaded next in a background thread."""
        pinned = self.device.type == "cuda"
        keys = self.block_keys(index)
        pool = ThreadPoolExecutor(1)
        self._prefetched = {index: pool.submit(self.files.load, keys, pinned=pinned)}
        pool.shutdown(wait=False)

    def load_block(self, index: int, without: Collection[str] = ()) -> nn.Module:
        """Read one block's weights into memory.

        Args:
            index: Which block.
            without: Modules, by name within the block, whose weights are not loaded.

        Returns:
            The block, on the device.

        Raises:
            CheckpointError: A tensor of the block is missing; names it.
        """
        prefix = self.blocks.name(index)
        left_out = tuple(f"{prefix}.{name}." for name in without)
        keys = self.block_keys(index, [name.removesuffix(".") for name in left_out])
        fetched = self._prefetched.pop(index, None)
        tensors = self.files.load(keys) if fetched is None else fetched.result()
        self._set_tensors({key: tensors[key] for key in keys})
        del tensors
        block: nn.Module = self.model.get_submodule(prefix)
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            full = f"{prefix}.{name}"
            if tensor.is_meta and not full.startswith(left_out):
                raise self._missing(full)
        for tensor in (*block.parameters(), *block.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(self.device)
        return block

    def drop_block(self, index: int) -> None:
        """Free one block's weights; the next load gives them their stored dtype again."""
        prefix = self.blocks.name(index)
        block = self.model.get_submodule(prefix)
        for path, module in block.named_modules(prefix=prefix):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    # Transformers loads in the dtype of the empty parameter.
                    dtype = self._dtypes.get(f"{path}.{name}", self.dtype)
                    module._parameters[name] = nn.Parameter(
                        parameter.data.to("meta").to(dtype), requires_grad=False
                    )
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")

    def _block_of(self, model_key: str) -> int | None:
        inside = f"{self.blocks.prefix}."
        if not model_key.startswith(inside):
            return None
        number = model_key.removeprefix(inside).partition(".")[0]
        return int(number) if number.isdigit() and int(number) < len(self._block_keys) else None

    def _set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Rename, merge and assign tensors by Transformers' loader, as ``from_pretrained`` does."""
        rules = Renaming(self.model)
        config = LoadStateDictConfig(
            # Split experts stay separate linears, whether packed or not.
            weight_mapping=align_renamings(self.model, rules.transforms, {}, tensors),
            device_map={"": self.device},
            dtype=self.dtype,
        )
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config, None)
        if info.mismatched_keys:
            name, found, expected = sorted(info.mismatched_keys, key=str)[0]
            raise CheckpointError(
                f"Tensor {name} in {self.folder} has shape {list(found)}; config.json asks for "
                f"{list(expected)}. The weights and the configuration are of different models."
            )
        if info.conversion_errors:
            name, text = next(iter(info.conversion_errors.items()))
            raise CheckpointError(
                f"Cannot put {name} of {self.folder} together from its files: {text}"
            )
        self.model.requires_grad_(False)

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"Checkpoint {self.folder} is missing {name}; it has {len(self.files.infos)} tensors. "
            "The download is incomplete; download it again."
        )


def map_tensor(info: TensorInfo) -> Tensor:
    """Memory-map one tensor copy-on-write: pages are loaded on access, the file never changes.

    Args:
        info: The tensor's entry in a validated header.

    Returns:
        The tensor.
    """
    raw = np.memmap(info.file, mode="c", offset=info.offset, shape=(max(info.num_bytes, 1),))
    flat = torch.from_numpy(raw)[: info.num_bytes]
    if info.offset % info.dtype.itemsize:
        flat = flat.clone()
    return flat.view(info.dtype).reshape(info.shape)


def _main_dtype(folder: Path, infos: Iterable[TensorInfo]) -> torch.dtype:
    count: Counter[torch.dtype] = Counter()
    for info in infos:
        count[info.dtype] += info.num_bytes
    dtype = count.most_common(1)[0][0]
    if dtype not in FLOAT_DTYPES:
        raise ModelError(
            f"The weights in {folder} are stored as {dtype}; float32, bfloat16 or float16 is "
            "needed. Quantize the original 16-bit model instead."
        )
    return dtype


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Transformers' progress bar and load report, which would appear once per block."""
    logger = logging.getLogger("transformers.modeling_utils")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
