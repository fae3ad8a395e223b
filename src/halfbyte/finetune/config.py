"""What a fine-tuning run is asked to do; the command line is made from the fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from halfbyte.errors import ConfigError

QALORA = "qalora"
VARIANTS = ("lora", "rslora", "dora", QALORA)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
SCHEDULES = ("cosine", "linear", "constant")
TRAINED = ("answers", "everything")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ALL_LINEAR = "all-linear"


def _option(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What the adapter is."""

    rank: int = _option(16, "columns of the two factors", metavar="N")
    alpha: float = _option(32.0, "the product of the factors counts alpha / rank", metavar="A")
    dropout: float = _option(0.05, "share of the adapter's inputs that is left out", metavar="P")
    variant: str = _option(
        "lora",
        "rslora: counts alpha / sqrt(rank); dora: also learns each row's length; qalora: the same "
        "for all columns of a group, so that it merges exactly",
        choices=VARIANTS,
    )
    targets: tuple[str, ...] = _option(
        (),
        "a linear that gets an adapter, such as q_proj; may be given again (default: every linear "
        "but the head)",
        flag="--target",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        _check_least(self, "rank", 1)
        _check_positive(self, "alpha")
        _check_share(self, "dropout")
        _check_choice(self, "variant", VARIANTS)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "targets": list(self.targets)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How the adapter is trained."""

    epochs: float = _option(3.0, "times through the data", metavar="N")
    max_steps: int | None = _option(None, "steps at most (default: by epochs)", metavar="N")
    batch_size: int = _option(8, "examples (rows, with --packing) per pass", metavar="N")
    accumulate: int = _option(1, "passes per step of the optimizer", metavar="N")
    learning_rate: float = _option(2e-4, "at its highest", metavar="RATE")
    schedule: str = _option("cosine", "how the learning rate falls", choices=SCHEDULES)
    warmup: float = _option(0.05, "share of the steps in which it rises", metavar="SHARE")
    optimizer: str = _option(
        "adamw", "those of 8 bits need bitsandbytes and a GPU", choices=OPTIMIZERS
    )
    length: int = _option(1024, "longest example in tokens; longer ones are cut", metavar="N")
    packing: bool = _option(False, "put several examples into one row, kept apart")
    train_on: str = _option(
        "answers", "what the loss counts: the assistant's words, or every token", choices=TRAINED
    )
    validation: float = _option(0.1, "share of the data that is kept apart", metavar="SHARE")
    evaluate_every: int | None = _option(
        None, "steps between looks at the data kept apart (default: ten looks)", metavar="N"
    )
    patience: int = _option(3, "looks without progress before the run ends", metavar="N")
    checkpointing: bool = _option(
        True,
        "keep no activations within a block, compute them again: less memory, a third slower",
        both=True,
    )
    dtype: str = _option("auto", "type in which the model computes", choices=DTYPES)
    device: str = _option("auto", "where to compute: cpu or cuda", metavar="NAME")
    seed: int = _option(0, "order of the data, dropout and the adapter's start", metavar="N")

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "patience"):
            _check_least(self, name, 1)
        _check_least(self, "length", 2)
        for name in ("max_steps", "evaluate_every"):
            if getattr(self, name) is not None:
                _check_least(self, name, 1)
        _check_positive(self, "epochs")
        _check_positive(self, "learning_rate")
        _check_share(self, "warmup")
        _check_share(self, "validation")
        _check_choice(self, "schedule", SCHEDULES)
        _check_choice(self, "optimizer", OPTIMIZERS)
        _check_choice(self, "train_on", TRAINED)
        _check_choice(self, "dtype", DTYPES)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)


def _check_least(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more.")


def _check_positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0.")


def _check_share(config: Any, name: str) -> None:
    value = getattr(config, name)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be 0 or more and less than 1.")


def _check_choice(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
