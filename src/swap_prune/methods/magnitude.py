"""Magnitude pruning: keep the k weights of largest absolute value, unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.iht import hard_threshold, top_k

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude:
    """Global magnitude pruning (Han et al., 2015). It needs no gradients and has no settings."""

    name: ClassVar[str] = "magnitude"
    needs_gradients: ClassVar[bool] = False
    needs_held_out: ClassVar[bool] = False

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Keep the largest weights."""
        support = top_k(problem.reference.abs(), problem.keep)
        kept = torch.zeros_like(problem.reference, dtype=torch.bool).index_fill(0, support, True)
        return PruningSolution(hard_threshold(problem.reference, support), kept)
