"""The verb `compare`: decides whether a quantized model may replace its base."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.measuring import read_text
from halfbyte.cli.options import EXACTLY, add_computing_arguments
from halfbyte.cli.output import console, err_console, show_progress
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.judge.comparison import Comparison
    from halfbyte.judge.setup import CompareConfig

HELP = (
    "decide whether a model may replace its base: pass (exit code 0), fail (1) or inconclusive "
    "(2); 3 if the comparison itself failed"
)

EXIT_ERROR = 3
"""For all errors, because 1 and 2 are verdicts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options and positionals."""
    parser.add_argument(
        "base",
        metavar="BASE",
        help="folder of the base model, or the address of an OpenAI-compatible server",
    )
    parser.add_argument(
        "candidate",
        metavar="CANDIDATE",
        help="folder of the model to compare, or an address such as http://localhost:8000/v1#NAME",
    )
    _add_question_arguments(parser)
    _add_margin_arguments(parser)
    _add_measurement_arguments(parser)
    _add_output_arguments(parser)


def _add_question_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("questions and texts")
    group.add_argument(
        "--tasks",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="JSONL file of prompts and answers; repeatable (default: the built-in tasks)",
    )
    group.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="KEY",
        help="divide the task items into slices by this key; repeatable",
    )
    group.add_argument(
        "--checks",
        type=Path,
        metavar="FILE",
        help="Python file with check functions; its code is run",
    )
    group.add_argument(
        "--lm-eval",
        action="append",
        default=[],
        metavar="TASK",
        help="lm-eval task, by name or YAML file; repeatable (needs the extra 'evaluate')",
    )
    group.add_argument(
        "--builtin",
        type=int,
        metavar="N",
        help="N items of each of the five built-in tasks (default: 60, or 0 with other tasks)",
    )
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="UTF-8 file of running text; repeatable (default: held-out text of five kinds)",
    )
    text.add_argument("--no-text", action="store_true", help="skip running text")
    group.add_argument(
        "--no-edge-cases", action="store_true", help="skip edge cases (unusual inputs)"
    )


def _add_margin_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("allowed losses")
    for name, default, help_text in (
        ("margin", 2.0, "loss of accuracy over all items, in percentage points"),
        ("slice-margin", 10.0, "loss of accuracy within one slice, in percentage points"),
        ("perplexity-margin", 10.0, "increase of perplexity on running text, in percent"),
    ):
        group.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="N",
            help=f"{help_text} (default: %(default)g)",
        )
    group.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="P",
        help="upper bound on the probability of a wrong verdict (default: %(default)g)",
    )


def _add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--window",
        type=int,
        default=256,
        metavar="N",
        help="tokens per window of running text (default: %(default)s)",
    )
    group.add_argument(
        "--windows",
        type=int,
        default=20,
        metavar="N",
        help="windows of each kind of text, evenly spread; 0 for all (default: %(default)s)",
    )
    group.add_argument(
        "--longest",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of the longest edge case; at most the model's context (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="questions per batch (default: %(default)s)",
    )
    add_computing_arguments(group, auto=EXACTLY)
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of built-in items and sampling (default: %(default)s)",
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of cached answers (default: the user's cache folder)",
    )
    group.add_argument(
        "--resume", action="store_true", help="reuse the candidate's answers of an interrupted run"
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="write report.html, report.json, report.md and junit.xml to this folder",
    )
    group.add_argument(
        "--format",
        default="text",
        choices=("text", "json", "md", "junit", "html"),
        help="format of the printed report (default: %(default)s)",
    )
    group.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="format",
        help="same as --format json",
    )


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return the verdict's exit code."""
    from halfbyte.judge.compare import compare
    from halfbyte.judge.report import render, report_folder, write_report

    items, functions = _items(args)
    documents, config = _documents(args), _config(args)
    folder: AbstractContextManager[None] = nullcontext()
    if args.output is not None:
        # Created now, so that an unusable one fails before hours of answers.
        folder = report_folder(args.output, args.base, args.candidate)
    with folder, show_progress() as progress:
        result = compare(
            args.base,
            args.candidate,
            items=items,
            documents=documents,
            functions=functions,
            config=config,
            cache=args.cache,
            resume=args.resume,
            progress=progress,
        )
    try:
        if args.output is not None:
            for path in write_report(result, args.output):
                err_console.print(f"wrote {path}", soft_wrap=True)
    finally:
        # Print the result even if the files cannot be written, for example to a full disk.
        if args.format == "text":
            _print_text(result)
        else:
            sys.stdout.write(render(result, args.format))
    return result.verdict.exit_code


def _items(args: argparse.Namespace) -> tuple[list[Any] | None, dict[str, Any]]:
    from halfbyte.judge.builtin_tasks import builtin_tasks
    from halfbyte.judge.checks import load_functions
    from halfbyte.judge.tasks import read_tasks

    if args.slice and not args.tasks:
        raise ConfigError(
            f"--slice {args.slice[0]} applies to task files, and none is given. Add --tasks, or "
            "leave --slice out."
        )
    functions = load_functions(args.checks)
    items: list[Any] = []
    if args.tasks:
        items += read_tasks(args.tasks, slice_by=args.slice, functions=functions)
    if args.lm_eval:
        from halfbyte.judge.lm_eval_tasks import read_lm_eval

        items += read_lm_eval(args.lm_eval, limit=None)
    if args.builtin and items:
        items += builtin_tasks(args.builtin, seed=args.seed)
    return (items or None), functions


def _documents(args: argparse.Namespace) -> dict[str, list[str]] | None:
    if args.no_text:
        return {}
    from halfbyte.judge.tasks import name_files

    named = zip(name_files(args.text), args.text, strict=True)
    return {name: [read_text(path)] for name, path in named} or None


def _config(args: argparse.Namespace) -> CompareConfig:
    from halfbyte.judge.builtin_tasks import ITEMS_PER_TASK
    from halfbyte.judge.setup import CompareConfig
    from halfbyte.judge.verdict import Margins

    return CompareConfig(
        margins=Margins(
            accuracy=args.margin / 100,
            slices=args.slice_margin / 100,
            perplexity=args.perplexity_margin / 100,
            alpha=args.alpha,
        ),
        builtin_items=ITEMS_PER_TASK if args.builtin is None else args.builtin,
        edge_cases=not args.no_edge_cases,
        longest_edge=args.longest,
        window=args.window,
        windows=args.windows or None,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
    )


def _print_text(result: Comparison) -> None:
    from rich.table import Table

    from halfbyte.judge.verdict import format_percent, format_points

    console.print(result.verdict.sentence, soft_wrap=True)
    table = Table(title=f"{result.candidate} compared with {result.base}")
    for heading in ("requirement", "outcome", "evidence"):
        table.add_column(heading, overflow="fold")
    for claim in result.verdict.claims:
        advice = f"\n{claim.advice}" if claim.advice else ""
        table.add_row(claim.name, claim.outcome.value, claim.found + advice)
    console.print(table)
    if result.overall is not None:
        table = Table(title="Tasks")
        for heading in ("slice", "items", "base", "candidate", "difference", "flips -/+"):
            table.add_column(heading, justify="left" if heading == "slice" else "right")
        for one in (result.overall, *result.slices):
            interval = f"[{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}]"
            table.add_row(
                one.name,
                str(one.flips.num_items),
                format_percent(one.base_accuracy),
                format_percent(one.candidate_accuracy),
                f"{format_points(one.flips.difference)} {interval}",
                f"{one.flips.harmful}/{one.flips.beneficial}",
            )
        console.print(table)
    if result.text is not None:
        text = result.text
        console.print(
            f"Running text: KL {text.kl_nats:.4f} nats, top-1 agreement "
            f"{format_percent(text.top1_agreement)}, on {text.num_tokens} tokens of "
            f"{text.num_documents} documents.",
            soft_wrap=True,
        )
    for note in result.notes:
        console.print(f"Note: {note}", soft_wrap=True)
