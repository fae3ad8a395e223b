"""Plots the relative error of a run by block and module.

The upper plot shows the mean error of each block and, as a baseline, that of round-to-nearest. The
lower one is a heat map with one cell per module, colored by the logarithm of its error. The experts
of a block share two rows: mean and worst. Gray modules were left in 16 bits, white cells are empty.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from halfbyte.quantize.report import ModuleReport, QuantizationReport, block_of, kind_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_FILE = "quantization_error.png"

HEAD = -1
"""Column of the modules outside the blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGrid:
    """The data of the plot."""

    rows: tuple[str, ...]
    """Kinds of modules, in the order in which they run."""
    columns: tuple[int, ...]
    """Block indices, then HEAD if there is one."""
    errors: dict[tuple[str, int], float]
    """Errors by row and column, without cells that do not exist or were skipped."""
    skipped: frozenset[tuple[str, int]]
    """Row and column of modules that were left in 16 bits."""


def build_error_grid(report: QuantizationReport) -> ErrorGrid:
    """Arrange the modules' errors in rows and columns.

    Args:
        report: The run, with modules in the order in which they were quantized.

    Returns:
        The grid. Experts are combined into a row of means and a row of maxima.
    """
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for module in report.modules:
        if module.relative_error is not None:
            cells[module.kind, _column(module.name)].append(module.relative_error)
    errors: dict[tuple[str, int], float] = {}
    rows: dict[str, None] = {}
    for (kind, column), values in cells.items():
        for row, value in zip(_rows_of(kind), (fmean(values), max(values)), strict=False):
            rows[row] = None
            errors[row, column] = value
    skipped = {
        (row, _column(module.name))
        for module in report.skipped
        for row in _rows_of(kind_of(module.name))
    }
    columns = sorted({column for _, column in errors}, key=lambda c: (c == HEAD, c))
    return ErrorGrid(
        rows=tuple(rows),
        columns=tuple(columns),
        errors=errors,
        skipped=frozenset(skipped - errors.keys()),
    )


def _column(module: str) -> int:
    block = block_of(module)
    return HEAD if block is None else block


def _rows_of(kind: str) -> tuple[str, ...]:
    """Return the rows of a kind of module: mean and worst for experts."""
    return (f"{kind} mean", f"{kind} worst") if "*" in kind else (kind,)


def save_plot(report: QuantizationReport, folder: Path) -> Path | None:
    """Save the plot in a folder.

    Args:
        report: The run.
        folder: The checkpoint's folder, which exists.

    Returns:
        The file, or None if no module has an error.
    """
    grid = build_error_grid(report)
    if not grid.rows:
        return None
    # Imported here, because most commands plot nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _draw(report, grid)
    path = folder / PLOT_FILE
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
    return path


def _draw(report: QuantizationReport, grid: ErrorGrid) -> Figure:
    from matplotlib.figure import Figure

    width = min(max(6.5, 2.6 + 0.24 * len(grid.columns)), 18)
    map_height = 0.32 * len(grid.rows)
    figure = Figure(figsize=(width, 3.1 + map_height), dpi=140, layout="constrained")
    lines, cells = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [1.3, map_height]}
    )
    _draw_lines(lines, report.modules, grid)
    image = _draw_cells(cells, grid)
    bar = figure.colorbar(image, ax=cells, pad=0.01, aspect=max(8.0, 5 * map_height))
    bar.set_label("relative error", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _label_in_percent(bar.ax.yaxis)
    figure.suptitle(_title(report), fontsize=10)
    return figure


def _draw_lines(axes: Any, modules: Iterable[ModuleReport], grid: ErrorGrid) -> None:
    """Draw each block's mean error, for GPTQ and for round-to-nearest."""
    solved: dict[int, list[float]] = defaultdict(list)
    rounded: dict[int, list[float]] = defaultdict(list)
    for module in modules:
        if module.block is None or module.relative_error is None:
            continue
        solved[module.block].append(module.relative_error)
        if module.round_to_nearest_error is not None:
            rounded[module.block].append(module.round_to_nearest_error)
    for values, label, color in (
        (rounded, "rounded to nearest", "0.6"),
        (solved, "GPTQ", "#1f4e8c"),
    ):
        # A logarithmic axis cannot show a block with zero error.
        places = [i for i, column in enumerate(grid.columns) if any(values.get(column, ()))]
        means = [fmean(values[grid.columns[i]]) for i in places]
        axes.plot(places, means, color=color, marker=".", markersize=4, lw=1.2, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("mean of block", fontsize=8)
    axes.tick_params(labelsize=7)
    _label_in_percent(axes.yaxis)
    axes.tick_params(axis="x", which="both", length=0)
    axes.grid(axis="y", which="major", color="0.9")
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.98))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_cells(axes: Any, grid: ErrorGrid) -> Any:
    """Draw the heat map and return its image, for the color bar."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    positive = [value for value in grid.errors.values() if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1e-9, 1.0)
    values = [
        [max(grid.errors.get((row, column), math.nan), low) for column in grid.columns]
        for row in grid.rows
    ]
    # LogNorm needs a range of nonzero length.
    norm = LogNorm(vmin=low, vmax=high if high > low * 1.01 else low * 1.01)
    colors = colormaps["viridis"].with_extremes(bad="white")
    image = axes.imshow(values, norm=norm, cmap=colors, aspect="auto", interpolation="nearest")
    for row, column in grid.skipped:
        if row in grid.rows and column in grid.columns:
            x, y = grid.columns.index(column) - 0.5, grid.rows.index(row) - 0.5
            axes.add_patch(Rectangle((x, y), 1, 1, color="0.8", lw=0))
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
    step = max(1, math.ceil(len(grid.columns) / 40))
    places = [i for i, c in enumerate(grid.columns) if c == HEAD or i % step == 0]
    labels = ["head" if grid.columns[i] == HEAD else str(grid.columns[i]) for i in places]
    axes.set_xticks(places, labels, fontsize=7)
    axes.set_xlabel("block", fontsize=8)
    axes.tick_params(length=0)
    # White lines separate the cells.
    axes.set_xticks([i - 0.5 for i in range(1, len(grid.columns))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(grid.rows))], minor=True)
    axes.grid(which="minor", color="white", lw=0.6)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _label_in_percent(axis: Any) -> None:
    """Place ticks at 1, 2 and 5 of each decade, formatted as percentages."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}%"))


def _title(report: QuantizationReport) -> str:
    name = report.model.rstrip("/").rpartition("/")[2]
    config = report.config
    group = "one group per row" if config["group_size"] == -1 else f"group {config['group_size']}"
    return f"{name}: error of each module's outputs at {config['bits']} bits, {group}"
