"""What a pruning run did: the object that ``prune`` returns and that an artifact stores."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr
from torch import nn

__all__ = ["LayerReport", "PruningReport", "StageReport", "versions"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class LayerReport(_Record):
    """Counts of one parameter.

    Attributes:
        total: Number of weights.
        kept: Number of non-zero weights.
    """

    total: int
    kept: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.kept / self.total


class StageReport(_Record):
    """One stage.

    Attributes:
        sparsity: Sparsity asked for at this stage.
        kept: Number of weights kept.
        samples: Calibration samples of the stage; 0 for a method that takes no data.
        loss: Mean calibration loss before the stage's weights changed, under noise that of what gradients were taken
            of; None without gradients.
        seconds: Wall-clock seconds.
        converged: Whether the method's stopping test was met.
        iterations: The method's iterations.
        evidence: What the method chose, and why.
    """

    sparsity: float
    kept: int
    samples: int
    loss: float | None
    seconds: float
    converged: bool
    iterations: int
    evidence: dict[str, Any]


class PruningReport(_Record):
    """The result of ``swap_prune.prune``.

    Attributes:
        method: Name of the method.
        sparsity: Fraction of exact zeros among the selected weights, measured on the model.
        kept: Number of non-zero selected weights, measured.
        total: p, the number of selected weights.
        layers: Parameter name to its counts.
        seconds: Wall-clock seconds of the whole call.
        settings: The arguments of ``prune``, defaults included, but for model, data, recalibration_data, loss_fn,
            scratch, keep_rows, checkpoint, progress and seed; pattern and finetune where they are given. And how G was
            held, where it was computed, and how images were laid out.
        seed: Seed of its random state.
        stages: What each stage did.
        versions: Versions of Python, torch and swap-prune.
        notes: What a reader should know: fewer samples than asked for, statistics that were repaired, layers
            that were emptied.
    """

    method: str
    sparsity: float
    kept: int
    total: int
    layers: dict[str, LayerReport]
    seconds: float
    settings: dict[str, Any]
    seed: int
    stages: list[StageReport]
    versions: dict[str, str]
    notes: list[str]

    _saver: Callable[[nn.Module, PruningReport, str | Path], Path] | None = PrivateAttr(default=None)
    _model: nn.Module | None = PrivateAttr(default=None)

    def bind(
        self, saver: Callable[[nn.Module, PruningReport, str | Path], Path], model: nn.Module | None = None
    ) -> PruningReport:
        """Remember how a model is saved with this report, and the one that it is of."""
        self._saver, self._model = saver, model
        return self

    def save(self, directory: str | Path, model: nn.Module | None = None) -> Path:
        """Write the pruned model's weights and this report to a new directory.

        Args:
            directory: Must not exist, or be empty. It appears whole or not at all.
            model: The model to save, with the zeros that are reported; by default the one that was pruned. A report
                that :func:`swap_prune.load_report` read has none.

        Returns:
            The directory.

        Raises:
            ValueError: If it cannot be written, or the model does not have the sparsity reported.
        """
        model = self._model if model is None else model
        if self._saver is None or model is None:
            raise ValueError("this report was read from a file: name the model to save with it, save(directory, model)")
        return self._saver(model, self, directory)

    def __str__(self) -> str:
        """Return what matters most in a few lines; ``to_dict()`` has everything."""
        lines = [
            f"{self.method}: {self.kept:,} of {self.total:,} weights kept, sparsity {self.sparsity:.4f}, "
            f"{len(self.stages)} stage{'s' * (len(self.stages) != 1)}, {self.seconds:.1f} s"
        ]
        width = max(map(len, self.layers), default=0)
        lines += [
            f"  {name:<{width}}  {layer.kept:>12,} of {layer.total:>12,}  {layer.sparsity:.4f}"
            for name, layer in self.layers.items()
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> Mapping[str, Any]:
        """Return plain types, as stored in ``report.json``."""
        return self.model_dump(mode="json")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "swap-prune": _version("swap-prune"),
    }


def _version(package: str) -> str:
    """Return the version of a package, whose source may lie on the path without having been installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
