"""Bytes of a training step of an adapter on a frozen base: QLoRA where the base is quantized."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.plan.devices import Device
from halfbyte.plan.memory import Load, plan_memory
from halfbyte.plan.shapes import Matrix, ModelShapes

OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Two moments of each trained number. A paged optimizer can leave the device for the host."""
ADAPTER_BYTES = 8
"""A trained number and its gradient, in fp32."""
KEPT_SHARE = 1.5
"""Hidden-sized tensors kept for each block: what it was given, and half of one in its norms."""
HIDDEN_COPIES, INNER_COPIES, NORM_COPIES = 5, 5, 4
"""Tensors of one block alive while it is computed again and taken back: in the computing type as
wide as the hidden state and as the MLP, and fp32 ones of norms. Fitted to
bench/measure_training_memory.py."""
LOGITS_AT_ONCE = 2**22
"""Numbers that the loss makes logits of at a time (``finetune/loss.py``)."""
LOGIT_COPIES = 3
"""Of those in fp32: themselves, their softmax, their gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLoad:
    """What is trained, and on how much at a time."""

    base: Load
    """The base; its context is the tokens of a row."""
    rank: int = 16
    targets: tuple[str, ...] = ()
    """Names of linears with an adapter; empty: all in the blocks."""
    batch_size: int = 1
    optimizer: str = "adamw"
    checkpointing: bool = True
    """Activations of a block are computed again on the way back."""

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
    """What a training step takes. All values in bytes but the first."""

    trained: int
    """Numbers of the adapter."""
    weights: int
    adapter: int
    """Its numbers and their gradients."""
    optimizer: int
    activations: int
    program: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.adapter + self.optimizer + self.activations + self.program

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON, in bytes."""
        return {**asdict(self), "total": self.total}


def plan_training(shapes: ModelShapes, load: TrainingLoad) -> TrainingPlan:
    """Work out what a training step takes.

    Args:
        shapes: The base model.
        load: What is trained on it.

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
        names: Such as ``q_proj``; none: all.

    Returns:
        The matrices.

    Raises:
        ConfigError: The model has no matrix of a name.
    """
    known = {matrix.name.rpartition(".")[2] for matrix in shapes.linears}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"There is no linear '{name}' in '{shapes.name}'; it has "
                f"{', '.join(sorted(known))}."
            )
    return [m for m in shapes.linears if not names or m.name.rpartition(".")[2] in names]


def _activation_bytes(shapes: ModelShapes, load: TrainingLoad, adapted: list[Matrix]) -> int:
    """Give what the blocks keep, the widest moment of one block, and the logits of a chunk.

    Adapters compute in fp32, so the inputs of the adapted linears are there once more.
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


def largest_batch(shapes: ModelShapes, load: TrainingLoad, device: Device) -> int:
    """Give the most rows at a time that fit a device; 0 where not one does.

    Args:
        shapes: The base model.
        load: What is trained; its batch size is not looked at.
        device: Where.

    Returns:
        Rows.
    """
    one, two = (plan_training(shapes, replace(load, batch_size=rows)).total for rows in (1, 2))
    if one > device.bytes:
        return 0
    return 1 + int((device.bytes - one) // max(two - one, 1))
