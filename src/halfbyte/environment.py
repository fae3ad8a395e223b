"""Every environment variable that halfbyte reads, declared and checked in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass

from halfbyte.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable."""

    name: str
    meaning: str
    allowed: tuple[str, ...] = ()
    """Empty: checked where it is used, because the values are not known here."""
    default: str | None = None


KERNEL = Variable(
    name="HALFBYTE_KERNEL",
    meaning="run every quantized layer on this kernel, or fail",
)
CPU_ISA = Variable(
    name="HALFBYTE_CPU_ISA",
    meaning="let the CPU kernel use this instruction set instead of the best one "
    "(serial, avx2, avx512, amx, neon); one that the processor lacks is an error",
)
STORE = Variable(
    name="HALFBYTE_STORE",
    meaning="folder or bucket in which `halfbyte store` keeps versions",
)
TRANSFORMERS = Variable(
    name="HALFBYTE_TRANSFORMERS",
    meaning="whether Transformers loads GPTQ checkpoints through halfbyte; auto: unless the "
    "packages are installed that it would need itself (optimum and gptqmodel)",
    allowed=("auto", "on", "off"),
    default="auto",
)
API_KEYS = Variable(
    name="HALFBYTE_API_KEYS",
    meaning="API keys of `halfbyte serve`, each NAME:SECRET, with commas between",
)
UPSTREAM_KEY = Variable(
    name="HALFBYTE_UPSTREAM_KEY",
    meaning="the key that `halfbyte serve` itself shows to servers given by --upstream and "
    "--fallback",
)
VARIABLES = (KERNEL, CPU_ISA, STORE, TRANSFORMERS, API_KEYS, UPSTREAM_KEY)


def read_variable(variable: Variable) -> str | None:
    """Read a variable from the environment.

    Args:
        variable: One of VARIABLES.

    Returns:
        Its value; the default where it is unset or empty.

    Raises:
        ConfigError: The value is not among the allowed ones.
    """
    value = os.environ.get(variable.name, "").strip()
    if not value:
        return variable.default
    if variable.allowed and value not in variable.allowed:
        raise ConfigError(
            f"The environment variable {variable.name} is '{value}'; allowed are "
            f"{', '.join(variable.allowed)}. Unset it for the default ({variable.default})."
        )
    return value
