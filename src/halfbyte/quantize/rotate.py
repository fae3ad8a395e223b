"""Rotates the residual stream of a model without changing its outputs, one block at a time.

::

    block -> run it -> which norms feed which linears, which linears write the stream
          -> fold gains and rotation into the weights -> run it again, compare -> shard
    ... x n -> embeddings and head -> index, tokenizer, config

No model family is special-cased. The readers and writers of the stream are found by running each
block, and a model is refused if a rotated block does not compute the same as before.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.output_folder import check_new_folder
from halfbyte.checkpoint.write import shard_name, write_index, write_json, write_shard
from halfbyte.errors import ModelError
from halfbyte.machine.devices import resolve_device
from halfbyte.model.blocks import linear_weight, set_linear_weight
from halfbyte.model.residual import ResidualRoles, find_roles
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights, map_tensor
from halfbyte.quantize.block_work import cast_block, split_experts
from halfbyte.quantize.head import head_name
from halfbyte.quantize.rotation import Rotation
from halfbyte.quantize.source import find_model
from halfbyte.version import __version__

ROTATION_FILE = "rotation.json"
TOKENS = 64
"""Tokens that every block is checked with."""
BLOCK_TOLERANCE = 1e-3
"""Allowed relative error of a block's fp32 outputs per token; a wrong rotation gives about 1."""
STORED_TOLERANCE = 0.03
"""Allowed relative error of embeddings and logits, which are checked in the stored dtype."""
ROUTED_SHARE = 0.9
"""Fraction of tokens that must pass in blocks with experts, whose routing may flip by rounding."""
ROWS = 8192
"""Rows of a large matrix that are rotated at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationReport:
    """Result of a rotation."""

    model: str
    output: str
    seed: int
    width: int
    num_blocks: int
    largest_error: float
    """Largest relative error of a block's outputs, in fp32, before rounding to the stored dtype."""
    untied_bytes: int
    """Size of the head if it was tied to the embeddings before; 0 if it was not."""
    num_bytes: int
    seconds: float
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return asdict(self)


def rotate(
    model: str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_block: Callable[[int, int], None] = lambda index, count: None,
) -> RotationReport:
    """Write a model with a rotated residual stream that computes the same outputs.

    The result is an ordinary 16-bit model, to be quantized and compared like any other.

    Args:
        model: A Hugging Face model folder, or a name on the Hub.
        output: A new folder.
        seed: Random seed of the rotation.
        device: Device to compute on.
        on_block: Called before every block with its index and the number of blocks.

    Returns:
        The report, which is also saved in the folder.

    Raises:
        ConfigError: The output is in use, or there is no such device.
        ModelError: The model does not compute the same with a rotated stream.
        CheckpointError: The model's files are damaged, or the disk is full.
    """
    source, target = find_model(model), Path(output)
    check_new_folder(target, source)
    with torch.no_grad():
        return _Rotator(str(model), source, target, seed, resolve_device(device)).run(on_block)


@dataclass(slots=True)
class _FirstBlockReached(Exception):  # ends a forward pass; not an error
    hidden: Tensor


class _Rotator:
    """The rotation of one model."""

    def __init__(
        self, name: str, source: Path, target: Path, seed: int, device: torch.device
    ) -> None:
        self.start = time.monotonic()
        self.name, self.target, self.seed = name, target, seed
        self.weights = ModelWeights(source, device)
        self.stream = BlockStream(self.weights.model, self.weights.blocks, torch.float32)
        self.width = int(self.weights.config.get_text_config().hidden_size)
        self.rotation = Rotation.random(self.width, seed, device)
        self.num_blocks = len(self.weights.blocks.modules)
        vocabulary = int(self.weights.config.get_text_config().vocab_size)
        self.ids = (torch.arange(1, TOKENS + 1) % vocabulary)[None].to(device)
        self.largest_error = 0.0
        self.files: dict[str, str] = {}
        self.num_bytes = 0

    def run(self, on_block: Callable[[int, int], None]) -> RotationReport:
        self.weights.load_outside()
        self._check_outside()
        self.target.mkdir(parents=True, exist_ok=True)
        try:
            embedded = hidden = self._embed()
            for index in range(self.num_blocks):
                on_block(index, self.num_blocks)
                hidden = self._rotate_block(index, hidden)
            untied = self._rotate_outside(embedded, hidden)
            report = RotationReport(
                model=self.name,
                output=str(self.target),
                seed=self.seed,
                width=self.width,
                num_blocks=self.num_blocks,
                largest_error=self.largest_error,
                untied_bytes=untied,
                num_bytes=self.num_bytes,
                seconds=time.monotonic() - self.start,
            )
            self._write_metadata(report)
        except BaseException:
            shutil.rmtree(self.target, ignore_errors=True)  # it was new or empty before
            raise
        return report

    def _check_outside(self) -> None:
        """Refuse unknown parameters outside the blocks, which might have to be rotated as well."""
        model = self.weights.model
        head = model.get_output_embeddings()
        known = {id(p) for m in (model.get_input_embeddings(), head) if m for p in m.parameters()}
        for name, parameter in model.named_parameters():
            inside = name.startswith(f"{self.weights.blocks.prefix}.")
            gains = name.endswith(".weight") and tuple(parameter.shape) == (self.width,)
            if not inside and not gains and id(parameter) not in known:
                raise self._error(
                    f"how to rotate {name}, which is outside its blocks, is not known"
                )

    def _embed(self) -> Tensor:
        """Return the input of the first block."""

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _FirstBlockReached(args[0] if args else kwargs["hidden_states"])

        first = self.weights.blocks.modules[0]
        with self.stream.at(0), first.register_forward_pre_hook(stop, with_kwargs=True):
            try:
                self.stream.run(self.ids, None)
            except _FirstBlockReached as reached:
                return reached.hidden
        raise self._error("it does not run its first block")

    def _rotate_block(self, index: int, hidden: Tensor) -> Tensor:
        """Rotate one block and write it; return the output of the original block."""
        weights, prefix = self.weights, self.weights.blocks.name(index)
        block = weights.load_block(index)
        split_experts(weights, index)
        cast_block(block, weights.dtype, torch.float32)
        expected: Tensor
        expected, roles = self._find_roles(index, block, hidden, lambda name: True)
        if not roles.readers or not roles.writers:
            raise self._error(f"in {prefix}, no norm feeds a linear or no linear writes the stream")
        changed = self._fold(block, roles)
        with self.stream.at(index):
            actual: Tensor = self.stream.run(self.ids, self.rotation.rotate(hidden))
        error = self._check(
            prefix, actual, self.rotation.rotate(expected), BLOCK_TOLERANCE, routed=roles.routed
        )
        self.largest_error = max(self.largest_error, error)
        inside = {f"{prefix}.{name}": tensor for name, tensor in changed.items()}
        self._write(index, weights.block_keys(index), inside)
        weights.drop_block(index)
        return expected

    def _rotate_outside(self, embedded: Tensor, hidden: Tensor) -> int:
        """Rotate and write everything outside the blocks; return the bytes that untying adds."""
        weights, model = self.weights, self.weights.model
        inside = f"{weights.blocks.prefix}."
        logits, roles = self._find_roles(
            self.num_blocks, model, hidden, lambda name: not name.startswith(inside)
        )
        name = head_name(model)
        if name is None or list(roles.readers.values()) != [[name]]:
            raise self._error("the output of its last norm is not read by the head alone")
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head.weight is embedding.weight
        norm = next(iter(roles.readers))
        gains, unit = self._take_gains(norm, model.get_submodule(norm))
        rotated = _map_rows(head.weight, lambda rows: self.rotation.rotate_reader(rows, gains))
        head.weight = nn.Parameter(rotated, requires_grad=False)
        with self.stream.at(self.num_blocks):
            actual = self.stream.run(self.ids, self.rotation.rotate(hidden)).logits
        self._check("its head", actual, logits.logits, STORED_TOLERANCE)
        vectors = _map_rows(embedding.weight, self.rotation.rotate)
        embedding.weight = nn.Parameter(vectors, requires_grad=False)
        expected = self.rotation.rotate(embedded)
        self._check("its embedding", self._embed(), expected, STORED_TOLERANCE)
        embedding_name = next(n for n, m in model.named_modules() if m is embedding)
        changed = {f"{embedding_name}.weight": vectors, f"{norm}.weight": unit}
        # The files of a tied model need not hold the head.
        added = {f"{weights.disk_name(name)}.weight": rotated} if tied else {}
        if not tied:
            changed[f"{name}.weight"] = rotated
        self._write(self.num_blocks, weights.outside_keys, changed, added)
        return rotated.numel() * rotated.element_size() if tied else 0

    def _find_roles(
        self, index: int, root: nn.Module, hidden: Tensor, include: Callable[[str], bool]
    ) -> tuple[Any, ResidualRoles]:
        """Run a block, or the tail, and find the readers and writers of the stream."""

        def run() -> Any:
            with self.stream.at(index):
                return self.stream.run(self.ids, hidden)

        return find_roles(root, self.width, run, include)

    def _fold(self, block: nn.Module, roles: ResidualRoles) -> dict[str, Tensor]:
        """Fold gains and rotation into the weights of a block; return those by name within it."""
        changed: dict[str, Tensor] = {}

        def replace_weight(name: str, weight: Tensor) -> None:
            linear = block.get_submodule(name)
            set_linear_weight(linear, weight)
            changed[f"{name}.weight"] = linear.weight.data  # type: ignore[assignment]

        for norm, readers in roles.readers.items():
            gains, changed[f"{norm}.weight"] = self._take_gains(norm, block.get_submodule(norm))
            for name in readers:
                weight = linear_weight(block.get_submodule(name))
                replace_weight(name, self.rotation.rotate_reader(weight, gains))
        for name in roles.writers:
            linear = block.get_submodule(name)
            replace_weight(name, self.rotation.rotate_writer(linear_weight(linear)))
            bias: Tensor | None = linear.bias  # type: ignore[assignment]
            if bias is not None:
                bias.data = changed[f"{name}.bias"] = self.rotation.rotate(bias.data)
        return changed

    def _take_gains(self, name: str, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Remove the gains of a norm; return them, and the norm's new weight."""
        weight: Tensor = norm.weight.data  # type: ignore[assignment]
        gains = weight.float().clone()
        probe = torch.linspace(-1, 2, self.width, device=weight.device)[None]
        plain = probe / probe.square().mean().sqrt()
        # Some norms multiply by their weight, some by 1 + weight.
        for unit in (1.0, 0.0):
            weight = torch.full_like(weight, unit)
            norm.weight = nn.Parameter(weight, requires_grad=False)
            if torch.allclose(norm(probe), plain, rtol=1e-3, atol=1e-3):
                return gains + (1 - unit), weight
        raise self._error(f"{name} ({type(norm).__name__}) is not an RMS norm")

    def _check(
        self,
        part: str,
        actual: Tensor,
        expected: Tensor,
        tolerance: float,
        *,
        routed: bool = False,
    ) -> float:
        """Check the outputs of a rotated part; return their relative error."""
        # Avoid a division by zero for zero embeddings, such as those of padding tokens.
        sizes = expected.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        errors = (actual.float() - expected.float()).norm(dim=-1) / sizes
        error = float(errors.flatten().quantile(ROUTED_SHARE) if routed else errors.max())
        if not error < tolerance:
            raise self._error(
                f"the outputs of {part} change by {error:.2g} relative, allowed is {tolerance:g}"
            )
        return error

    def _key(self, parameter: str, tensor: Tensor) -> str:
        """Return a parameter's name on disk."""
        module, _, suffix = parameter.rpartition(".")
        key = f"{self.weights.disk_name(module)}.{suffix}"
        info = self.weights.files.infos.get(key)
        if info is None or tuple(info.shape) != tuple(tensor.shape):
            raise self._error(f"its files store {parameter} under another name or shape")
        return key

    def _write(
        self,
        index: int,
        keys: Sequence[str],
        changed: Mapping[str, Tensor],
        added: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a shard of unchanged tensors, changed ones by name in the model, and added ones."""
        infos = self.weights.files.infos
        tensors = {key: map_tensor(infos[key]) for key in keys} | dict(added or {})
        for name, tensor in changed.items():
            key = self._key(name, tensor)
            tensors[key] = tensor.to(infos[key].dtype).contiguous()
        path = self.target / shard_name(index + 1, self.num_blocks + 1)
        digest = write_shard(path, tensors)
        self.files |= dict.fromkeys(tensors, path.name)
        self.num_bytes += digest.tensor_bytes

    def _write_metadata(self, report: RotationReport) -> None:
        """Write index, companion files and report, and config.json last, to mark completion."""
        source = self.weights.folder
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if report.untied_bytes:
            config["tie_word_embeddings"] = False
        write_index(self.target, self.files, self.num_bytes)
        copy_companions(source, self.target)
        write_json(self.target / ROTATION_FILE, report.to_dict())
        write_json(self.target / "config.json", config)

    def _error(self, reason: str) -> ModelError:
        return ModelError(
            f"Cannot rotate the residual stream of {self.name}: {reason}. Only models that read "
            "the stream through RMS norms followed by linears, and write it by linears, can be "
            "rotated: Llama, Mistral, Qwen, DeepSeek and similar. Quantize this model without "
            "rotating it."
        )


def _map_rows(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to a large matrix in chunks of rows, to limit the memory of fp32 copies."""
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for before, after in zip(torch.split(weight, ROWS), torch.split(result, ROWS), strict=True):
        after.copy_(function(before))
    return result
