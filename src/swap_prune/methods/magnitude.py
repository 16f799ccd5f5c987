"""Magnitude pruning: keep the k weights of largest absolute value, unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from swap_prune.methods.scoring import check_scope, keep_unchanged, select_best
from swap_prune.problem import PruningProblem, PruningSolution

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude:
    """Magnitude pruning (Han et al., 2015). It needs no data.

    Attributes:
        scope: ``"global"`` compares all weights, ``"layer"`` keeps the same share of every layer.
    """

    scope: Literal["global", "layer"] = "global"

    name: ClassVar[str] = "magnitude"
    needs_gradients: ClassVar[bool] = False
    needs_held_out: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_scope(self.scope, ("global", "layer"))

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Keep the largest weights."""
        return keep_unchanged(problem, select_best(problem, problem.reference.abs(), self.scope))
