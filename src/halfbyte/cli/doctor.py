"""The verb `doctor`: what is installed, what can run here, and what would be chosen."""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from halfbyte.cli.output import console, print_json

if TYPE_CHECKING:
    from halfbyte.kernels.contract import LinearSpec

HELP = "show versions, which kernels can run here, and which would be chosen"

OTHER_PACKAGES = ("peft", "optimum", "gptqmodel")
"""Packages that change what a quantized model can be used for, where they are there."""

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("4 bits, group 128, bfloat16", {}),
    ("4 bits, group 128, float16", {"dtype": "float16"}),
    ("4 bits, group 128, float32", {"dtype": "float32"}),
    ("4 bits, asymmetric", {"symmetric": False}),
    ("4 bits, act-order", {"act_order": True}),
    ("4 bits, group size 128 that does not divide", {"in_features": 576}),
    ("3 bits", {"bits": 3}),
    ("8 bits", {"bits": 8}),
)
"""Typical layers, as changes to a 4096 -> 4096 linear of 4 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What would be chosen for one typical layer."""

    layer: str
    device: str
    kernel: str | None
    """None where none can run it."""
    reason: str
    rejected: dict[str, str]
    division: str | None = None
    """Up to how many rows of x what runs, where that differs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    examined = examine()
    if args.json:
        print_json(examined)
    else:
        _print(examined)
    return 0


def examine() -> dict[str, Any]:
    """Find out everything that the verb shows.

    Returns:
        By section: versions, machine, environment, kernels (name -> None or why not), cases,
        transformers.
    """
    import torch

    from halfbyte.environment import VARIABLES, read_variable
    from halfbyte.integrations import autoload
    from halfbyte.kernels.native_library import open_library
    from halfbyte.kernels.registry import KERNELS, ON_REQUEST, load_kernel
    from halfbyte.machine.facts import installed_versions, machine_facts

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": installed_versions() | {name: _version(name) for name in OTHER_PACKAGES},
        "machine": machine_facts()
        | {
            "instructions of torch": torch.backends.cpu.get_cpu_capability(),
            "instructions of cpu_native": open_library().isa or "none",
        },
        "environment": {variable.name: read_variable(variable) for variable in VARIABLES},
        "kernels": {
            entry.name: load_kernel(entry).find_obstacle() for entry in (*KERNELS, *ON_REQUEST)
        },
        "cases": [
            _choose(name, _make_spec(device, **changes))
            for device in devices
            for name, changes in CASES
        ],
        "transformers": {
            "loads_gptq_through_halfbyte": autoload.is_installed(),
            "reason": autoload.decide()[1],
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _make_spec(device: str, dtype: str = "bfloat16", **changes: Any) -> LinearSpec:
    import torch

    from halfbyte.kernels.contract import LinearSpec

    layer = {
        "bits": 4,
        "group_size": 128,
        "in_features": 4096,
        "out_features": 4096,
        "symmetric": True,
        "act_order": False,
        "zero_offset": 1,
        **changes,
    }
    return LinearSpec(dtype=getattr(torch, dtype), device_type=device, **layer)


def _choose(name: str, spec: LinearSpec) -> Case:
    from halfbyte.errors import KernelUnavailable
    from halfbyte.kernels.contract import RowTieredKernel
    from halfbyte.kernels.registry import select

    try:
        choice = select(spec)
    except KernelUnavailable as error:
        return Case(
            layer=name, device=spec.device_type, kernel=None, reason=str(error), rejected={}
        )
    kernel = choice.kernel
    return Case(
        layer=name,
        device=spec.device_type,
        kernel=kernel.name,
        reason=choice.reason,
        rejected=dict(choice.rejected),
        division=kernel.describe_row_tiers(spec) if isinstance(kernel, RowTieredKernel) else None,
    )


def _print(examined: dict[str, Any]) -> None:
    for section in ("versions", "machine", "environment"):
        table = Table(title=section, title_justify="left", show_header=False)
        for name, value in examined[section].items():
            table.add_row(name, "not set" if value is None else str(value))
        console.print(table)
    kernels = Table(title="kernels, fastest first", title_justify="left")
    for heading in ("kernel", "can run here"):
        kernels.add_column(heading)
    for name, obstacle in examined["kernels"].items():
        kernels.add_row(name, "yes" if obstacle is None else f"no: {obstacle}")
    console.print(kernels)
    cases = Table(title="what would run a typical layer", title_justify="left")
    for heading in ("layer", "device", "kernel", "why"):
        cases.add_column(heading)
    for case in examined["cases"]:
        passed_over = [f"{name}: {reason}" for name, reason in case.rejected.items()]
        division = [case.division] if case.division else []
        why = "; ".join([case.reason, *division, *passed_over])
        cases.add_row(case.layer, case.device, case.kernel or "none", why)
    console.print(cases)
    found = examined["transformers"]
    answer = "yes" if found["loads_gptq_through_halfbyte"] else "no"
    console.print(f"Transformers loads GPTQ through halfbyte: {answer} ({found['reason']})")
