"""On-disk cache of one model's answers and predictions, keyed by a digest of the model.

::

    CACHE/<digest>-<dtype>-<device>/answers.jsonl          answers, one JSON line each
                                    states/<key>.safetensors   predictions of a passage
                                    head.safetensors           the output layer
                                    layers-<key>.safetensors   inputs and outputs of its linears

The digest covers the weights, the configuration and the tokenizer, and the software and hardware
that run them: a changed file in the same folder or another package version gets another entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.checkpoint.identity import digest_all
from halfbyte.environment import CPU_ISA, KERNEL, read_variable
from halfbyte.errors import ConfigError
from halfbyte.judge.answers import AnswerFile
from halfbyte.judge.local_model import LocalModel, Prediction
from halfbyte.judge.questions import digest
from halfbyte.kernels.registry import KERNELS, load_kernel
from halfbyte.machine.facts import installed_versions, machine_facts
from halfbyte.nn.linear import QuantLinear


def subject_key(files: Mapping[str, str], dtype: str, device: torch.device) -> str:
    """Return the cache key of a model: everything that its answers depend on except the question.

    Args:
        files: From :func:`halfbyte.checkpoint.identity.digest_files`.
        dtype: Requested compute dtype.
        device: Where it runs.

    Returns:
        A digest of the files, the package versions, the processor or GPU and its kernels, followed
        by dtype and device in plain text.
    """
    facts = machine_facts()
    chip = facts["gpu" if device.type == "cuda" else "processor"]
    kernels = [entry.name for entry in KERNELS if load_kernel(entry).find_obstacle() is None]
    overrides = [read_variable(variable) for variable in (KERNEL, CPU_ISA)]
    name = digest([digest_all(files), installed_versions(), chip, kernels, overrides])
    return f"{name}-{dtype}-{device.type}"


class ModelCache:
    """The cache entry of one model."""

    def __init__(self, root: Path, name: str, *, fresh: bool = False) -> None:
        """Open the entry, creating its folder if needed.

        Args:
            root: Folder of the cache.
            name: Key of the entry; see :func:`subject_key`.
            fresh: Delete earlier answers.

        Raises:
            ConfigError: The folder cannot be created.
        """
        self.folder = root / name
        try:
            (self.folder / "states").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot create a cache in '{root}': {error.strerror}. Choose another folder "
                "with --cache."
            ) from error
        self.answers = AnswerFile(self.folder / "answers.jsonl", fresh=fresh)
        self._head: dict[str, Tensor] | None = None

    def has_states(self, key: str) -> bool:
        """Return whether the predictions of a passage are cached."""
        return self._states_path(key).is_file()

    def save_states(self, key: str, prediction: Prediction) -> None:
        """Save the predictions of a passage."""
        tensors = {"logits" if prediction.are_logits else "states": prediction.states}
        write_tensors(self._states_path(key), tensors)

    def load_logits(self, key: str) -> Tensor:
        """Load the logits of a passage.

        Args:
            key: The key its predictions were saved under.

        Returns:
            [tokens, vocabulary], on the CPU.
        """
        tensors = read_tensors(self._states_path(key))
        if "logits" in tensors:
            return tensors["logits"]
        if self._head is None:
            self._head = read_tensors(self.folder / "head.safetensors")
        return functional.linear(tensors["states"], self._head["weight"], self._head.get("bias"))

    def release_head(self) -> None:
        """Free the memory of the output layer."""
        self._head = None

    def save_head(self, model: LocalModel) -> None:
        """Save the model's output layer, if it is not saved yet."""
        path = self.folder / "head.safetensors"
        if path.is_file() or model.head is None:
            return
        tensors = {
            name: tensor
            for name in ("weight", "bias")
            if isinstance(tensor := getattr(model.head, name, None), Tensor)
        }
        if isinstance(model.head, QuantLinear):
            # The weight attribute of a QuantLinear is only a placeholder.
            tensors["weight"] = model.head.dequantize()
        write_tensors(path, tensors)

    def _states_path(self, key: str) -> Path:
        return self.folder / "states" / f"{key}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file atomically."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomically(path, [save(plain)])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a file."""
    with safe_open(path, framework="pt") as handle:
        names = list(handle.keys())
        return {name: torch.as_tensor(handle.get_tensor(name)) for name in names}
