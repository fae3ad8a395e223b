"""The verb `plan`: how much memory a model needs, and which devices it fits on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.table import Table

from halfbyte.cli.output import console, print_json

if TYPE_CHECKING:
    from halfbyte.plan.devices import Device, Fit
    from halfbyte.plan.memory import Load, MemoryPlan
    from halfbyte.plan.shapes import ModelShapes

HELP = "estimate the memory that a model needs and where it fits, from its config.json alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder with config.json, that file, or a known size: 7B, 8B, 13B, 30B, 65B, 70B",
    )
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="bits per weight: 2, 3, 4, 8, 16 or 32 (default: the model's own, or 4)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="inputs that share a scale; -1: the whole row (default: the model's own, or 128)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens per request, prompt and answer (default: 4096, at most the model's maximum)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=1,
        metavar="N",
        help="concurrent requests (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-type",
        default="float16",
        metavar="TYPE",
        help="KV cache dtype: float16, bfloat16, float32, fp8 or int8 (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize-head", action="store_true", help="quantize the output layer too"
    )
    parser.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="GPU",
        help="nominal memory of a GPU, such as 24GB, or its name, such as 'RTX 4090'; repeatable "
        "(default: common sizes, and this machine)",
    )
    _add_training_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training an adapter, instead of inference")
    training.add_argument(
        "--finetune",
        action="store_true",
        help="plan a training step of halfbyte finetune; --context is the tokens per row",
    )
    training.add_argument(
        "--rank",
        type=int,
        default=16,
        metavar="N",
        help="rank of the adapter (default: %(default)s)",
    )
    training.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="linear layer to adapt, such as q_proj; repeatable (default: all but the head)",
    )
    training.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="rows per forward pass (default: 1)"
    )
    training.add_argument(
        "--optimizer",
        default="adamw",
        metavar="NAME",
        help="optimizer: adamw, adamw_8bit or paged_adamw_8bit (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Estimate the memory and print it."""
    from halfbyte.plan.devices import fit_devices, parse_device, this_machine, usual_devices
    from halfbyte.plan.memory import Load, bits_per_weight, plan_memory
    from halfbyte.plan.shapes import read_shapes

    devices = [parse_device(text) for text in args.gpu] or [*usual_devices(), this_machine()]
    shapes = read_shapes(args.model)
    load = Load(
        bits=_value_or(args.bits, shapes.stored_bits or 4),
        group_size=_value_or(args.group_size, shapes.stored_group_size or 128),
        context=_value_or(args.context, min(4096, shapes.context or 4096)),
        requests=args.requests,
        cache_type=args.cache_type,
        quantize_head=args.quantize_head,
    )
    if args.finetune:
        return _plan_training(args, shapes, load, devices)
    plan = plan_memory(shapes, load)
    fits = fit_devices(shapes, load, devices)
    notes = [*shapes.notes, *_notes(shapes, load, plan)]
    if args.json:
        values: dict[str, Any] = {
            "model": shapes.name,
            "parameters": shapes.numbers,
            "active_parameters": shapes.active_numbers,
            "quantized_parameters": shapes.linear_numbers,
            "bits_per_weight": bits_per_weight(shapes, load),
            "load": load,
            "bytes": plan,
            "devices": [_fit_values(fit) for fit in fits],
            "notes": notes,
        }
        print_json(values)
    else:
        _print_tables(shapes, load, plan, fits, notes)
    return 0


def _plan_training(
    args: argparse.Namespace, shapes: ModelShapes, base: Load, devices: list[Device]
) -> int:
    from halfbyte.plan.training import TrainingLoad, max_batch_size, plan_training
    from halfbyte.units import format_bytes

    load = TrainingLoad(
        base=base,
        rank=args.rank,
        targets=tuple(args.target),
        batch_size=args.batch_size,
        optimizer=args.optimizer,
    )
    plan = plan_training(shapes, load)
    rows = [(device, max_batch_size(shapes, load, device)) for device in devices]
    if args.json:
        fits = [{"name": d.name, "usable_bytes": d.bytes, "max_batch_size": n} for d, n in rows]
        values = {"model": shapes.name, "load": load, "bytes": plan, "devices": fits}
        print_json({**values, "notes": list(shapes.notes)})
        return 0
    where = ", ".join(load.targets) or "every linear"
    console.print(
        f"{shapes.name}: an adapter of rank {load.rank} on {where}, {plan.trained / 1e6:.3g} "
        f"million parameters, on a base in {base.bits} bits; {load.batch_size} x "
        f"{base.context} tokens per forward pass",
        soft_wrap=True,
    )
    _print_parts(
        ("weights of the base", plan.weights),
        ("adapter and its gradient", plan.adapter),
        ("optimizer", plan.optimizer),
        ("activations", plan.activations),
        ("program and device", plan.program),
        ("total", plan.total),
    )
    table = Table(title="Where it fits")
    table.add_column("device")
    table.add_column("usable", justify="right")
    table.add_column("maximum batch size", justify="right")
    for device, max_rows in rows:
        table.add_row(device.name, format_bytes(device.bytes), str(max_rows or "none"))
    console.print(table)
    for note in shapes.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    return 0


def _value_or(value: int | None, default: int) -> int:
    return default if value is None else value


def _print_parts(*parts: tuple[str, int]) -> None:
    """Print a table of the memory of each part."""
    from halfbyte.units import format_bytes

    table = Table()
    table.add_column("part")
    table.add_column("memory", justify="right")
    for name, value in parts:
        table.add_row(name, format_bytes(value))
    console.print(table)


def _fit_values(fit: Fit) -> dict[str, Any]:
    return {
        "name": fit.device.name,
        "usable_bytes": fit.device.bytes,
        "fits": fit.fits,
        "free_bytes": fit.free_bytes,
        "max_requests": fit.max_requests,
        "max_context": fit.max_context,
        "most_bits": fit.bits,
        "cards": fit.cards,
    }


def _notes(shapes: ModelShapes, load: Load, plan: MemoryPlan) -> list[str]:
    notes = []
    if plan.cache > plan.weights:
        notes.append(
            f"The KV cache takes {plan.cache / plan.weights:.1f} times the memory of the weights: "
            "fewer requests, less context or an 8-bit cache save more than fewer bits per weight."
        )
    if shapes.context and load.context > shapes.context:
        notes.append(f"The model supports at most {shapes.context} tokens of context.")
    outside = plan.embeddings + plan.other
    if outside > 0.25 * plan.weights and load.bits < 16:
        notes.append(
            f"{100 * outside / plan.weights:.0f}% of the weights' bytes are embeddings and output "
            "layer, which stay in 16 bits."
        )
    return notes


def _print_tables(
    shapes: ModelShapes, load: Load, plan: MemoryPlan, fits: list[Fit], notes: list[str]
) -> None:
    from halfbyte.plan.memory import bits_per_weight
    from halfbyte.units import format_bytes

    console.print(
        f"{shapes.name}: {shapes.numbers / 1e9:.3g} billion parameters, {shapes.layers} layers; "
        f"{load.bits} bits ({bits_per_weight(shapes, load):.2f} with scales, zeros and indices), "
        f"{load.requests} x {load.context} tokens, KV cache in {load.cache_type}",
        soft_wrap=True,
    )
    _print_parts(
        ("KV cache", plan.cache),
        ("weights of the blocks", plan.codes),
        ("scales, zeros, indices", plan.grids),
        ("embeddings and output layer", plan.embeddings),
        ("norms, biases, routers", plan.other),
        ("activations", plan.activations),
        ("program and device", plan.program),
        ("total", plan.total),
    )
    console.print(
        f"Each token in the KV cache takes {format_bytes(plan.cache_per_token)}.", soft_wrap=True
    )
    table = Table(title="Where it fits")
    for heading in ("device", "usable", "fits", "free", "requests", "context", "bits", "cards"):
        table.add_column(heading, justify="left" if heading in ("device", "fits") else "right")
    for fit in fits:
        sign = "-" if fit.free_bytes < 0 else ""
        table.add_row(
            fit.device.name,
            format_bytes(fit.device.bytes),
            "yes" if fit.fits else "no",
            sign + format_bytes(abs(fit.free_bytes)),
            str(fit.max_requests),
            str(fit.max_context),
            "none" if fit.bits is None else str(fit.bits),
            "more than 8" if fit.cards is None else str(fit.cards),
        )
    console.print(table)
    console.print(
        "Maximum values: requests at this context, context at this many requests, bits per weight. "
        "cards: how many devices of this size hold the model together.",
        soft_wrap=True,
    )
    for note in notes:
        console.print(f"Note: {note}", soft_wrap=True)
