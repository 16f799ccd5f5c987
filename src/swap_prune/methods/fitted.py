"""A candidate's sparse fit, as it is held while others are compared with it.

Place in the pipeline: what candidates are ranked and raced as, see :mod:`swap_prune.methods.contest`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swap_prune.methods.descent import Steps
from swap_prune.methods.held_out import mean_loss
from swap_prune.methods.pairing import Candidate
from swap_prune.regression.iht import SparseFit

__all__ = ["Fitted"]


class Fitted(NamedTuple):
    """A candidate's sparse fit.

    Its regression is stated anew where it is asked for: the metric is as large as p.

    Attributes:
        candidate: What was solved.
        packed: Its solution, of whose weights only those on the support are held, (k,).
        losses: On held-out samples, (n_v,), where there are any.
        loss: Their mean before steps, 0 where nothing is held out.
        entry: What the report says of it.
        steps: Those taken from it, if any were.
    """

    candidate: Candidate
    packed: SparseFit
    losses: Tensor | None
    loss: float
    entry: dict[str, Any]
    steps: Steps | None = None

    @classmethod
    def of(cls, candidate: Candidate, fit: SparseFit, losses: Tensor | None, **more: int) -> Fitted:
        """Pack a solution; what more is to be said goes to the report."""
        loss = 0.0 if losses is None else mean_loss(losses)
        entry = candidate._asdict() | more | {"held_out_loss": loss}
        return cls(candidate, _with_weights(fit, fit.weights.index_select(0, fit.support)), losses, loss, entry)

    def held_out(self) -> Tensor:
        """Return losses on held-out samples, (n_v,), where there are such samples."""
        assert self.losses is not None, "the caller checks"
        return self.losses

    def fit(self, like: Tensor) -> SparseFit:
        """Return the solution, its weights as large as another vector, (p,), again."""
        weights = torch.zeros_like(like).index_copy_(0, self.packed.support, self.packed.weights)
        return _with_weights(self.packed, weights)


def _with_weights(fit: SparseFit, weights: Tensor) -> SparseFit:
    """Return a fit and its refit with weights that are held otherwise, and without systems, which are large."""
    refit = None if fit.refit is None else replace(fit.refit, weights=weights, normal=None, system=None)
    return replace(fit, weights=weights, refit=refit)
