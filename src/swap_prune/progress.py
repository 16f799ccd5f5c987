"""Progress of a run on standard error, for people; silent when standard error is not a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["StageProgress"]


class StageProgress:
    """A bar over the calibration samples of the running stage, or the epochs of its fine-tuning.

    Args:
        shown: Whether to show anything.
    """

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self._stages = 1
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
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
        label = f"stage {number}/{self._stages}: sparsity {sparsity:.4f}"
        self._bar.reset(self._task, total=samples, description=label, unit="samples")

    def advance(self, samples: int) -> None:
        """Count samples whose gradients were taken."""
        self._bar.advance(self._task, samples)

    def train(self, epochs: int, number: int | None = None) -> None:
        """Begin the fine-tuning of a stage, or one by itself."""
        label = "fine-tuning" if number is None else f"stage {number}/{self._stages}: fine-tuning"
        self._bar.reset(self._task, total=epochs, description=label, unit="epochs")

    def reach(self, epochs: float) -> None:
        """Say how many epochs are done, in fractions."""
        self._bar.update(self._task, completed=round(epochs, 1))
