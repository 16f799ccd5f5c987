"""Progress of a run, for people: on standard error where that is a terminal, and in notebooks with ipywidgets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["StageProgress"]

_BAR = 10  # characters: with all else a line of 80 is full


class _Count(ProgressColumn):
    """How much is done, of how much where that is known, and of what; nothing where there is nothing to count."""

    def render(self, task: Task) -> Text:
        """Return the column of a task."""
        if task.total is None:
            return Text(f"{task.completed} {task.fields['unit']}" if task.completed else "")
        return Text(f"{task.completed}/{task.total} {task.fields['unit']}")


class _Left(ProgressColumn):
    """How long the rest will take about, once that is known."""

    max_refresh = 1.0  # seconds

    def __init__(self, seconds: Callable[[], float | None]) -> None:
        super().__init__()
        self._seconds = seconds

    def render(self, task: Task) -> Text:
        """Return the column of a task."""
        seconds = self._seconds()
        return Text("" if seconds is None else f"{timedelta(seconds=round(seconds))} left", style="dim")


class StageProgress:
    """A bar over the calibration samples of the running stage, what its method tries, or the epochs of its fine-tuning.

    Args:
        shown: Whether to show anything.
    """

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self._stages, self._number = 1, 0
        self._starts: list[float] = []  # of the stages so far, seconds
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(_BAR),
            _Count(),
            TimeElapsedColumn(),
            _Left(self.seconds_left),
            console=console,
            transient=True,
            disable=not (shown and (console.is_terminal or _in_notebook(console))),
            redirect_stdout=getattr(sys.stdout, "isatty", bool)(),  # else what a loss prints would leave its file
        )
        self._task = self._bar.add_task("pruning", total=None, unit="samples")

    def __enter__(self) -> StageProgress:
        """Start the bar."""
        if not self._bar.disable:  # rich before 15 writes an empty line all the same
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if not self._bar.disable:
            self._bar.stop()

    def expect(self, stages: int) -> None:
        """Say how many stages there are; the next one begins anew, or goes on after those of a checkpoint."""
        self._stages, self._starts = stages, []

    def seconds_left(self) -> float | None:
        """Return how long the rest of the stages takes, if each takes as long as those before; None in the first."""
        done = len(self._starts) - 1
        if done < 1:
            return None
        each = (self._starts[-1] - self._starts[0]) / done
        return max(0.0, each - (time.monotonic() - self._starts[-1])) + each * (self._stages - self._number)

    def stage(self, number: int, sparsity: float, samples: int) -> None:
        """Begin a stage that will take the gradients of some samples."""
        self._number, self._starts = number, [*self._starts, time.monotonic()]
        self._begin(f"stage {number}/{self._stages}: sparsity {sparsity:.4f}", samples, "samples")

    def advance(self, samples: int) -> None:
        """Count samples whose gradients were taken."""
        self._bar.advance(self._task, samples)

    def choose(self, number: int) -> None:
        """Say that the method of a stage chooses its weights, which takes as long as it takes."""
        self._begin(f"stage {number}/{self._stages}: choosing weights", None, "tried")

    def try_one(self) -> None:
        """Count a network that the method has tried."""
        self._bar.advance(self._task)

    def train(self, epochs: int, number: int | None = None) -> None:
        """Begin the fine-tuning of a stage, or one by itself."""
        label = "fine-tuning" if number is None else f"stage {number}/{self._stages}: fine-tuning"
        self._begin(label, epochs, "epochs")

    def reach(self, epochs: float) -> None:
        """Say how many epochs are done, in fractions."""
        self._bar.update(self._task, completed=round(epochs, 1))

    def _begin(self, label: str, total: int | None, unit: str) -> None:
        """Begin to count something else."""
        self._bar.remove_task(self._task)  # no task can be given an unknown end later on
        self._task = self._bar.add_task(label, total=total, unit=unit)


def _in_notebook(console: Console) -> bool:
    """Whether output goes to a notebook that can show a bar; without ipywidgets rich would warn at each change."""
    return console.is_jupyter and find_spec("ipywidgets") is not None
