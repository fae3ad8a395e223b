from __future__ import annotations

import sys

import pytest
from PIL import Image

from halfbyte.quantize.plot import HEAD, PLOT_FILE, build_error_grid, save_plot
from halfbyte.quantize.report import SkippedModule


def test_grid_has_kinds_by_blocks_in_running_order_and_the_head_last(make_report, make_module):
    modules = (
        make_module("model.layers.0.q", 0.1),
        make_module("model.layers.0.down", 0.2),
        make_module("model.layers.10.q", 0.3),
        make_module("lm_head", 0.4),
    )
    grid = build_error_grid(make_report(modules=modules, skipped=()))
    assert grid.rows == ("q", "down", "lm_head")
    assert grid.columns == (0, 10, HEAD)
    assert grid.errors == {
        ("q", 0): 0.1,
        ("down", 0): 0.2,
        ("q", 10): 0.3,
        ("lm_head", HEAD): 0.4,
    }


def test_experts_share_a_mean_and_a_worst_row(make_report, make_module):
    modules = [make_module(f"l.0.experts.{i}.up", error) for i, error in enumerate((0.1, 0.2, 0.6))]
    grid = build_error_grid(make_report(modules=tuple(modules)))
    assert grid.rows == ("experts.*.up mean", "experts.*.up worst")
    assert grid.errors["experts.*.up mean", 0] == pytest.approx(0.3)
    assert grid.errors["experts.*.up worst", 0] == 0.6


def test_skipped_cells_differ_from_missing_ones(make_report, make_module):
    skipped = (
        SkippedModule(name="l.1.q", reason="r"),
        SkippedModule(name="l.0.experts.4.up", reason="r"),
    )
    modules = (make_module("l.0.q"), make_module("l.0.experts.3.up"))
    grid = build_error_grid(make_report(modules=modules, skipped=skipped))
    # Expert 4 is skipped, but its cell shows the other experts.
    assert grid.skipped == {("q", 1)}


@pytest.mark.parametrize("blocks", [1, 12, 80])
def test_plot_widens_with_the_number_of_blocks(make_report, make_module, tmp_path, blocks):
    modules = tuple(make_module(f"l.{b}.q", 0.01 * (b + 1)) for b in range(blocks))
    path = save_plot(make_report(modules=modules), tmp_path)
    assert path == tmp_path / PLOT_FILE
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
    assert 900 <= width <= 2600
    assert 400 <= height <= 700


@pytest.mark.parametrize("error", [0.0, 1e-7])
def test_equal_and_zero_errors_can_be_plotted(make_report, make_module, tmp_path, error):
    modules = (make_module("l.0.q", error), make_module("l.1.q", error))
    assert save_plot(make_report(modules=modules), tmp_path).stat().st_size > 1000


def test_no_errors_give_no_file(make_report, make_module, tmp_path):
    assert save_plot(make_report(modules=(make_module("l.0.q", None),)), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_plotting_does_not_import_pyplot(make_report, tmp_path):
    save_plot(make_report(), tmp_path)
    assert "matplotlib.pyplot" not in sys.modules
