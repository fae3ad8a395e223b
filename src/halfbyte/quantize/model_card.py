"""Writes the model card (README.md) of a quantized checkpoint.

It contains usage, measured quality, recipe, errors and versions; its front matter gives the Hugging
Face Hub the base model, license and tags.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from halfbyte.checkpoint.front_matter import CARD_FILE, read_front_matter
from halfbyte.checkpoint.identity import name_folder
from halfbyte.quantize.plot import PLOT_FILE
from halfbyte.quantize.report import ExpertCoverage, ModuleReport, QuantizationReport, kind_of
from halfbyte.units import format_bytes, format_error, format_seconds

CARRIED_KEYS = ("license", "license_name", "license_link", "language")
"""Front matter keys that are copied from the base model's card."""

WORST_SHOWN = 10
"""Number of modules with the largest errors that are listed."""


def save_model_card(report: QuantizationReport, base_folder: Path | None, folder: Path) -> Path:
    """Write the model card into a checkpoint's folder.

    Args:
        report: The run.
        base_folder: Folder of the base model, whose README gives the license; None if it is not on
            this machine.
        folder: The checkpoint's folder, which exists.

    Returns:
        The file.
    """
    # Imported here, because it takes half a second and most commands write no card.
    from huggingface_hub import ModelCardData

    name = base_model_name(report.model)
    carried = {} if base_folder is None else read_front_matter(base_folder)
    data = ModelCardData(
        base_model=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gptq", f"{report.config['bits']}-bit", "halfbyte"],
        base_model_relation="quantized",
        **{key: carried[key] for key in CARRIED_KEYS if key in carried},
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{write_card_body(report, name)}"
    path = folder / CARD_FILE
    path.write_text(text, encoding="utf-8")
    return path


def base_model_name(model: str) -> str:
    """Return the public name of a model.

    Args:
        model: The model as the user named it: a Hub name, a folder, or a folder of the Hub's cache.

    Returns:
        ``owner/name`` if it can be determined, else the folder's name; never a path.
    """
    parts = Path(model).parts
    for part in parts:
        # A folder of the Hub's cache: models--owner--name/snapshots/<commit>
        if part.startswith("models--") and "snapshots" in parts:
            return part.removeprefix("models--").replace("--", "/")
    if len(parts) == 2 and not Path(model).exists():
        return model
    return name_folder(model)


def write_card_body(report: QuantizationReport, name: str) -> str:
    """Return the card's text after the front matter.

    Args:
        report: The run.
        name: The base model's name.

    Returns:
        Markdown.
    """
    sections = [
        f"# {name.rpartition('/')[2]} in {report.config['bits']} bits",
        f"{name}, quantized with GPTQ by halfbyte {report.versions['halfbyte']}: "
        f"{report.bits_per_weight:.2f} bits per quantized weight, "
        f"{format_bytes(report.checkpoint_bytes)} of weight files.",
        _USAGE,
        "## Measured quality\n\n" + _quality(report),
        "## Recipe\n\n" + _recipe(report),
        "## Error by module\n\n" + _errors(report),
    ]
    coverage = report.expert_coverage()
    if coverage:
        sections.append("## Calibration tokens by expert\n\n" + _experts(coverage))
    if report.skipped:
        sections.append("## Left in 16 bits\n\n" + _skipped(report))
    notes = _notes(report)
    if notes:
        sections.append("## Fallbacks and notes\n\n" + notes)
    sections.append("## Made with\n\n" + _made_with(report))
    return "\n\n".join(sections) + "\n"


_USAGE = """\
## Use it

```python
import halfbyte  # lets Transformers load GPTQ checkpoints without further packages
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

The files are in the standard GPTQ layout. `halfbyte check` lists the programs that
can load them."""


def _quality(report: QuantizationReport) -> str:
    quality = report.quality
    if quality is None:
        return "Not measured. `halfbyte divergence BASE THIS_FOLDER` measures it."
    error = quality.kl_standard_error
    spread = "" if error is None else f" (standard error {error:.4f})"
    rows = [
        ("perplexity, base", f"{quality.base_perplexity:.3f}"),
        ("perplexity, this", f"{quality.quantized_perplexity:.3f}"),
        ("KL to the base", f"{quality.kl_nats_mean:.4f} nats per token{spread}"),
        ("same top token as the base", f"{quality.top1_agreement:.1%} of tokens"),
    ]
    return (
        f"On {quality.windows} windows of {quality.window} tokens of {quality.text} "
        f"(sha256 `{quality.text_digest[:16]}`).\n\n" + _table(("measure", "value"), rows)
    )


def _recipe(report: QuantizationReport) -> str:
    calibration = report.calibration
    rows = [(key, _value(value)) for key, value in report.config.items()]
    rows += [
        ("calibration text", calibration.source),
        (
            "calibration tokens",
            f"{calibration.tokens} in {calibration.samples} samples of {calibration.length}",
        ),
        ("calibration sha256 (token ids)", f"`{calibration.digest}`"),
    ]
    tuning = report.end_to_end
    if tuning is not None:
        rows.append(
            (
                "trained end to end",
                f"step {tuning.kept_step} of {tuning.steps} kept: KL on held-out calibration text "
                f"{tuning.kl_before:.4f} to {tuning.kl_after:.4f}",
            )
        )
    return _table(("setting", "value"), rows)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value) or "none"
    if isinstance(value, dict):
        return " ".join(f"{k} {_value(v)}" for k, v in value.items() if v is not None)
    return f"`{value}`" if isinstance(value, str) else str(value)


def _errors(report: QuantizationReport) -> str:
    """Summarize the errors by kind, then list the modules with the largest errors."""
    by_kind: dict[str, list[ModuleReport]] = defaultdict(list)
    for module in report.modules:
        by_kind[module.kind].append(module)
    parts = [
        "Relative error: squared error of a module's outputs relative to their squared norm, on "
        "the calibration text. RTN: the same for round-to-nearest on the min-max grid.",
        _table(
            ("modules", "number", "bits", "group", "median", "worst", "mean RTN"),
            [_kind_row(kind, modules) for kind, modules in by_kind.items()],
        ),
    ]
    measured = [module for module in report.modules if module.relative_error is not None]
    worst = heapq.nlargest(WORST_SHOWN, measured, key=lambda m: m.relative_error or 0.0)
    if worst:
        rows = [
            (f"`{m.name}`", format_error(m.relative_error), format_error(m.round_to_nearest_error))
            for m in worst
        ]
        parts += [f"The worst {len(worst)}:", _table(("module", "relative error", "RTN"), rows)]
        parts.append(f"![Relative error by block and module]({PLOT_FILE})")
    return "\n\n".join(parts)


def _kind_row(kind: str, modules: Sequence[ModuleReport]) -> tuple[str, ...]:
    errors = [m.relative_error for m in modules if m.relative_error is not None]
    rounded = [m.round_to_nearest_error for m in modules if m.round_to_nearest_error is not None]
    return (
        f"`{kind}`",
        str(len(modules)),
        ", ".join(str(bits) for bits in sorted({m.bits for m in modules})),
        ", ".join(str(size) for size in sorted({m.group_size for m in modules})),
        format_error(median(errors) if errors else None),
        format_error(max(errors, default=None)),
        format_error(fmean(rounded) if rounded else None),
    )


def _experts(coverage: Sequence[ExpertCoverage]) -> str:
    """Return a table of calibration tokens per expert, with one row per block."""
    rows = [
        (
            str(block.block),
            str(len(block.tokens)),
            str(min(block.tokens)),
            format(median(block.tokens), ".0f"),
            str(max(block.tokens)),
            ", ".join(map(str, block.unreached)) or "none",
        )
        for block in coverage
    ]
    head = ("block", "experts", "fewest", "median", "most", "not reached")
    return (
        "For an expert that few tokens reached, statistics of all experts of its layer are mixed "
        "in; the notes below say how much.\n\n" + _table(head, rows)
    )


def _skipped(report: QuantizationReport) -> str:
    """Return a table with one row per kind and reason; blocks rarely differ."""
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for module in report.skipped:
        groups[kind_of(module.name), module.reason] += 1
    rows = [(f"`{kind}`", str(number), reason) for (kind, reason), number in groups.items()]
    share = f"{report.unquantized_share:.1%} of the weights in the blocks' matrices.\n\n"
    return share + _table(("modules", "number", "reason"), rows)


def _notes(report: QuantizationReport) -> str:
    """Return one line per note, with the number of modules that it applies to."""
    holders: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in report.modules:
        for note in module.notes:
            holders[module.kind, note].append(module.name)
    lines = [f"- {note}" for note in report.notes]
    for (kind, note), names in holders.items():
        where = f"`{names[0]}`" if len(names) == 1 else f"{len(names)} of `{kind}`"
        lines.append(f"- {where}: {note}")
    return "\n".join(lines)


def _made_with(report: QuantizationReport) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items())
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    return (
        f"{versions}.\n\nIn {format_seconds(report.seconds)}, with "
        f"{format_bytes(report.peak_memory_bytes)} of peak memory, on: {machine}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    # Escape bars, which occur in regular expressions of --skip and would end a cell.
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
