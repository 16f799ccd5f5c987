"""Pictures of an experiment's results: accuracy over sparsity, accuracy over time, sparsity of the layers."""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from swap_prune.experiments.results import shortest
from swap_prune.experiments.tables import Cell, Summary
from swap_prune.files import replacing

__all__ = ["write_plots"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_MARKERS = "os^DvP*X"
_WIDEST = 3  # panels side by side; more cannot be read on a page
_WIDTH, _LINE = 5.2, 66  # of a panel, in inches and in letters of a title
_LETTER, _SHORT = 0.06, 16  # inches of a letter in the name of a layer; letters that there is room for
_ROW = 0.24  # inches of a row of the legend
_MARK = 8  # letters that a line's sample and margins take
_SHORT_RANGE = 4.0  # between the least and the most seconds: below it an axis is linear


def write_plots(summary: Summary, directory: Path) -> list[Path]:
    """Write ``accuracy.png``, ``seconds.png`` and ``layers.png``, one panel for each stages and noise.

    Returns:
        Their paths.
    """
    drawings: dict[str, Callable[[Any, Summary, tuple[int | str, str]], None]] = {
        "accuracy.png": _accuracy,
        "seconds.png": _seconds,
        "layers.png": _layers,
    }
    paths = []
    for name, draw in drawings.items():
        paths.append(directory / name)
        with replacing(paths[-1]) as scratch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box is drawn in its place
            _panels(summary, draw).savefig(scratch, dpi=110, metadata={"Software": None})
    return paths


def _panels(summary: Summary, draw: Callable[[Any, Summary, tuple[int | str, str]], None]) -> Figure:
    panels = summary.panels()
    columns = min(_WIDEST, -(-len(panels) // len({stages for stages, _ in panels})))
    rows = -(-len(panels) // columns)
    names = [len(name) for cell in summary.cells for name in cell.layers] if draw is _layers else []
    below = _LETTER * max(0, max(names, default=0) - _SHORT)  # names of layers stand upright
    texts = [_lines(label, columns) for label in summary.labels()]  # a panel may lack one
    longest = max(len(line) for text in texts for line in text.split("\n"))
    abreast = max(1, min(len(texts), 2 * columns, int(_LINE * columns / (longest + _MARK))))
    legend = _ROW * -(-len(texts) // abreast)
    figure = Figure(figsize=(1.2 + _WIDTH * columns, (3.7 + below) * rows + legend), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        draw(axis, summary, panel)
        axis.set_title(_plain(_lines(f"{panel[0]} stage{'s' * (panel[0] != 1)}, noise: {panel[1]}", 1)), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    labels = list(map(_plain, texts))
    handles = [Line2D([], [], **_style(number)) for number in range(len(labels))]
    figure.legend(handles, labels, loc="outside lower center", ncols=abreast, frameon=False)
    figure.suptitle(_plain(_lines(summary.title, columns)), fontsize=12)
    return figure


def _lines(text: str, columns: int) -> str:
    """Return a text in lines that fit so many panels side by side; settings of noise are parted where lines may end."""
    parted = re.sub(r"(?<=[,+])(?=\S)", " ", text) if len(text) > _LINE * columns - _MARK else text
    return "\n".join(textwrap.wrap(parted, _LINE * columns - _MARK))


def _plain(text: str) -> str:
    """Return a text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _style(number: int) -> dict[str, Any]:
    again = number // len(_COLOURS)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[(number + again) % len(_MARKERS)],  # points without lines are told apart too
        "linestyle": ("-", "--", ":")[again % 3],
        "markersize": 6,
        "markerfacecolor": "none",  # equal results stay visible
        "linewidth": 1.5,
    }


def _measured(summary: Summary, label: str, panel: tuple[int | str, str]) -> list[Cell]:
    return [cell for cell in summary.row(label, panel) if cell.accuracy is not None]


def _errors(cells: list[Cell]) -> list[float]:
    """Return the standard errors; one run has none, and its point no band, which 0 would claim to be exact."""
    errors = [cell.accuracy.error for cell in cells if cell.accuracy]
    return [math.nan if error is None else error for error in errors]


def _accuracy(axis: Any, summary: Summary, panel: tuple[int | str, str]) -> None:
    """Accuracy over the logarithm of the fraction kept, which spreads the high sparsities out."""
    for number, label in enumerate(summary.labels()):
        cells = _measured(summary, label, panel)
        x = np.array([-np.log2(1 - cell.sparsity) for cell in cells])
        mean = np.array([cell.accuracy.mean for cell in cells if cell.accuracy])
        error = np.array(_errors(cells))
        style = _style(number)
        axis.plot(x, mean, **style)
        axis.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
    if summary.dense is not None:
        axis.axhline(summary.dense, color="#9aa0a6", linestyle="--", linewidth=1, zorder=0)
    sparsities = summary.sparsities()
    axis.set_xticks([-np.log2(1 - s) for s in sparsities], list(map(shortest, sparsities)))
    axis.set_xlabel("sparsity (dashed: dense network)")
    axis.set_ylabel("test accuracy, %")


def _seconds(axis: Any, summary: Summary, panel: tuple[int | str, str]) -> None:
    """Accuracy over time; the points of a method are its sparsities."""
    for number, label in enumerate(summary.labels()):
        cells = [cell for cell in _measured(summary, label, panel) if cell.seconds]
        seconds = [cell.seconds for cell in cells]
        accuracy = [cell.accuracy.mean for cell in cells if cell.accuracy]
        axis.errorbar(seconds, accuracy, yerr=_errors(cells), **_style(number) | {"linestyle": "none"})
    axis.set_xlabel("seconds a run; a point is a sparsity")
    axis.set_ylabel("test accuracy, %")
    low, high = axis.dataLim.intervalx
    if not high > _SHORT_RANGE * low > 0:
        return
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # the default labels of a short range run into each other
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _layers(axis: Any, summary: Summary, panel: tuple[int | str, str]) -> None:
    """Sparsity of each layer at the highest sparsity."""
    highest = summary.sparsities()[-1]
    names: list[str] = []
    for number, label in enumerate(summary.labels()):
        cells = [cell for cell in _measured(summary, label, panel) if cell.sparsity == highest]
        for cell in cells:
            names = list(cell.layers)
            axis.plot(range(len(names)), list(cell.layers.values()), **_style(number))
    axis.axhline(highest, color="#9aa0a6", linestyle="--", linewidth=1, zorder=0)
    shown = [_plain(name.removesuffix(".weight")) for name in names]
    axis.set_xticks(range(len(names)), shown, rotation=90, fontsize=7)
    axis.set_ylim(0, 1.05)  # room for the marker of a layer that is emptied
    axis.set_xlabel(f"layer (dashed: all of them, {shortest(highest)})")
    axis.set_ylabel("sparsity")
