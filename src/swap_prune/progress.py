"""Progress of a run, for people: on standard error where that is a terminal, and in notebooks with ipywidgets."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["StageProgress"]


class _Count(ProgressColumn):
    """How much is done, of how much where that is known, and of what; nothing where there is nothing to count."""

    def render(self, task: Task) -> Text:
        """Return the column of a task."""
        if task.total is None:
            return Text(f"{task.completed} {task.fields['unit']}" if task.completed else "")
        return Text(f"{task.completed}/{task.total} {task.fields['unit']}")


class StageProgress:
    """A bar over the calibration samples of the running stage, what its method tries, or the epochs of its fine-tuning.

    Args:
        shown: Whether to show anything.
    """

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self._stages, self._stage = 1, "pruning"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
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
        """Say how many stages come next."""
        self._stages = stages

    def stage(self, number: int, sparsity: float, samples: int) -> None:
        """Begin a stage that will take the gradients of some samples."""
        self._stage = f"stage {number}/{self._stages}: sparsity {sparsity:.4f}"
        self._begin(self._stage, samples, "samples")

    def advance(self, samples: int) -> None:
        """Count samples whose gradients were taken."""
        self._bar.advance(self._task, samples)

    def choose(self) -> None:
        """Say that the method of the stage chooses its weights, which takes as long as it takes."""
        self._begin(f"{self._stage}, choosing weights", None, "tried")

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
