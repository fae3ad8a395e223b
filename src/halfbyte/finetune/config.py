"""Settings of a fine-tuning run; the command-line options are generated from the fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.config_fields import check_choice, check_least, check_positive, check_share, option
from halfbyte.run_config import DTYPES

QALORA = "qalora"
VARIANTS = ("lora", "rslora", "dora", QALORA)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
SCHEDULES = ("cosine", "linear", "constant")
TRAINED = ("answers", "everything")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Settings of the adapter."""

    rank: int = option(16, "rank of the adapter", metavar="N")
    alpha: float = option(32.0, "the adapter's output is scaled by alpha / rank", metavar="A")
    dropout: float = option(0.05, "dropout probability of the adapter's inputs", metavar="P")
    variant: str = option(
        "lora",
        "rslora: scaled by alpha / sqrt(rank); dora: also learns the norm of each row; qalora: "
        "constant over the columns of a group, so that it merges exactly",
        choices=VARIANTS,
    )
    targets: tuple[str, ...] = option(
        (),
        "linear layer to adapt, such as q_proj; repeatable (default: all but the head)",
        flag="--target",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        check_least(self, "rank", 1)
        check_positive(self, "alpha")
        check_share(self, "dropout", below_1=True)
        check_choice(self, "variant", VARIANTS)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "targets": list(self.targets)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of the training."""

    epochs: float = option(3.0, "passes over the training data", metavar="N")
    max_steps: int | None = option(
        None, "maximum number of steps (default: by epochs)", metavar="N"
    )
    batch_size: int = option(8, "examples (rows, with --packing) per forward pass", metavar="N")
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", metavar="N")
    learning_rate: float = option(2e-4, "peak learning rate", metavar="RATE")
    schedule: str = option("cosine", "learning rate schedule after the warmup", choices=SCHEDULES)
    warmup: float = option(0.05, "share of the steps for learning rate warmup", metavar="SHARE")
    optimizer: str = option(
        "adamw", "the 8-bit ones need bitsandbytes and a GPU", choices=OPTIMIZERS
    )
    length: int = option(1024, "maximum tokens per example; longer ones are truncated", metavar="N")
    packing: bool = option(False, "put several examples into a row; they do not see each other")
    train_on: str = option(
        "answers", "tokens that the loss counts: the assistant's, or all", choices=TRAINED
    )
    validation: float = option(0.1, "share of the data that is held out", metavar="SHARE")
    evaluate_every: int | None = option(
        None, "steps between evaluations on held-out data (default: ten evaluations)", metavar="N"
    )
    patience: int = option(3, "evaluations without improvement before early stopping", metavar="N")
    checkpointing: bool = option(
        True,
        "gradient checkpointing: recompute activations; less memory, about a third slower",
        both=True,
    )
    dtype: str = option("auto", "dtype to compute in", choices=DTYPES)
    device: str = option("auto", "device to compute on: cpu or cuda", metavar="NAME")
    seed: int = option(
        0, "seed of the data order, the dropout and the adapter's initialization", metavar="N"
    )

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "patience",
            "max_steps",
            "evaluate_every",
        ):
            check_least(self, name, 1)
        check_least(self, "length", 2)
        check_positive(self, "epochs")
        check_positive(self, "learning_rate")
        check_share(self, "warmup", below_1=True)
        check_share(self, "validation", below_1=True)
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "train_on", TRAINED)
        check_choice(self, "dtype", DTYPES)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
