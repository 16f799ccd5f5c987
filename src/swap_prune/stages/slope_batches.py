"""The batches that slopes are averaged over: as large as run at once, or smaller, so that noise can be told in them.

Place in the pipeline: between the defence of a stage and its trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from swap_prune.fisher.capture.sketch import mini_batches, without_singles
from swap_prune.fisher.storage import Storage
from swap_prune.request import Request
from swap_prune.samples.batches import batch_size, is_single, split_batches
from swap_prune.stages.capturing import rows_in_batches
from swap_prune.stages.defending import Defended
from swap_prune.surgery.batchnorm import normalises_vectors

__all__ = ["SlopeBatches"]

_LEAST_PARTS = 16  # of a slope, to tell a poisoned one from the others by


@dataclass(frozen=True)
class SlopeBatches:
    """How the samples of a stage are put in batches.

    Attributes:
        model: The network.
        request: What is asked for.
        largest: Samples that run at once.
        at_once: The same where gradients of batches are looked at.
        in_batches: Whether they are the mini-batches that make a row of G.
        stored: Whether they are of samples alone, with the statistics that are stored.
        small: Whether they may be smaller than what runs at once.
    """

    model: nn.Module
    request: Request
    largest: int
    at_once: int
    in_batches: bool
    stored: bool
    small: bool

    @classmethod
    def of(
        cls, model: nn.Module, request: Request, storage: Storage, fitting: Sequence[Any], defended: Defended
    ) -> SlopeBatches:
        """Return how those of a stage are, by what its defence has seen in the gradients of its samples."""
        slopes_cleaned = defended.defence is not None and defended.defence.cleans_slopes
        small = rows_in_batches(request, list(fitting)) and (slopes_cleaned or defended.clipped > 0)
        in_batches = small and slopes_cleaned
        at_once = storage.at_once
        if defended.clipped > 0:  # slopes are clipped by the batches that they are averaged over
            at_once = min(at_once, max(2, sum(map(batch_size, fitting)) // _LEAST_PARTS))
        stored = slopes_cleaned and not in_batches and request.recalibrates
        return cls(model, request, storage.at_once, at_once, in_batches, stored, small)

    def parts(self, samples: list[Any]) -> list[Any]:
        """Return samples in these batches."""
        if self.in_batches:
            parts = mini_batches(samples, self.request.mini_batch)
        else:
            parts = split_batches(samples, self.at_once)
        return without_singles(parts) if self.request.recalibrates else parts

    def large(self, samples: list[Any]) -> list[Any]:
        """Return samples in batches as large as run at once."""
        return without_singles(split_batches(samples, self.largest))

    def whole(self, samples: list[Any]) -> list[Any]:
        """Return samples in batches as large as run at once, where steps may go on with those; else none."""
        if not (self.small or self.stored):
            return []
        batches, parts = self.large(samples), self.parts(samples)
        larger = max(map(batch_size, batches)) > max(map(batch_size, parts))
        helps = self.stored or (normalises_vectors(self.model) and larger)
        return batches if helps and not all(map(is_single, batches)) else []
