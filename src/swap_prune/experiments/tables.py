"""What an experiment's results say: means over seeds, paired differences, the cost, as Markdown and CSV.

Everything comes from the lines of ``results.jsonl``. Runs are paired by sparsity, stages, noise and seed, so that a
difference has a smaller error than the accuracies that it is taken of: methods that hold as many samples out are
calibrated on the same ones in each stage, others in the first.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from swap_prune.checks import counted
from swap_prune.experiments.results import RunResult, shortest
from swap_prune.files import replacing
from swap_prune.selection import DEFAULT_TARGETS

__all__ = ["Cell", "Estimate", "Summary", "as_csv", "as_markdown", "summarise", "write_tables"]

_Point = tuple[float, int | str, str, int]  # sparsity, stages, noise, seed


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Its standard error, the standard deviation over the root of ``runs``; None for one run.
        runs: Number of runs.
    """

    mean: float
    error: float | None
    runs: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Estimate | None:
        """Return the estimate from what is there of some values; None from nothing."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        error = statistics.stdev(there) / len(there) ** 0.5 if len(there) > 1 else None
        return cls(statistics.fmean(there), error, len(there))

    def shown(self, digits: int = 2) -> str:
        """Return the mean and its error with some digits behind the point."""
        return f"{self.mean:.{digits}f}" + ("" if self.error is None else f" ± {self.error:.{digits}f}")

    def __str__(self) -> str:
        return self.shown()


@dataclass(frozen=True)
class Cell:
    """One method at one point of the grid, over its seeds.

    Attributes:
        label: The method's name in tables.
        sparsity: Sparsity asked for.
        stages: Number of stages, or ``"auto"``.
        noise: Noise spec, or ``"none"``.
        accuracy: In percent.
        loss: Mean cross-entropy on the test images.
        accuracy_before: Accuracy with the dense network's BatchNorm statistics.
        loss_before: The loss with them.
        difference: Accuracy less that of the reference method, paired.
        lost_to_noise: The method's own accuracy without noise less that with it, paired.
        seconds: Of ``prune``, the median: the first run of a process is slower than the others.
        peak_memory: Largest of its runs, in bytes.
        layers: Parameter name to its mean sparsity.
    """

    label: str
    sparsity: float
    stages: int | str
    noise: str
    accuracy: Estimate | None
    loss: Estimate | None
    accuracy_before: Estimate | None
    loss_before: Estimate | None
    difference: Estimate | None
    lost_to_noise: Estimate | None
    seconds: float | None
    peak_memory: int | None
    layers: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """A report.

    Attributes:
        title: Model and data.
        reference: Label of the method that differences are taken from.
        dense: Accuracy of the dense network, in percent.
        seeds: Number of seeds in the results; a cell over fewer is marked.
        cells: All methods at all points.
        notes: What a reader should know.
    """

    title: str
    reference: str
    dense: float | None
    seeds: int
    cells: list[Cell]
    notes: list[str]

    def panels(self) -> list[tuple[int | str, str]]:
        """Return the pairs of stages and noise, in the order of the results."""
        return list(dict.fromkeys((cell.stages, cell.noise) for cell in self.cells))

    def labels(self) -> list[str]:
        """Return the methods in the order of the results."""
        return list(dict.fromkeys(cell.label for cell in self.cells))

    def sparsities(self) -> list[float]:
        """Return the sparsities, ascending."""
        return sorted({cell.sparsity for cell in self.cells})

    def row(self, label: str, panel: tuple[int | str, str]) -> list[Cell]:
        """Return the cells of a method in a panel, by sparsity."""
        cells = (cell for cell in self.cells if cell.label == label and (cell.stages, cell.noise) == panel)
        return sorted(cells, key=lambda cell: cell.sparsity)


def summarise(results: Sequence[RunResult], reference: str | None = None) -> Summary:
    """Average an experiment's results over its seeds.

    Args:
        results: At least one, each run once.
        reference: Label of the method to take differences from; by default the first of which a run has not failed.

    Raises:
        ValueError: If no result has that label.
    """
    labels = list(dict.fromkeys(result.label for result in results))
    if reference is None:
        alive = {result.label for result in results if result.error is None}
        reference = next((label for label in labels if label in alive), labels[0])
    if reference not in labels:
        raise ValueError(f"reference must be one of {', '.join(labels)}, got {reference!r}")
    runs = {label: {_point(r): r for r in results if r.label == label} for label in labels}
    cells = [
        _cell(label, point, runs[label], runs[reference])
        for point in dict.fromkeys(_point(result)[:3] for result in results)
        for label in labels
    ]
    first = next((result for result in results if result.error is None), results[0])
    title = f"{first.settings['model']} on {first.settings['data']}"
    seeds = len({result.seed for result in results})
    return Summary(title, reference, first.dense_accuracy, seeds, cells, _notes(results, first))


def _point(result: RunResult) -> _Point:
    settings = result.settings
    return settings["sparsity"], settings["stages"], settings["noise"], result.seed


def _cell(
    label: str, place: tuple[float, int | str, str], runs: dict[_Point, RunResult], others: dict[_Point, RunResult]
) -> Cell:
    sparsity, stages, noise = place
    own = {point: run for point, run in runs.items() if point[:3] == place and run.error is None}
    clean = {point: runs.get((sparsity, stages, "none", point[3])) for point in own}
    names = dict.fromkeys(name for run in own.values() for name in run.layers)
    return Cell(
        label=label,
        sparsity=sparsity,
        stages=stages,
        noise=noise,
        accuracy=Estimate.over(run.accuracy for run in own.values()),
        loss=Estimate.over(run.loss for run in own.values()),
        accuracy_before=Estimate.over(run.accuracy_before for run in own.values()),
        loss_before=Estimate.over(run.loss_before for run in own.values()),
        difference=None
        if runs is others
        else Estimate.over(_less(run, others.get(point)) for point, run in own.items()),
        lost_to_noise=None
        if noise == "none"
        else Estimate.over(_less(clean[point], run) for point, run in own.items()),
        seconds=_median(run.seconds for run in own.values()),
        peak_memory=max((run.peak_memory for run in own.values() if run.peak_memory is not None), default=None),
        layers={name: statistics.fmean(run.layers[name] for run in own.values()) for name in names},
    )


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _less(run: RunResult | None, other: RunResult | None) -> float | None:
    if run is None or other is None or run.accuracy is None or other.accuracy is None:
        return None
    return run.accuracy - other.accuracy


def _notes(results: Sequence[RunResult], first: RunResult) -> list[str]:
    notes = [f"{counted(len(results), 'run')}. Settings: " + _settings(first)]
    failed = [result for result in results if result.error is not None]
    if failed:
        left_out = "1 run failed and is" if len(failed) == 1 else f"{len(failed)} runs failed and are"
        notes.append(f"{left_out} left out; the first: {failed[0].label}: {failed[0].error}")
    versions = sorted({", ".join(f"{k} {v}" for k, v in result.versions.items()) for result in results})
    notes.append(("Made with " if len(versions) == 1 else "Made with different versions: ") + "; ".join(versions))
    return notes + sorted(_gathered(results))


def _gathered(results: Sequence[RunResult]) -> list[str]:
    """Return the notes of the runs; of a method's that differ in their numbers alone the first, and how many."""
    alike: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for note in dict.fromkeys(result.notes):
            masked = re.sub(r"(?<![\w.])\d+(\.\d+)?(e[+-]?\d+)?(?![\w.])", "#", note)  # digits of a name are no number
            alike.setdefault((result.label, masked), []).append(f"{result.label}: {note}")
    return [lines[0] + (f" (in {len(lines)} runs)" if len(lines) > 1 else "") for lines in alike.values()]


def _settings(result: RunResult) -> str:
    shown = {name: result.settings[name] for name in ("samples", "schedule", "recalibrate_batchnorm")}
    chosen = ("targets", "ignore", "min_keep", "pattern")
    shown |= {name: result.settings[name] for name in chosen if result.settings.get(name)}
    if tuple(shown.get("targets", ())) == DEFAULT_TARGETS:
        del shown["targets"]
    if "finetune" in result.settings:
        shown |= {f"fine-tuning {name}": value for name, value in result.settings["finetune"].items()}
    if result.test_samples is not None:
        shown["test images"] = result.test_samples
    return ", ".join(f"{name} {_plain(value)}" for name, value in shown.items())


def _plain(value: Any) -> str:
    """Return a setting without brackets and quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {part}" for name, part in value.items())
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def as_markdown(summary: Summary) -> str:
    """Return the report as text: for each number of stages and each noise, a table a question."""
    lines = [f"# {summary.title}", ""]
    if summary.dense is not None:
        lines += [f"Dense network: {summary.dense:.2f} %. Figures are means over seeds, ± one standard error.", ""]
    lines += [f"- {note}" for note in summary.notes]
    for panel in summary.panels():
        stages, noise = panel
        lines += ["", f"## {stages} stage{'s' * (stages != 1)}, noise: {noise}"]
        for title, (pick, digits) in _QUESTIONS.items():
            lines += _table(summary, panel, title.format(reference=summary.reference), pick, digits)
        lines += _cost(summary, panel)
    return "\n".join(lines) + "\n"


_QUESTIONS: dict[str, tuple[Callable[[Cell], Estimate | None], int]] = {  # what is shown, digits behind the point
    "Accuracy, %": (lambda cell: cell.accuracy, 2),
    "Accuracy less that of {reference}, same seeds": (lambda cell: cell.difference, 2),
    "Own accuracy without noise less that with it, same seeds": (lambda cell: cell.lost_to_noise, 2),
    "Accuracy with the dense network's BatchNorm statistics, %": (lambda cell: cell.accuracy_before, 2),
    "Test loss": (lambda cell: cell.loss, 3),
    "Test loss with the dense network's BatchNorm statistics": (lambda cell: cell.loss_before, 3),
}


def _table(
    summary: Summary, panel: tuple[int | str, str], title: str, pick: Callable[[Cell], Estimate | None], digits: int
) -> list[str]:
    """Return a table of methods by sparsity; nothing, where there is nothing to show."""
    rows = {label: {cell.sparsity: pick(cell) for cell in summary.row(label, panel)} for label in summary.labels()}
    if not any(estimate for row in rows.values() for estimate in row.values()):
        return []
    sparsities = summary.sparsities()
    lines = ["", f"{title}:", "", "| method | " + " | ".join(map(shortest, sparsities)) + " |"]
    lines.append("|---|" + "---|" * len(sparsities))
    for label, row in rows.items():
        if not any(row.values()):
            continue
        shown = []
        for estimate in map(row.get, sparsities):
            fewer = f" ({estimate.runs} runs)" if estimate is not None and estimate.runs < summary.seeds else ""
            shown.append("-" if estimate is None else f"{estimate.shown(digits)}{fewer}")
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return lines


def _cost(summary: Summary, panel: tuple[int | str, str]) -> list[str]:
    lines = ["", "| method | seconds a run | peak memory, MB |", "|---|---|---|"]
    for label in summary.labels():
        cells = summary.row(label, panel)
        seconds = _median(cell.seconds for cell in cells)
        memory = max((cell.peak_memory for cell in cells if cell.peak_memory is not None), default=None)
        shown = ("-" if seconds is None else f"{seconds:.2f}", "-" if memory is None else f"{memory / 1e6:.0f}")
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return lines


def as_csv(summary: Summary) -> str:
    """Return one line a cell; an estimate takes three columns: mean, error and number of runs."""
    estimates = ("accuracy", "loss", "accuracy_before", "loss_before", "difference", "lost_to_noise")
    columns = [name for field in estimates for name in (field, f"{field}_error", f"{field}_runs")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "sparsity", "stages", "noise", "reference", *columns, "seconds", "peak_memory"])
    for cell in summary.cells:
        row: list[object] = [cell.label, cell.sparsity, cell.stages, cell.noise, summary.reference]
        for name in estimates:
            estimate = getattr(cell, name)
            row += [getattr(estimate, field.name, "") for field in fields(Estimate)]
        writer.writerow([*row, cell.seconds, cell.peak_memory])
    return text.getvalue()


def write_tables(summary: Summary, directory: Path) -> list[Path]:
    """Write ``tables.md`` and ``tables.csv``; returns their paths."""
    written = {directory / "tables.md": as_markdown(summary), directory / "tables.csv": as_csv(summary)}
    for path, text in written.items():
        with replacing(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return list(written)
