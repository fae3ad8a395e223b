"""Settings of a quantization run: frozen dataclasses, shared by the CLI and the Python API."""

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
"""Bit widths with a standard layout on disk."""

PER_CHANNEL = -1
"""The ``group_size`` for one scale per output row."""

MIN_TOKENS = 2
"""Tokens of a calibration sequence: with one, there is nothing to predict."""
MAX_POLISH = 20
MAX_SEED = 2**32 - 1
MAX_TARGET_BITS = 9
"""8 bits plus the scales and zeros of groups of 32."""

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
"""Named settings of :class:`QuantConfig`, from least time to best quality."""

DEFAULT_SHRINKAGE = 0.4
"""Measured: docs/concepts/quality.md."""

OVERRIDE_KEYS = ("bits", "group_size", "symmetric")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one linear is rounded: bits, group size and symmetry."""

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
        """Parse ``PATTERN=KEY:VALUE,KEY:VALUE``, such as ``mlp.down_proj=bits:8,group_size:32``.

        Args:
            text: An override as given on the command line.

        Returns:
            The override.

        Raises:
            ConfigError: The text does not have that form; says which part.
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
        """Create an override from plain values; an unknown or missing key is a ConfigError."""
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
    """Quantization settings. Every combination that passes validation can be written and read."""

    bits: int = option(4, "bits per weight", choices=SUPPORTED_BITS)
    group_size: int = option(
        128, "input columns that share a scale; -1: one scale per output row", metavar="N"
    )
    symmetric: bool = option(
        True, "use one zero point per group instead of the fixed middle code", flag="--asymmetric"
    )
    desc_act: bool = option(
        False, "form groups in order of decreasing activation (slower to run; writes g_idx)"
    )
    act_order: bool = option(
        True,
        "round columns in stored order instead of by decreasing activation",
        flag="--no-act-order",
    )
    damping: float = option(
        0.01, "added to the Hessian's diagonal, as a fraction of its mean", metavar="X"
    )
    shrinkage: float = option(
        DEFAULT_SHRINKAGE,
        "fraction by which the off-diagonal entries of the Hessian are reduced: a larger one is "
        "closer to round-to-nearest and better for other kinds of text",
        metavar="X",
    )
    match_base: bool = option(
        False,
        "match the outputs of the base model, which runs alongside (twice the forward passes)",
        both=True,
    )
    weigh_tokens: bool = option(
        False,
        "weight each calibration token by its effect on the predictions (first takes a forward and "
        "backward pass through the base model)",
        both=True,
    )
    polish: int = option(
        0, "rounds of improving codes and scales after the sweep", metavar="ROUNDS"
    )
    tune_steps: int = option(
        0,
        "training steps for codes and scales per block, on the block's outputs; needs --match-base",
        metavar="STEPS",
    )
    end_to_end_steps: int = option(
        0,
        "maximum training steps for all scales and norm gains, on the base model's predictions; "
        "needs --match-base",
        metavar="STEPS",
    )
    ragged_groups: bool = option(
        False, "if the group size does not divide a layer's width, make the last group shorter"
    )
    target_bits: float | None = option(
        None,
        "choose the bits of each module by its measured sensitivity, for at most this mean number "
        "of bits per weight, scales and zeros included",
        metavar="X",
    )
    target_size: str | None = option(
        None,
        "like --target-bits, but a maximum size of the checkpoint, such as 4GB",
        metavar="SIZE",
    )
    skip: tuple[str, ...] = option((), "keep matching modules in 16 bits", metavar="PATTERN")
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
        check_range(self, "polish", 0, MAX_POLISH, "Use 1, or 0 for no polishing.")
        for name in ("tune_steps", "end_to_end_steps"):
            steps = getattr(self, name)
            if steps < 0 or (steps and not self.match_base):
                raise ConfigError(
                    f"{name} is {steps} and match_base is {self.match_base}: training takes 1 step "
                    "or more and needs the outputs of the unquantized model. Set match_base, or "
                    "use 0 steps."
                )
        self._check_target()
        for pattern in self.skip:
            check_pattern("skip", pattern)

    def _check_target(self) -> None:
        if self.target_bits is not None and self.target_size is not None:
            raise ConfigError(
                f"target_bits is {self.target_bits:g} and target_size is {self.target_size}: only "
                "one of them can be set. Remove the other."
            )
        lowest = SUPPORTED_BITS[0]
        if self.target_bits is not None and not lowest < self.target_bits <= MAX_TARGET_BITS:
            raise ConfigError(
                f"target_bits is {self.target_bits:g}; allowed is more than {lowest}, and "
                f"{MAX_TARGET_BITS} at most. Use 3.5, or 4.25 for 4 bits in groups of 64."
            )
        if self.target_size is not None:
            parse_size(self.target_size, "target_size")

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Self:
        """Create a config from a preset.

        Args:
            name: One of ``PRESETS``.
            **settings: Fields of this class, which take precedence over the preset.

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
        """Whether the statistics need a held-out part of the text."""
        return self.match_base or self.polish > 0

    @property
    def chooses_bits(self) -> bool:
        """Whether the bits of each module are chosen by its sensitivity."""
        return self.target_bits is not None or self.target_size is not None

    def fixes_bits(self, module_name: str) -> bool:
        """Return whether an override sets the bits of a module."""
        return any(o.bits is not None and re.search(o.pattern, module_name) for o in self.overrides)

    def with_bits(self, bits: Mapping[str, int]) -> Self:
        """Return a copy with bits for single modules; existing overrides take precedence.

        Args:
            bits: Bits by full module name.

        Returns:
            The new config.
        """
        chosen = tuple(
            Override(pattern=f"^{re.escape(name)}$", bits=number) for name, number in bits.items()
        )
        return replace(self, overrides=(*chosen, *self.overrides))

    def scheme_for(self, module_name: str) -> Scheme | None:
        """Return how a module is rounded.

        Args:
            module_name: Full dotted name. A pattern matches anywhere in it, as with ``re.search``.

        Returns:
            The scheme, or None if a skip pattern matches. The last matching override wins.
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
        """Find the skip and override patterns that match no module.

        Args:
            module_names: Names of all linears of the model.

        Returns:
            One note per pattern.
        """
        patterns = [("skip", pattern) for pattern in self.skip]
        patterns += [("override", override.pattern) for override in self.overrides]
        return [
            f"the {kind} pattern '{pattern}' matches no module"
            for kind, pattern in patterns
            if not any(re.search(pattern, name) for name in module_names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
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
    """Calibration settings, such as the number and length of sequences."""

    samples: int = option(128, "number of calibration sequences", metavar="N")
    length: int = option(2048, "tokens per sequence", metavar="N")
    batch_size: int | None = option(
        None, "sequences per forward pass (default: chosen by the memory plan)", metavar="N"
    )
    seed: int = option(0, "0: take the first sequences; else: choose them at random", metavar="N")

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, "samples", 1)
        check_least(self, "length", MIN_TOKENS)
        check_least(self, "batch_size", 1)
        check_range(self, "seed", 0, MAX_SEED, "Use 0, or 1 for another choice.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceConfig:
    """Resource settings, such as the memory limit and the device."""

    memory: str | None = option(
        None,
        "memory limit, such as 8GB; of the GPU with --device cuda (default: 60% of free memory)",
        metavar="SIZE",
    )
    device: str = option("cpu", "where to compute: cpu or cuda", metavar="NAME")
    dtype: str = option("auto", "data type to compute in", choices=DTYPES)

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
