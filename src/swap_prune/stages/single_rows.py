"""G of single samples, beside that of mini-batches: taken when a method asks for it.

Place in the pipeline: in the solution of a stage that compares both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from swap_prune.checks import first_line
from swap_prune.fisher.backends.mapped import MappedFactor
from swap_prune.fisher.factor import FisherFactor
from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import forked_generator
from swap_prune.stages.capturing import RowCapture
from swap_prune.stages.stage import Stage

__all__ = ["SingleRows"]


@dataclass
class SingleRows:
    """What takes them.

    Attributes:
        stage: The runner.
        weights: Where gradients are taken, (p,).
        fitting: The samples.
        number: Of the stage, from 1.
        file: G, where it lies in a file, which is to be let go.
        left: Why they were not handed over.
    """

    stage: Stage
    weights: Tensor
    fitting: list[Any]
    number: int
    file: FisherFactor | None = None
    left: str | None = None

    def take(self) -> FisherFactor | None:
        """Return G; None where noise is seen in it, or the network or its loss does not take samples alone."""
        stage, generator = self.stage, forked_generator(self.stage.request.seed, f"noise on samples {self.number}")
        rows = RowCapture(stage.model, stage.request, stage.storage, self.number, in_batches=False)
        try:
            capture, _ = rows.capture(stage.disturb(self.weights, generator), self.fitting, lambda _count: None)
        except Exception as error:  # the caller's model or loss may raise anything
            pass_on_shortage(error)
            self.left = first_line(error)
            return None
        self.file = capture.factor if isinstance(capture.factor, MappedFactor) else None
        defended = stage.defended(capture, self.fitting, self.number, generator, in_batches=False)
        if defended.is_clean:
            return defended.factor
        self.left = "noise was seen in them"
        return None
