"""Plots: what the legend names, where a band is drawn, and texts that are no formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from swap_prune.experiments.plots import _style, write_plots
from swap_prune.experiments.results import RunResult
from swap_prune.experiments.tables import summarise
from tests.experiments.test_tables import NOISE, result


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draw the plots of some results; returns the figures by the names of their files."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path, **_: object) -> None:
        figure.canvas.draw()
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(*results: RunResult) -> dict[str, Figure]:
        figures.clear()
        names = [path.name for path in write_plots(summarise(results), tmp_path)]
        return dict(zip(names, figures, strict=True))

    return draw


def test_every_method_is_in_every_legend(drawn) -> None:
    failed = result("_slow", 0, None, error="bad", seconds=None, layers={})
    figures = drawn(result("lr", 0, 90.0), failed, result("_slow", 0, 85.0, NOISE), result("$x", 0, 80.0, NOISE))
    for name, figure in figures.items():
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["lr", "_slow", r"\$x"], name
        colours = [line.get_color() for line in legend.get_lines()]
        assert len(set(colours)) == 3
        assert set(colours[1:]) <= {line.get_color() for line in figure.axes[1].get_lines()}, name


def test_points_of_sixteen_methods_are_told_apart_without_their_lines() -> None:
    styles = [_style(number) for number in range(16)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 16


def test_sparsities_that_are_near_are_told_apart(drawn) -> None:
    figures = drawn(result("lr", 0, 90.0), result("lr", 0, 90.0, sparsity=0.9000001))
    (axis,) = figures["accuracy.png"].axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.9", "0.9000001"]
    assert "0.9000001)" in figures["layers.png"].axes[0].get_xlabel()


def test_one_run_has_no_band(drawn) -> None:
    sparsities = {0.5: (90.0, 92.0), 0.7: (80.0,), 0.8: (70.0, 74.0), 0.9: (60.0, 64.0)}
    runs = [
        result("lr", seed, accuracy, sparsity=sparsity)
        for sparsity, accuracies in sparsities.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    figures = drawn(*runs)
    (band,) = figures["accuracy.png"].axes[0].collections
    reached = np.concatenate([path.vertices[:, 0] for path in band.get_paths()])
    assert not np.isclose(reached, -np.log2(1 - 0.7)).any() and np.isclose(reached, -np.log2(1 - 0.8)).any()
    (bars,) = figures["seconds.png"].axes[0].collections
    assert [len(bar) for bar in bars.get_segments()] == [2, 0, 2, 2]


def test_plots_of_results_that_all_failed(tmp_path: Path) -> None:
    failed = result("lr", 0, None, error="bad", seconds=None, layers={})
    assert all(path.exists() for path in write_plots(summarise([failed]), tmp_path))


def test_no_text_is_a_formula(tmp_path: Path) -> None:
    settings = {**result("lr", 0, 90.0).settings, "model": r"nets:$\a$", "noise": r"$\b$"}
    results = [
        result(label, 0, 90.0, settings=settings, layers={r"a$\c$": 0.8, "$": 0.9}) for label in ("lr $x^$ y", "$")
    ]
    assert all(path.exists() for path in write_plots(summarise(results), tmp_path))


def test_long_texts_stay_in_the_picture(drawn) -> None:
    noise = "adversarial:attack=pgd,budget=0.1,norm=linf,steps=10+labels:fraction=0.2,kind=symmetric"
    layers = {f"model.blocks.{number}.attention.query.weight": 0.9 for number in range(40)}
    labels = ["a label of some eighty letters to see what becomes of it in the legends of pictures", "another" * 9]
    figures = drawn(*(result(label, 0, 90.0, kind, layers=layers) for label in labels for kind in ("none", noise)))
    for name, figure in figures.items():
        texts = [*(axis.title for axis in figure.axes), *figure.legends[0].get_texts(), figure._suptitle]
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, (name, text.get_text())
        left, right = figure.axes
        assert left.title.get_window_extent().x1 < right.title.get_window_extent().x0
        assert left.get_window_extent().height > 0.3 * figure.bbox.height, name


def test_times_that_are_near_have_more_than_one_tick(drawn) -> None:
    for times, scale in (((1.0, 1.3), "linear"), ((1.0, 30.0), "log")):
        runs = [result(name, 0, 90.0, seconds=one) for name, one in zip(("lr", "ewr"), times, strict=True)]
        (axis,) = drawn(*runs)["seconds.png"].axes
        low, high = axis.get_xlim()
        assert axis.get_xscale() == scale and sum(low <= tick <= high for tick in axis.get_xticks()) > 1


def test_letters_that_the_font_lacks_are_no_warning(tmp_path: Path) -> None:
    write_plots(summarise([result("\u5e45", 0, 90.0)]), tmp_path)  # warnings are errors here
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
