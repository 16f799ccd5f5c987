"""G of single samples, beside that of mini-batches: taken when a method asks for it.

Place in the pipeline: in the solution of a stage that compares both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swap_prune.checks import first_line
from swap_prune.fisher.backends.mapped import MappedFactor
from swap_prune.fisher.capture.rows import Capture
from swap_prune.fisher.factor import FisherFactor
from swap_prune.fisher.storage import Storage
from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import forked_generator
from swap_prune.request import Request
from swap_prune.stages.capturing import RowCapture
from swap_prune.stages.defending import Defended

__all__ = ["SingleRows"]


class _Stage(Protocol):
    """What it needs of :class:`StageRunner`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def request(self) -> Request: ...
    @property
    def storage(self) -> Storage: ...
    def disturb(self, weights: Tensor, generator: torch.Generator) -> Tensor: ...
    def defended(
        self, capture: Capture, fitting: list[Any], number: int, generator: torch.Generator, *, in_batches: bool
    ) -> Defended: ...


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

    stage: _Stage
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
