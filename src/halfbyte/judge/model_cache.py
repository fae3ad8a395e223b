"""Where one model's answers and predictions wait on disk, by what the model is.

::

    CACHE/<digest>-<dtype>-<device>/answers.jsonl          answers, one JSON line each
                                    states/<key>.safetensors   predictions of a passage
                                    head.safetensors           the output layer behind the states
                                    layers-<key>.safetensors   inputs and outputs of its linears

The digest is that of the weights, the configuration and the tokenizer, and of what computes with
them: another model, the same folder with other bytes, or another version, has another place.
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
    """Name a model's place by everything that its answers depend on, but the question.

    Args:
        files: As :func:`halfbyte.checkpoint.identity.digest_files` gives them.
        dtype: What it was asked to compute in.
        device: Where.

    Returns:
        A digest of the files, the packages' versions, the processor or GPU and its kernels; behind
        it, to be read, type and device.
    """
    facts = machine_facts()
    chip = facts["gpu" if device.type == "cuda" else "processor"]
    kernels = [entry.name for entry in KERNELS if load_kernel(entry).find_obstacle() is None]
    asked = [read_variable(variable) for variable in (KERNEL, CPU_ISA)]
    name = digest([digest_all(files), installed_versions(), chip, kernels, asked])
    return f"{name}-{dtype}-{device.type}"


class ModelCache:
    """One model's place in the cache."""

    def __init__(self, root: Path, name: str, *, fresh: bool = False) -> None:
        """Open it, and make it where it is missing.

        Args:
            root: The cache.
            name: Digest and whatever else the numbers depend on.
            fresh: Forget earlier answers.

        Raises:
            ConfigError: There can be no such folder.
        """
        self.folder = root / name
        try:
            (self.folder / "states").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot keep answers in '{root}': {error.strerror}. Name another folder (--cache)."
            ) from error
        self.answers = AnswerFile(self.folder / "answers.jsonl", fresh=fresh)
        self._head: dict[str, Tensor] | None = None

    def has_states(self, key: str) -> bool:
        """Tell whether the predictions of a passage are there."""
        return self._states_path(key).is_file()

    def keep_states(self, key: str, prediction: Prediction) -> None:
        """Write the predictions of a passage down, the last ones only where only they were made."""
        tensors = {"logits" if prediction.are_logits else "states": prediction.states}
        write_tensors(self._states_path(key), tensors)

    def load_logits(self, key: str) -> Tensor:
        """Give the logits of a passage.

        Args:
            key: Under which its predictions were kept.

        Returns:
            [tokens, vocabulary], on the CPU.
        """
        tensors = read_tensors(self._states_path(key))
        if "logits" in tensors:
            return tensors["logits"]
        if self._head is None:
            self._head = read_tensors(self.folder / "head.safetensors")
        return functional.linear(tensors["states"], self._head["weight"], self._head.get("bias"))

    def drop_head(self) -> None:
        """Give the memory of the output layer back."""
        self._head = None

    def keep_head(self, model: LocalModel) -> None:
        """Write the output layer down, once."""
        path = self.folder / "head.safetensors"
        if path.is_file() or model.head is None:
            return
        tensors = {
            name: tensor
            for name in ("weight", "bias")
            if isinstance(tensor := getattr(model.head, name, None), Tensor)
        }
        if isinstance(model.head, QuantLinear):
            # Its weight only stands for one.
            tensors["weight"] = model.head.dequantize()
        write_tensors(path, tensors)

    def _states_path(self, key: str) -> Path:
        return self.folder / "states" / f"{key}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a file, whole or not at all."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomically(path, [save(plain)])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file; pages become resident as they are read."""
    with safe_open(path, framework="pt") as handle:
        names = list(handle.keys())
        return {name: torch.as_tensor(handle.get_tensor(name)) for name in names}
