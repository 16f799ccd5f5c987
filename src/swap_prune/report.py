"""What a pruning run did: the object that ``prune`` returns and that an artifact stores."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

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
        settings: Every setting that the run used, defaults included.
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

    _saver: Callable[[PruningReport, str | Path], Path] | None = PrivateAttr(default=None)

    def bind(self, saver: Callable[[PruningReport, str | Path], Path]) -> PruningReport:
        """Remember how to save the pruned model."""
        self._saver = saver
        return self

    def save(self, directory: str | Path) -> Path:
        """Write the pruned model's weights and this report to a new directory.

        Args:
            directory: Must not exist, or be empty. It appears whole or not at all.

        Returns:
            The directory.

        Raises:
            ValueError: If it cannot be written, or the model no longer has the sparsity reported.
        """
        if self._saver is None:
            raise ValueError("this report was read from a file: there is no model to save with it")
        return self._saver(self, directory)

    def to_dict(self) -> Mapping[str, Any]:
        """Return plain types, as stored in ``report.json``."""
        return self.model_dump(mode="json")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "swap-prune": version("swap-prune"),
    }
