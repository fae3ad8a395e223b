"""Memory of training an adapter on a frozen base model (QLoRA if the base is quantized)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.plan.devices import Device
from halfbyte.plan.memory import Load, plan_memory
from halfbyte.plan.shapes import Matrix, ModelShapes

OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Two moments per trained parameter. A paged optimizer can move to host memory."""
ADAPTER_BYTES = 8
"""A trained parameter and its gradient, in fp32."""
KEPT_SHARE = 1.5
"""Hidden-sized tensors kept per block: its input, and half a tensor in its norms."""
HIDDEN_COPIES, INNER_COPIES, NORM_COPIES = 5, 5, 4
"""Tensors of one block alive during its recomputation and backward pass: hidden-sized and MLP-sized
ones in the compute dtype, and hidden-sized fp32 ones of norms. Fitted to
bench/measure_training_memory.py."""
LOGITS_AT_ONCE = 2**22
"""Logits that the loss computes at a time (``finetune/loss.py``)."""
LOGIT_COPIES = 3
"""Their fp32 copies: logits, softmax, gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLoad:
    """The training workload to plan for."""

    base: Load
    """The base model; its context is the tokens per row."""
    rank: int = 16
    targets: tuple[str, ...] = ()
    """Names of linears with an adapter; empty means all in the blocks."""
    batch_size: int = 1
    optimizer: str = "adamw"
    checkpointing: bool = True
    """Gradient checkpointing: a block's activations are recomputed in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.optimizer not in OPTIMIZER_BYTES:
            raise ConfigError(
                f"optimizer is '{self.optimizer}'; allowed are {', '.join(OPTIMIZER_BYTES)}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Memory of a training step, by part. All values in bytes except the first."""

    trained: int
    """Number of adapter parameters."""
    weights: int
    adapter: int
    """Adapter parameters and their gradients."""
    optimizer: int
    activations: int
    program: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.adapter + self.optimizer + self.activations + self.program

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values, in bytes."""
        return {**asdict(self), "total": self.total}


def plan_training(shapes: ModelShapes, load: TrainingLoad) -> TrainingPlan:
    """Estimate the memory of a training step.

    Args:
        shapes: The base model.
        load: The training workload.

    Returns:
        Bytes by part.
    """
    adapted = find_targets(shapes, load.targets)
    trained = sum(load.rank * (m.in_features + m.out_features) * m.count for m in adapted)
    plan = plan_memory(shapes, load.base)
    return TrainingPlan(
        trained=trained,
        weights=plan.weights,
        adapter=ADAPTER_BYTES * trained,
        optimizer=OPTIMIZER_BYTES[load.optimizer] * trained,
        activations=_activation_bytes(shapes, load, adapted),
        program=plan.program,
    )


def find_targets(shapes: ModelShapes, names: tuple[str, ...]) -> list[Matrix]:
    """Find the matrices that get an adapter.

    Args:
        shapes: The model.
        names: Such as ``q_proj``; empty means all. In a mixture of experts, those named like the
            projections of the experts get no adapter, as in :mod:`halfbyte.finetune.adapter`.

    Returns:
        The matrices.

    Raises:
        ConfigError: The model has no matrix of one of the names.
    """
    experts = {_leaf(m) for m in shapes.linears if m.name.startswith("experts.")}
    linears = [m for m in shapes.linears if _leaf(m) not in experts]
    known = {_leaf(matrix) for matrix in linears}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"There is no linear '{name}' in '{shapes.name}'; it has "
                f"{', '.join(sorted(known))}. Use one of these."
            )
    return [m for m in linears if not names or _leaf(m) in names]


def _leaf(matrix: Matrix) -> str:
    return matrix.name.rpartition(".")[2]


def _activation_bytes(shapes: ModelShapes, load: TrainingLoad, adapted: list[Matrix]) -> int:
    """Return what all blocks keep, plus the peak of one block and the logits of one chunk.

    Adapters compute in fp32, so each adapted linear keeps an fp32 copy of its input.
    """
    base = load.base
    tokens = load.batch_size * base.context
    kept = int(KEPT_SHARE * shapes.hidden) * base.compute_bytes
    block = base.compute_bytes * (HIDDEN_COPIES * shapes.hidden + INNER_COPIES * shapes.inner)
    block += 4 * NORM_COPIES * shapes.hidden
    block += 4 * sum(m.in_features * m.active for m in adapted) // max(shapes.layers, 1)
    at_once = block if load.checkpointing else block * shapes.layers
    logits = min(LOGITS_AT_ONCE, tokens * shapes.vocabulary)
    return tokens * (kept * shapes.layers + at_once) + 4 * LOGIT_COPIES * logits


def max_batch_size(shapes: ModelShapes, load: TrainingLoad, device: Device) -> int:
    """Return the largest batch size that fits a device; 0 if not even one row does.

    Args:
        shapes: The base model.
        load: The training workload; its batch size is ignored.
        device: The device.

    Returns:
        Rows per step.
    """
    one, two = (plan_training(shapes, replace(load, batch_size=rows)).total for rows in (1, 2))
    if one > device.bytes:
        return 0
    return 1 + int((device.bytes - one) // max(two - one, 1))
