"""What a quantization run is asked to do: frozen dataclasses that the CLI and Python share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from halfbyte.config_fields import (
    as_sequence,
    check_choice,
    check_keys,
    check_least,
    check_pattern,
    check_range,
    check_types,
    option,
)  # fmt: skip
from halfbyte.errors import ConfigError
from halfbyte.run_config import DTYPES
from halfbyte.units import parse_size

SUPPORTED_BITS = (2, 3, 4, 8)
"""Bit widths that have one agreed layout on disk."""

PER_CHANNEL = -1
"""``group_size`` that means one scale per output row."""

MOST_POLISH = 20
MOST_SEED = 2**32 - 1
MOST_BITS = 9
"""8 bits with scales and zeros of groups of 32."""

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"match_base": True, "polish": 1},
    "best": {
        "match_base": True,
        "weigh_tokens": True,
        "polish": 1,
        "tune_steps": 200,
        "end_to_end_steps": 120,
    },
}
"""Settings of :class:`QuantConfig` by what they are for: little time, or more quality."""

DEFAULT_SHRINKAGE = 0.4
"""Measured: docs/concepts/quality.md."""

OVERRIDE_KEYS = ("bits", "group_size", "symmetric")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one linear is rounded: its bits, its groups, its kind of grid."""

    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Other bits, group size or symmetry for the modules whose name matches a pattern."""

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_pattern("override", self.pattern)
        if self.bits is not None:
            check_choice(self, "bits", SUPPORTED_BITS)
        if self.group_size is not None:
            _check_group_size(self.group_size)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PATTERN=KEY:VALUE,KEY:VALUE``, for example ``mlp.down_proj=bits:8,group_size:32``.

        Args:
            text: The command line's form.

        Returns:
            The override.

        Raises:
            ConfigError: The text is not of that form; says which part.
        """
        pattern, equals, rest = text.rpartition("=")
        if not equals or not pattern or not rest:
            raise ConfigError(
                f"Cannot read override '{text}': it has no 'PATTERN=KEY:VALUE'. "
                "Example: --override mlp.down_proj=bits:8,group_size:32"
            )
        values: dict[str, Any] = {}
        for item in rest.split(","):
            key, colon, value = item.partition(":")
            if key not in OVERRIDE_KEYS or not colon:
                raise ConfigError(
                    f"Cannot read '{item}' in override '{text}'. "
                    f"Allowed keys: {', '.join(OVERRIDE_KEYS)}, each as KEY:VALUE."
                )
            values[key] = _parse_override_value(key, value, text)
        return cls(pattern=pattern, **values)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read plain values; an unknown or missing key is a ConfigError."""
        if not isinstance(values, dict) or "pattern" not in values:
            raise ConfigError(
                f"Cannot read override {values!r}: it has no pattern. "
                'Example: {"pattern": "mlp.down_proj", "bits": 8}'
            )
        check_keys(cls, values)
        return cls(**values)


def _parse_override_value(key: str, value: str, text: str) -> int | bool:
    if key == "symmetric":
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"symmetric in override '{text}' is '{value}'. Use true or false.")
        return value.lower() == "true"
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{key} in override '{text}' is '{value}', not an integer.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """How weights are rounded. Every combination that passes the checks can be written and read."""

    bits: int = option(4, "bits per weight", choices=SUPPORTED_BITS)
    group_size: int = option(
        128, "input columns that share a scale; -1: one scale per output row", metavar="N"
    )
    symmetric: bool = option(
        True, "one zero point per group instead of the fixed middle code", flag="--asymmetric"
    )
    desc_act: bool = option(
        False, "form groups in order of falling activation (slower to run; writes g_idx)"
    )
    act_order: bool = option(
        True,
        "round columns in their stored order, not by falling activation",
        flag="--no-act-order",
    )
    damping: float = option(
        0.01, "added to the Hessian's diagonal, as a fraction of its mean", metavar="X"
    )
    shrinkage: float = option(
        DEFAULT_SHRINKAGE,
        "share taken off the products of different inputs in the Hessian: more stays nearer to "
        "plain rounding and serves other kinds of text",
        metavar="X",
    )
    match_base: bool = option(
        False,
        "aim at the outputs of the unquantized model, which runs beside (twice the forward passes)",
        both=True,
    )
    weigh_tokens: bool = option(
        False,
        "let each calibration token count by how much the predictions hang on it (the text goes "
        "through the unquantized model and back first)",
        both=True,
    )
    polish: int = option(
        0, "rounds of moving codes and scales once more after the sweep", metavar="ROUNDS"
    )
    tune_steps: int = option(
        0,
        "steps of training the codes of each block on its outputs; needs --match-base",
        metavar="STEPS",
    )
    end_to_end_steps: int = option(
        0,
        "steps of training all scales and norm gains on the base model's predictions, at most; "
        "needs --match-base",
        metavar="STEPS",
    )
    ragged_groups: bool = option(
        False, "where the group size does not divide a layer's width, write a shorter last group"
    )
    target_bits: float | None = option(
        None,
        "choose bits for each module by what they measurably cost, up to this mean of bits per "
        "weight, scales and zeros included",
        metavar="X",
    )
    target_size: str | None = option(
        None, "the same, up to this size of the whole checkpoint, such as 4GB", metavar="SIZE"
    )
    skip: tuple[str, ...] = option((), "leave matching modules in 16 bits", metavar="PATTERN")
    overrides: tuple[Override, ...] = option(
        (),
        "other settings for matching modules",
        metavar="PATTERN=KEY:VALUE,...",
        flag="--override",
    )
    lm_head: bool = option(False, "quantize the output head too (unties it from the embeddings)")

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "bits", SUPPORTED_BITS)
        _check_group_size(self.group_size)
        if not 0 < self.damping < 1:
            raise ConfigError(
                f"damping is {self.damping}; allowed is 0 < damping < 1. Use 0.01 for 4 bits."
            )
        advice = f"Use {DEFAULT_SHRINKAGE}, or 0 for GPTQ as published."
        check_range(self, "shrinkage", 0, 1, advice)
        check_range(self, "polish", 0, MOST_POLISH, "Use 1, or 0 to leave it.")
        for name in ("tune_steps", "end_to_end_steps"):
            steps = getattr(self, name)
            if steps < 0 or (steps and not self.match_base):
                raise ConfigError(
                    f"{name} is {steps} and match_base {self.match_base}: what is trained, 1 step "
                    "or more, is trained on what the unquantized model computes. Add match_base, "
                    "or use 0 steps."
                )
        if self.target_bits is not None and self.target_size is not None:
            raise ConfigError(
                f"target_bits is {self.target_bits:g} and target_size {self.target_size}: one of "
                "them decides. Leave the other out."
            )
        if self.target_bits is not None and not SUPPORTED_BITS[0] < self.target_bits <= MOST_BITS:
            raise ConfigError(
                f"target_bits is {self.target_bits:g}; allowed is more than {SUPPORTED_BITS[0]}, "
                f"and {MOST_BITS} at most. Use 3.5, or 4.25 to spend what 4 bits in groups of 64 "
                "take."
            )
        if self.target_size is not None:
            parse_size(self.target_size, "target_size")
        for pattern in self.skip:
            check_pattern("skip", pattern)

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Self:
        """Take the settings of a preset where no others are given.

        Args:
            name: One of ``PRESETS``.
            **settings: Fields of this class.

        Returns:
            The config.

        Raises:
            ConfigError: There is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset '{name}'. Allowed: {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **settings})

    @property
    def needs_check(self) -> bool:
        """Whether part of the text must be kept apart to confirm what the rest proposes."""
        return self.match_base or self.polish > 0

    @property
    def chooses_bits(self) -> bool:
        """Whether bits are chosen by what they cost."""
        return self.target_bits is not None or self.target_size is not None

    def fixes_bits(self, module_name: str) -> bool:
        """Say whether an override gives a module's bits, so that they are not to be chosen."""
        return any(o.bits is not None and re.search(o.pattern, module_name) for o in self.overrides)

    def with_bits(self, bits: Mapping[str, int]) -> Self:
        """Give the same config with other bits for modules whose bits no override gives.

        Args:
            bits: By full name.

        Returns:
            The config.
        """
        chosen = tuple(
            Override(pattern=f"^{re.escape(name)}$", bits=number) for name, number in bits.items()
        )
        return replace(self, overrides=(*chosen, *self.overrides))

    def scheme_for(self, module_name: str) -> Scheme | None:
        """Say how a module is to be rounded.

        Args:
            module_name: Full dotted name. A pattern matches anywhere in it, as ``re.search`` does.

        Returns:
            The scheme, or None where a skip pattern matches. The last matching override wins.
        """
        if any(re.search(pattern, module_name) for pattern in self.skip):
            return None
        bits, group_size, symmetric = self.bits, self.group_size, self.symmetric
        for override in self.overrides:
            if re.search(override.pattern, module_name):
                bits = bits if override.bits is None else override.bits
                group_size = group_size if override.group_size is None else override.group_size
                symmetric = symmetric if override.symmetric is None else override.symmetric
        return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)

    def unmatched_patterns(self, module_names: Collection[str]) -> list[str]:
        """Say which patterns were given in vain.

        Args:
            module_names: Every linear of the model.

        Returns:
            One sentence per skip or override pattern that matches none of them.
        """
        given = [("skip", pattern) for pattern in self.skip]
        given += [("override", override.pattern) for override in self.overrides]
        return [
            f"the {kind} pattern '{pattern}' matches no module"
            for kind, pattern in given
            if not any(re.search(pattern, name) for name in module_names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo :meth:`to_dict`; an unknown key is a ConfigError with a suggestion."""
        check_keys(cls, values)
        values = dict(values)
        if "overrides" in values:
            values["overrides"] = tuple(
                o if isinstance(o, Override) else Override.from_dict(o)
                for o in as_sequence("overrides", values["overrides"])
            )
        if "skip" in values:
            values["skip"] = tuple(as_sequence("skip", values["skip"]))
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which text the Hessians are measured on, and in what portions."""

    samples: int = option(128, "calibration sequences", metavar="N")
    length: int = option(2048, "tokens per sequence", metavar="N")
    batch_size: int | None = option(
        None, "sequences per forward pass (default: by the memory plan)", metavar="N"
    )
    seed: int = option(0, "chooses the sequences where the text has more than needed", metavar="N")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("samples", "length", "batch_size"):
            check_least(self, name, 1)
        check_range(self, "seed", 0, MOST_SEED, "Use 0, or 1 for another choice.")

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo :meth:`to_dict`; an unknown key is a ConfigError with a suggestion."""
        check_keys(cls, values)
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceConfig:
    """What a run may use of the machine."""

    memory: str | None = option(
        None,
        "memory that the run may take, such as 8GB, with --device cuda the GPU's (default: 60% of "
        "what is free)",
        metavar="SIZE",
    )
    device: str = option("cpu", "where to compute: cpu or cuda", metavar="NAME")
    dtype: str = option("auto", "type in which the model computes", choices=DTYPES)

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "dtype", DTYPES)
        if self.memory is not None:
            parse_size(self.memory, "memory")


def _check_group_size(group_size: int) -> None:
    if group_size != PER_CHANNEL and group_size < 1:
        raise ConfigError(
            f"group_size is {group_size}; allowed are -1 (one group per row) or a positive number. "
            "Use 128 or 64."
        )
