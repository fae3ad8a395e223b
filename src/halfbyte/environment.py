"""Declaration and validation of all environment variables that halfbyte reads."""

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
    """Allowed values; empty if the value is validated where it is used."""
    default: str | None = None


KERNEL = Variable(
    name="HALFBYTE_KERNEL",
    meaning="run every quantized layer with this kernel, or fail",
)
CPU_ISA = Variable(
    name="HALFBYTE_CPU_ISA",
    meaning="instruction set of the CPU kernel (serial, avx2, avx512, amx, neon) instead of the "
    "best available one; an error if the processor does not support it",
)
STORE = Variable(
    name="HALFBYTE_STORE",
    meaning="folder or bucket in which `halfbyte store` keeps versions",
)
TRANSFORMERS = Variable(
    name="HALFBYTE_TRANSFORMERS",
    meaning="whether Transformers loads GPTQ checkpoints through halfbyte; auto: yes, unless the "
    "packages that Transformers itself uses for them (optimum and gptqmodel) are installed",
    allowed=("auto", "on", "off"),
    default="auto",
)
API_KEYS = Variable(
    name="HALFBYTE_API_KEYS",
    meaning="API keys that `halfbyte serve` accepts: comma-separated NAME:SECRET pairs",
)
UPSTREAM_KEY = Variable(
    name="HALFBYTE_UPSTREAM_KEY",
    meaning="API key that `halfbyte serve` sends to the servers given by --upstream and --fallback",
)
VARIABLES = (KERNEL, CPU_ISA, STORE, TRANSFORMERS, API_KEYS, UPSTREAM_KEY)


def read_variable(variable: Variable) -> str | None:
    """Read a variable from the environment.

    Args:
        variable: One of VARIABLES.

    Returns:
        Its value; the default if it is unset or empty.

    Raises:
        ConfigError: The value is not one of the allowed values.
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
