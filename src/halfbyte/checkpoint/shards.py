"""A lazy index over the safetensors files of a model folder: reads headers first, data on demand.

::

    folder -> files of the model -> validated headers -> TensorInfo by name
                                                      -> load(names): copies in memory
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from halfbyte.checkpoint.header import TensorInfo, parse_json_object, read_header
from halfbyte.checkpoint.labels import ADAPTER_CONFIG, MODEL_CONFIG, describe_missing_config
from halfbyte.checkpoint.safe_path import check_model_file
from halfbyte.errors import CheckpointError

__all__ = ["TensorFiles", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = ("adapter_model.safetensors", "optimizer.safetensors", "consolidated.safetensors")
"""Files under fixed names that are not the model's weights in Transformers' format."""

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFiles:
    """The tensors of a model folder: their headers are in memory, data is read on demand."""

    folder: Path
    infos: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    """Every file that contains a tensor, sorted by name."""

    @classmethod
    def open(cls, folder: str | Path, weights_file: str | None = None) -> TensorFiles:
        """Find and validate the safetensors files of a model folder; no tensor is read.

        Accepts ``model.safetensors``, an index with its shards, AutoGPTQ's
        ``gptq_model-4bit-128g.safetensors``, or a single file of any other name. If both
        ``model.safetensors`` and an index exist, the former is read, as in Transformers; both must
        have the same tensors.

        Args:
            folder: A base model or a quantized one.
            weights_file: Name of the safetensors file or index to read; None: chosen as above.

        Returns:
            The index over its tensors.

        Raises:
            CheckpointError: There is no such folder, no usable file, or a header or the index is
                damaged; names the file and the tensor.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"Cannot open checkpoint {folder}: {describe_missing_config(folder)}. "
                "Give a model folder."
            )
        try:
            names = sorted(path.name for path in folder.iterdir())
        except OSError as error:
            raise CheckpointError(
                f"Cannot open checkpoint {folder}: {error.strerror or error}. "
                "Check its permissions."
            ) from error
        if weights_file is not None:
            names = [weights_file]
        index_name = _find_index(folder, names)
        weight_map = {} if index_name is None else _read_weight_map(folder / index_name)
        is_sharded = index_name is not None and SINGLE_FILE not in names
        file_names = sorted(set(weight_map.values())) if is_sharded else _find_files(folder, names)
        files = tuple(check_model_file(folder, name) for name in file_names)
        infos = _merge_headers(files)
        if index_name is not None and is_sharded:
            _check_index_agrees(folder / index_name, weight_map, infos)
        elif index_name is not None and set(infos) != set(weight_map):
            raise CheckpointError(
                f"Cannot open checkpoint {folder}: {SINGLE_FILE} has {len(infos)} tensors and "
                f"{index_name} lists {len(weight_map)}, which are not the same. One of them is "
                "left over from another model; remove it."
            )
        return cls(folder=folder, infos=MappingProxyType(infos), files=files)

    def load(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """Read tensors into memory.

        They are copies, not memory maps, so that resident memory does not grow with what was read
        earlier.

        Args:
            names: Tensors of :attr:`infos`.
            pinned: Allocate pinned memory, from which a GPU copies at full speed.

        Returns:
            The tensors on the CPU in their stored dtype, in the order of ``names``.

        Raises:
            CheckpointError: There is no such tensor, or its file changed or cannot be read.
        """
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            if name not in self.infos:
                raise CheckpointError(
                    f"Checkpoint {self.folder} has no tensor {name}; it has {len(self.infos)} "
                    "others. The files are incomplete or belong to another model."
                )
        tensors: dict[str, Tensor] = {}
        by_file: dict[Path, list[TensorInfo]] = {}
        for name in wanted:
            by_file.setdefault(self.infos[name].file, []).append(self.infos[name])
        for file, infos in by_file.items():
            infos.sort(key=lambda info: info.offset)
            tensors.update(_read_tensors(file, infos, pinned=pinned))
        return {name: tensors[name] for name in wanted}


def read_shard(file: Path) -> dict[str, Tensor]:
    """Read every tensor of one file into memory.

    Args:
        file: A safetensors file.

    Returns:
        The tensors on the CPU, by name.

    Raises:
        CheckpointError: The file is damaged or cannot be read.
    """
    return _read_tensors(file, sorted(read_header(file).values(), key=lambda info: info.offset))


def _read_tensors(
    file: Path, infos: list[TensorInfo], *, pinned: bool = False
) -> dict[str, Tensor]:
    """Read directly into each tensor's memory, without a memory map or a second copy."""
    tensors: dict[str, Tensor] = {}
    try:
        with file.open("rb", buffering=0) as handle:
            for info in infos:
                data = torch.empty(info.num_bytes, dtype=torch.uint8, pin_memory=pinned)
                view = data.numpy().data
                handle.seek(info.offset)
                position = 0
                # On Linux, one read call returns at most 2 GB.
                while position < info.num_bytes:
                    count = handle.readinto(view[position:])
                    if not count:
                        raise CheckpointError(
                            f"Cannot read tensor {info.name} of {file}: it ends after {position} "
                            f"of {info.num_bytes} bytes. The file changed while it was open."
                        )
                    position += count
                tensors[info.name] = data.view(info.dtype).reshape(info.shape)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {file}: {error.strerror or error}. Check the disk and the permissions."
        ) from error
    return tensors


def check_shards(folder: Path) -> None:
    """Check that every shard listed in a folder's index exists, without opening any.

    Args:
        folder: A model folder of any format.

    Raises:
        CheckpointError: A shard is missing or outside the folder, or the index is damaged.
    """
    names = [path.name for path in folder.iterdir()]
    index_name = _find_index(folder, names)
    if index_name is None or SINGLE_FILE in names:
        return
    for name in sorted(set(_read_weight_map(folder / index_name).values())):
        check_model_file(folder, name)


def _find_index(folder: Path, names: list[str]) -> str | None:
    found = [name for name in names if name.endswith(INDEX_SUFFIX)]
    standard = f"model{INDEX_SUFFIX}"
    if standard in found:
        return standard
    if len(found) > 1:
        raise CheckpointError(
            f"Cannot open checkpoint {folder}: it has {len(found)} indexes ({', '.join(found)}) "
            f"and none is {standard}. Keep the one that belongs to the model."
        )
    return found[0] if found else None


def _find_files(folder: Path, names: list[str]) -> list[str]:
    """Choose the weight files of a folder without an index."""
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    found = [n for n in names if n.endswith(".safetensors") and n not in NOT_WEIGHTS]
    if not found and "consolidated.safetensors" in names:
        found = ["consolidated.safetensors"]
    if not found:
        raise CheckpointError(explain_missing_weights(folder))
    shards = [match for name in found if (match := _SHARD_NAME.fullmatch(name))]
    if shards and len(shards) == len(found):
        stems = {match["stem"] for match in shards}
        count = int(shards[0]["count"])
        if len(stems) > 1 or [int(m["number"]) for m in shards] != list(range(1, count + 1)):
            raise CheckpointError(
                f"Cannot open checkpoint {folder}: it has {len(found)} shards and no index, and "
                f"they are not the parts 1..{count} of one model ({', '.join(found[:4])}). "
                "Download the missing files again."
            )
        return found
    for pattern in (r"gptq_model.*", r"model\..*"):
        preferred = [name for name in found if re.fullmatch(pattern, name)]
        if len(preferred) == 1:
            return preferred
    if len(found) > 1:
        raise CheckpointError(
            f"Cannot open checkpoint {folder}: it has {len(found)} safetensors files "
            f"({', '.join(found[:4])}), no index, and none is {SINGLE_FILE}. "
            "Keep only the model's own, or add its index."
        )
    return found


def explain_missing_weights(folder: Path) -> str:
    """Explain why a folder without safetensors files cannot be read, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    if ADAPTER_CONFIG in names and MODEL_CONFIG not in names:
        return f"Cannot open checkpoint {folder}: {describe_missing_config(folder)}."
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if not pickles:
        return (
            f"Cannot open checkpoint {folder}: it has no .safetensors file among its {len(names)} "
            "files. Give the folder of a downloaded model."
        )
    return (
        f"Cannot open checkpoint {folder}: its weights are stored only as pickles "
        f"({', '.join(pickles[:2])}), and loading a pickle can run arbitrary code. "
        "If you trust their source, convert each of them once, in an isolated environment (a "
        "container without network): "
        'python -c "import torch; from safetensors.torch import save_file; save_file({k: '
        f"v.clone().contiguous() for k, v in torch.load('{pickles[0]}', weights_only=True).items()"
        "}, 'model.safetensors', metadata={'format': 'pt'})\""
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        text = index.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {index}: {error.strerror or error}. Check the path and its permissions."
        ) from error
    weight_map = parse_json_object(text, str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"Cannot read {index}: it has no weight_map of tensors to files. "
            "The file is damaged; download or write it again."
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise CheckpointError(
                f"Refusing {index}: it says that tensor {tensor} is in {str(name)[:80]!r}; only "
                "the name of a .safetensors file in the same folder is allowed. "
                "Do not use this checkpoint unless you trust its source."
            )
    return weight_map


def _merge_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in infos:
                raise CheckpointError(
                    f"Tensor {name} is in two files of {file.parent}, {infos[name].file.name} and "
                    f"{file.name}. Remove the file that does not belong to the model."
                )
            infos[name] = info
    return infos


def _check_index_agrees(
    index: Path, weight_map: Mapping[str, str], infos: Mapping[str, TensorInfo]
) -> None:
    for name, file_name in weight_map.items():
        if name not in infos:
            raise CheckpointError(
                f"{index} says that tensor {name} is in {file_name}, which does not have it. "
                "The index and the shards are of different versions; download both again."
            )
        if infos[name].file.name != file_name:
            raise CheckpointError(
                f"{index} says that tensor {name} is in {file_name}, but it is in "
                f"{infos[name].file.name}. Download the index and the shards again."
            )
    if len(infos) != len(weight_map):
        extra = next(name for name in infos if name not in weight_map)
        raise CheckpointError(
            f"{infos[extra].file} has tensor {extra}, which {index.name} does not list "
            f"({len(infos)} tensors in the files, {len(weight_map)} in the index). "
            "The index and the shards are of different versions; download both again."
        )
