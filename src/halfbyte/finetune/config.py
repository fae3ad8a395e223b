"""What a fine-tuning run is asked to do; the command line is made from the fields."""

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
    """What the adapter is."""

    rank: int = option(16, "columns of the two factors", metavar="N")
    alpha: float = option(32.0, "the product of the factors counts alpha / rank", metavar="A")
    dropout: float = option(0.05, "share of the adapter's inputs that is left out", metavar="P")
    variant: str = option(
        "lora",
        "rslora: counts alpha / sqrt(rank); dora: also learns each row's length; qalora: the same "
        "for all columns of a group, so that it merges exactly",
        choices=VARIANTS,
    )
    targets: tuple[str, ...] = option(
        (),
        "a linear that gets an adapter, such as q_proj; may be given again (default: every linear "
        "but the head)",
        flag="--target",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        check_least(self, "rank", 1)
        check_positive(self, "alpha")
        check_share(self, "dropout", below_1=True)
        check_choice(self, "variant", VARIANTS)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "targets": list(self.targets)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How the adapter is trained."""

    epochs: float = option(3.0, "times through the data", metavar="N")
    max_steps: int | None = option(None, "steps at most (default: by epochs)", metavar="N")
    batch_size: int = option(8, "examples (rows, with --packing) per pass", metavar="N")
    accumulate: int = option(1, "passes per step of the optimizer", metavar="N")
    learning_rate: float = option(2e-4, "at its highest", metavar="RATE")
    schedule: str = option("cosine", "how the learning rate falls", choices=SCHEDULES)
    warmup: float = option(0.05, "share of the steps in which it rises", metavar="SHARE")
    optimizer: str = option(
        "adamw", "those of 8 bits need bitsandbytes and a GPU", choices=OPTIMIZERS
    )
    length: int = option(1024, "longest example in tokens; longer ones are cut", metavar="N")
    packing: bool = option(False, "put several examples into one row, kept apart")
    train_on: str = option(
        "answers", "what the loss counts: the assistant's words, or every token", choices=TRAINED
    )
    validation: float = option(0.1, "share of the data that is kept apart", metavar="SHARE")
    evaluate_every: int | None = option(
        None, "steps between looks at the data kept apart (default: ten looks)", metavar="N"
    )
    patience: int = option(3, "looks without progress before the run ends", metavar="N")
    checkpointing: bool = option(
        True,
        "keep no activations within a block, compute them again: less memory, a third slower",
        both=True,
    )
    dtype: str = option("auto", "type in which the model computes", choices=DTYPES)
    device: str = option("auto", "where to compute: cpu or cuda", metavar="NAME")
    seed: int = option(0, "order of the data, dropout and the adapter's start", metavar="N")

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "patience", "max_steps", "evaluate_every"):
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
        """Give plain values for JSON."""
        return asdict(self)
