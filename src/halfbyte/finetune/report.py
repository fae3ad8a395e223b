"""Report of a training run: JSON, a plot of the losses, and a model card for the adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.atomic import write_atomically

REPORT_FILE = "training.json"
PICTURE_FILE = "training.png"
CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Report of a finished run."""

    model: str
    output: str
    adapter: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    trained_parameters: int
    adapter_bytes: int
    steps: int
    kept_step: int
    """The step whose adapter was kept: the best on held-out data, or the last without such data."""
    stopped_early: bool
    validation_before: float | None
    """Mean held-out loss of the base without an adapter. Unit: nats per counted token."""
    validation_after: float | None
    history: tuple[dict[str, float], ...]
    """By step: ``step``, ``loss``, ``learning_rate``, ``grad_norm``; ``validation`` at some."""
    notes: tuple[str, ...]
    seconds: float
    """Time of this process; a resumed run counts from where it was resumed."""
    peak_memory_bytes: int
    versions: dict[str, str]
    machine: dict[str, str]
    inputs: dict[str, Any] = field(default_factory=dict)
    """Inputs of the run, which --resume compares."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def load(cls, folder: Path) -> TrainReport:
        """Read the report of a finished run.

        Args:
            folder: The adapter's.

        Returns:
            The report.
        """
        values = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        tuples = {key: tuple(values[key]) for key in ("history", "notes")}
        return cls(**{**values, **tuples})


def save_report(report: TrainReport, folder: Path) -> None:
    """Write the plot, the card and the report, whose presence marks the run as complete.

    Args:
        report: The run.
        folder: The adapter's.
    """
    _save_picture(report, folder / PICTURE_FILE)
    write_atomically(folder / CARD_FILE, [_write_card(report).encode()])
    text = json.dumps(report.to_dict(), indent=2) + "\n"
    write_atomically(folder / REPORT_FILE, [text.encode()])


def _save_picture(report: TrainReport, path: Path) -> None:
    # Imported here because most commands do not plot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    trained = [entry for entry in report.history if "loss" in entry]
    judged = [entry for entry in report.history if "validation" in entry]
    steps = [entry["step"] for entry in trained]
    losses.plot(steps, [entry["loss"] for entry in trained], lw=0.8, label="training data")
    rates.plot(steps, [entry["learning_rate"] for entry in trained], lw=0.8)
    if judged:
        before = [] if report.validation_before is None else [(0.0, report.validation_before)]
        points = [*before, *((entry["step"], entry["validation"]) for entry in judged)]
        losses.plot(*zip(*points, strict=True), "o-", ms=3, label="held-out data")
        losses.axvline(report.kept_step, lw=0.8, ls=":", color="grey", label="kept")
    losses.set_ylabel("loss, nats per token")
    losses.set_ylim(bottom=0)
    losses.legend(fontsize=8)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    figure.savefig(path, format="png")


def _write_card(report: TrainReport) -> str:
    head = {"base_model": report.model, "library_name": "peft", "tags": ["lora", "halfbyte"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    quality = ""
    if report.validation_before is not None and report.validation_after is not None:
        quality = (
            f"\nLoss on held-out data: {report.validation_before:.4f} without the adapter, "
            f"{report.validation_after:.4f} with it, in nats per token.\n"
        )
    front = "\n".join(lines)
    return f"""\
---
{front}
---

# Adapter for {Path(report.model).name}

Trained by `halfbyte finetune` for {report.steps} steps on {report.data["examples"]} examples; the
adapter of step {report.kept_step} was kept. It is a plain PEFT adapter of
{report.trained_parameters:,} parameters.
{quality}
![Losses and learning rate](training.png)

```python
import halfbyte
from peft import PeftModel

model = PeftModel.from_pretrained(halfbyte.load("BASE"), "ADAPTER")
```

To merge the adapter into its base: `halfbyte merge BASE ADAPTER -o OUT`.
"""
