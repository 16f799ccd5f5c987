"""What parts of a stage need of :class:`swap_prune.stages.runner.StageRunner`, which makes them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.rows import Capture
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.storage import Storage
from swap_prune.request import Request
from swap_prune.sample_defence.record import SampleDefence
from swap_prune.stages.defending import Defended
from swap_prune.training.teaching import Taught

__all__ = ["Stage"]


class Stage(Protocol):
    """The runner, as they see it."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        ...

    @property
    def request(self) -> Request:
        """What is asked for."""
        ...

    @property
    def storage(self) -> Storage:
        """How G is held."""
        ...

    @property
    def sample_defence(self) -> SampleDefence | None:
        """What has been seen of the samples so far; None where they are believed."""
        ...

    def disturb(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Return weights (p,) with the noise of the run."""
        ...

    def noisy(self, factor: DenseFactor, generator: torch.Generator) -> DenseFactor:
        """Return rows of G with the noise of the run, which acts in place."""
        ...

    def taught(self, batches: list[Any]) -> list[Taught]:
        """Return batches with what the network before pruning says of them, where there is one to ask."""
        ...

    def judges(self, batches: list[Any]) -> list[Taught]:
        """Return the same of batches that candidates will be judged by, checked."""
        ...

    def defended(
        self, capture: Capture, fitting: list[Any], number: int, generator: torch.Generator, *, in_batches: bool
    ) -> Defended:
        """Return G with the noise of the run, and cleaned of it."""
        ...
