"""A model folder -> the same model in a turned residual stream, one block in memory at a time.

::

    block -> run it -> which norms feed which linears, which linears write the stream
          -> gains and rotation into the weights -> run it on the turned stream, compare -> shard
    ... x n -> embeddings and head -> index, tokenizer, config

Nothing here knows a model family. What reads the stream is found by running each block, and a
model for which the turned block computes anything else is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.new_folder import check_new_folder
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
"""That every block is checked with."""
BLOCK_TOLERANCE = 1e-3
"""Of a block's outputs in fp32, by token; a part that does not turn is off by their own size."""
STORED_TOLERANCE = 0.03
"""Of embeddings and logits, which are checked as they will be stored."""
ROUTED_SHARE = 0.9
"""Of the tokens are checked where the last digit may send one to another expert."""
ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationReport:
    """What was written."""

    model: str
    output: str
    seed: int
    width: int
    num_blocks: int
    largest_error: float
    """Of a block's outputs, relative, in fp32, before its weights are rounded to be stored."""
    untied_bytes: int
    """What the head takes that was tied to the embeddings before; 0 where it was not."""
    num_bytes: int
    seconds: float
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)


def rotate(
    model: str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_block: Callable[[int, int], None] = lambda index, count: None,
) -> RotationReport:
    """Write a model folder that computes the same with its residual stream turned.

    The result is an ordinary 16-bit model: quantize it, and compare with it, as with any other.

    Args:
        model: A Hugging Face model folder, or a name on the Hub.
        output: New folder.
        seed: Draws the rotation.
        device: Where to compute.
        on_block: Told of every block that is taken up, from 0, and their number.

    Returns:
        What was written; it also stands in the folder.

    Raises:
        ConfigError: The output is in use, or there is no such device.
        ModelError: The model does not compute the same when its stream is turned.
        CheckpointError: The model's files are damaged, or the disk is full.
    """
    source, target = find_model(model), Path(output)
    check_new_folder(target)
    with torch.no_grad():
        return _Turning(str(model), source, target, seed, resolve_device(device)).run(on_block)


@dataclass(slots=True)
class _Reached(Exception):  # ends a forward, reports no error
    hidden: Tensor


class _Turning:
    """One model on its way into another basis."""

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
                hidden = self._turn_block(index, hidden)
            untied = self._turn_outside(embedded, hidden)
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
            self._describe(report)
        except BaseException:
            for path in self.target.iterdir():  # it was empty, or new
                path.unlink()
            raise
        return report

    def _check_outside(self) -> None:
        """Refuse what else may stand beside the blocks: it would have to be turned, too."""
        model = self.weights.model
        head = model.get_output_embeddings()
        known = {id(p) for m in (model.get_input_embeddings(), head) if m for p in m.parameters()}
        for name, parameter in model.named_parameters():
            inside = name.startswith(f"{self.weights.blocks.prefix}.")
            gains = name.endswith(".weight") and tuple(parameter.shape) == (self.width,)
            if not inside and not gains and id(parameter) not in known:
                raise self._refusal(f"{name} is outside its blocks and not known to turn with it")

    def _embed(self) -> Tensor:
        """Give what reaches the first block."""

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        first = self.weights.blocks.modules[0]
        with self.stream.at(0), first.register_forward_pre_hook(stop, with_kwargs=True):
            try:
                self.stream.run(self.ids, None)
            except _Reached as reached:
                return reached.hidden
        raise self._refusal("it does not run its first block")

    def _turn_block(self, index: int, hidden: Tensor) -> Tensor:
        """Turn one block and write it; give what the base model makes of the hidden states."""
        weights, prefix = self.weights, self.weights.blocks.name(index)
        block = weights.load_block(index)
        split_experts(weights, index)
        cast_block(block, weights.dtype, torch.float32)
        expected: Tensor
        expected, roles = self._find_roles(index, block, hidden, lambda name: True)
        if not roles.readers or not roles.writers:
            raise self._refusal(f"no norm feeds a linear of {prefix}, or none of them writes it")
        changed = self._fold(block, roles)
        with self.stream.at(index):
            found: Tensor = self.stream.run(self.ids, self.rotation.turn(hidden))
        error = self._check(
            prefix, found, self.rotation.turn(expected), BLOCK_TOLERANCE, routed=roles.routed
        )
        self.largest_error = max(self.largest_error, error)
        inside = {f"{prefix}.{name}": tensor for name, tensor in changed.items()}
        self._write(index, weights.block_keys(index), inside)
        weights.drop_block(index)
        return expected

    def _turn_outside(self, embedded: Tensor, hidden: Tensor) -> int:
        """Turn embeddings and head, and write what no block holds; give the bytes of untying."""
        weights, model = self.weights, self.weights.model
        inside = f"{weights.blocks.prefix}."
        logits, roles = self._find_roles(
            self.num_blocks, model, hidden, lambda name: not name.startswith(inside)
        )
        name = head_name(model)
        if name is None or list(roles.readers.values()) != [[name]]:
            raise self._refusal("its head does not read what its last norm gives, and that alone")
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head.weight is embedding.weight
        norm = next(iter(roles.readers))
        gains, unit = self._take_gains(norm, model.get_submodule(norm))
        turned = _by_rows(head.weight, lambda rows: self.rotation.turn_reader(rows, gains))
        head.weight = nn.Parameter(turned, requires_grad=False)
        with self.stream.at(self.num_blocks):
            found = self.stream.run(self.ids, self.rotation.turn(hidden)).logits
        self._check("its head", found, logits.logits, STORED_TOLERANCE)
        vectors = _by_rows(embedding.weight, self.rotation.turn)
        embedding.weight = nn.Parameter(vectors, requires_grad=False)
        expected = self.rotation.turn(embedded)
        self._check("its embedding", self._embed(), expected, STORED_TOLERANCE)
        place = next(n for n, m in model.named_modules() if m is embedding)
        changed = {f"{place}.weight": vectors, f"{norm}.weight": unit}
        # The files of a tied model need not hold the head.
        added = {f"{weights.disk_name(name)}.weight": turned} if tied else {}
        if not tied:
            changed[f"{name}.weight"] = turned
        self._write(self.num_blocks, weights.outside_keys, changed, added)
        return turned.numel() * turned.element_size() if tied else 0

    def _find_roles(
        self, index: int, root: nn.Module, hidden: Tensor, counts: Callable[[str], bool]
    ) -> tuple[Any, ResidualRoles]:
        """Run a block, or what is behind the last one, and see who reads and writes the stream."""

        def run() -> Any:
            with self.stream.at(index):
                return self.stream.run(self.ids, hidden)

        return find_roles(root, self.width, run, counts)

    def _fold(self, block: nn.Module, roles: ResidualRoles) -> dict[str, Tensor]:
        """Move gains and rotation into the weights of a block; give them by name within it."""
        changed: dict[str, Tensor] = {}

        def put(name: str, weight: Tensor) -> None:
            linear = block.get_submodule(name)
            set_linear_weight(linear, weight)
            changed[f"{name}.weight"] = linear.weight.data  # type: ignore[assignment]

        for norm, readers in roles.readers.items():
            gains, changed[f"{norm}.weight"] = self._take_gains(norm, block.get_submodule(norm))
            for name in readers:
                weight = linear_weight(block.get_submodule(name))
                put(name, self.rotation.turn_reader(weight, gains))
        for name in roles.writers:
            linear = block.get_submodule(name)
            put(name, self.rotation.turn_writer(linear_weight(linear)))
            bias: Tensor | None = linear.bias  # type: ignore[assignment]
            if bias is not None:
                bias.data = changed[f"{name}.bias"] = self.rotation.turn(bias.data)
        return changed

    def _take_gains(self, name: str, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Leave a norm without gains; give them, and the weight that it has now."""
        weight: Tensor = norm.weight.data  # type: ignore[assignment]
        gains = weight.float().clone()
        probe = torch.linspace(-1, 2, self.width, device=weight.device)[None]
        plain = probe / probe.square().mean().sqrt()
        # Some norms multiply with their weight, some with 1 more.
        for unit in (1.0, 0.0):
            weight = torch.full_like(weight, unit)
            norm.weight = nn.Parameter(weight, requires_grad=False)
            if torch.allclose(norm(probe), plain, rtol=1e-3, atol=1e-3):
                return gains + (1 - unit), weight
        raise self._refusal(f"{name} ({type(norm).__name__}) is not an RMS norm")

    def _check(
        self,
        what: str,
        found: Tensor,
        expected: Tensor,
        tolerance: float,
        *,
        routed: bool = False,
    ) -> float:
        """Compare what a turned part computes with what it should; give the relative error."""
        # A token whose embedding is zero, as of padding, stays so.
        sizes = expected.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        errors = (found.float() - expected.float()).norm(dim=-1) / sizes
        error = float(errors.flatten().quantile(ROUTED_SHARE) if routed else errors.max())
        if not error < tolerance:
            raise self._refusal(
                f"turned, {what} computes something else (off by {error:.2g} of its outputs)"
            )
        return error

    def _key(self, parameter: str, tensor: Tensor) -> str:
        """Give a parameter's name on disk."""
        module, _, suffix = parameter.rpartition(".")
        key = f"{self.weights.disk_name(module)}.{suffix}"
        info = self.weights.files.infos.get(key)
        if info is None or tuple(info.shape) != tuple(tensor.shape):
            raise self._refusal(f"its files hold {parameter} in another form")
        return key

    def _write(
        self,
        index: int,
        keys: Sequence[str],
        changed: Mapping[str, Tensor],
        added: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a shard: tensors on disk as they are or, by name in the model, as they are now."""
        infos = self.weights.files.infos
        tensors = {key: map_tensor(infos[key]) for key in keys} | dict(added or {})
        for name, tensor in changed.items():
            key = self._key(name, tensor)
            tensors[key] = tensor.to(infos[key].dtype).contiguous()
        path = self.target / shard_name(index + 1, self.num_blocks + 1)
        digest = write_shard(path, tensors)
        self.files |= dict.fromkeys(tensors, path.name)
        self.num_bytes += digest.tensor_bytes

    def _describe(self, report: RotationReport) -> None:
        """Write what makes the shards a model, the config at last: a part of one has none."""
        source = self.weights.folder
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if report.untied_bytes:
            config["tie_word_embeddings"] = False
        write_index(self.target, self.files, self.num_bytes)
        copy_companions(source, self.target)
        write_json(self.target / ROTATION_FILE, report.to_dict())
        write_json(self.target / "config.json", config)

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"Cannot turn the residual stream of {self.name}: {why}. A model can be rotated that "
            "reads it through RMS norms in front of linears, and writes it by linears: Llama, "
            "Mistral, Qwen, DeepSeek and the like. Quantize this one as it is."
        )


def _by_rows(weight: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Turn a large matrix in parts: in fp32 it would take twice its memory."""
    turned = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for before, after in zip(torch.split(weight, ROWS), torch.split(turned, ROWS), strict=True):
        after.copy_(turn(before))
    return turned
