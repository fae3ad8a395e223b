"""Plan how each linear of a block is rounded, or why it is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from halfbyte.checkpoint.layout import PACK_MULTIPLE
from halfbyte.errors import CheckpointError
from halfbyte.model.blocks import LinearTensors
from halfbyte.model.experts import UnfusedExperts, find_fused_experts
from halfbyte.quant_config import PER_CHANNEL, QuantConfig, Scheme
from halfbyte.quantize.report import SkippedModule
from halfbyte.quantize.rounding import LinearTask


def plan_tasks(
    prefix: str,
    root: nn.Module,
    exact: Mapping[str, LinearTensors],
    config: QuantConfig,
    disk_name: Callable[[str], str],
) -> tuple[list[LinearTask], list[SkippedModule]]:
    """Decide for every linear how it is rounded, or why it is skipped.

    Args:
        prefix: Name of the block in the model, with a trailing dot.
        root: The block.
        exact: Weight and bias of its linears in the stored dtype, by name within the block.
        config: How to quantize.
        disk_name: Maps a module's name in the model to its name on disk.

    Returns:
        The linears to round, and the skipped modules.

    Raises:
        CheckpointError: A weight to be rounded is not finite; names the module.
    """
    tasks = []
    skipped = []
    routers = _routers(root)
    for module, (weight, bias) in exact.items():
        name = disk_name(prefix + module)
        scheme, reason = _choose_scheme(name, weight, config, routers.get(module))
        if scheme is None:
            skipped.append(SkippedModule(name=name, reason=reason))
            continue
        _check_finite(name, weight)
        tasks.append(
            LinearTask(
                module=module,
                name=name,
                weight=weight,
                bias=bias,
                scheme=scheme,
                notes=(reason,) if reason else (),
            )
        )
    for module, reason in _other_matrices(root, exact, tasks).items():
        skipped.append(SkippedModule(name=prefix + module, reason=reason))
    return tasks, skipped


def _choose_scheme(
    name: str, weight: Tensor, config: QuantConfig, router: str | None
) -> tuple[Scheme | None, str]:
    """Return a linear's scheme and a note on what was adjusted, or None and why it is skipped."""
    scheme = config.scheme_for(name)
    if scheme is None:
        return None, "a skip pattern matches its name"
    if router:
        return None, router
    out_features, in_features = weight.shape
    return fit_scheme(scheme, in_features, out_features, ragged_groups=config.ragged_groups)


def fit_scheme(
    scheme: Scheme, in_features: int, out_features: int, *, ragged_groups: bool
) -> tuple[Scheme | None, str]:
    """Adjust a scheme's group size to the shape of a linear.

    Args:
        scheme: The requested scheme.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        ragged_groups: Whether the last group may be shorter than the others.

    Returns:
        The scheme and what was changed in it; or None and why none fits.
    """
    for size, what in ((in_features, "inputs"), (out_features, "outputs")):
        if size % PACK_MULTIPLE:
            return None, f"{size} {what} are not a multiple of {PACK_MULTIPLE}"
    size = scheme.group_size
    if size == PER_CHANNEL or in_features % size == 0 or (ragged_groups and size < in_features):
        return scheme, ""
    smaller = 1 << (size.bit_length() - 1)
    while smaller > 1 and (in_features % smaller or smaller >= size):
        smaller //= 2
    if smaller < PACK_MULTIPLE // 2:
        return None, f"no group size of 16 or more below {size} divides {in_features} inputs"
    fitted = Scheme(bits=scheme.bits, group_size=smaller, symmetric=scheme.symmetric)
    return fitted, f"group size {smaller}: {size} does not divide {in_features} inputs"


def _check_finite(name: str, weight: Tensor) -> None:
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        raise CheckpointError(
            f"Cannot quantize {name}: {int((~finite).sum())} of its {weight.numel()} weights are "
            "not finite. The model's files are damaged; download them again, or leave this module "
            "unquantized with --skip."
        )


def _other_matrices(
    root: nn.Module, linears: Mapping[str, LinearTensors], tasks: Sequence[LinearTask]
) -> dict[str, str]:
    """Find modules that hold matrices but are no linears, and why they are skipped.

    A 2-D parameter counts as a matrix if it is at least as large as the smallest rounded weight.
    """
    found = dict.fromkeys(find_fused_experts(root), "its experts cannot be split into linears")
    smallest = min((task.weight.numel() for task in tasks), default=0)
    for name, module in root.named_modules():
        if name in linears or name in found or isinstance(module, _ConvNd | nn.Embedding):
            continue
        parameters = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear):
            found[name] = f"{type(module).__name__} does not compute what a linear does"
        elif any(p.dim() == 3 for p in parameters):
            found[name] = "its 3-D weights cannot be split into linears"
        elif any(p.dim() == 2 and p.numel() >= smallest for p in parameters):
            found[name] = "its weights are matrices, but not those of a linear"
    return dict(sorted(found.items()))


def _routers(block: nn.Module) -> dict[str, str]:
    """Find the routers of experts, which stay unquantized: small, and their errors misroute."""
    routers = {}
    for name, experts in block.named_modules():
        if not isinstance(experts, UnfusedExperts):
            continue
        parent = name.rpartition(".")[0]
        for sibling, module in block.get_submodule(parent).named_children():
            linears = {
                n: m for n, m in module.named_modules(prefix=sibling) if type(m) is nn.Linear
            }
            if [m.out_features for m in linears.values()] == [experts.num_experts]:
                routers[f"{parent}.{next(iter(linears))}".lstrip(".")] = (
                    "it routes tokens to experts"
                )
    return routers
