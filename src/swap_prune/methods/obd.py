"""Optimal brain damage: keep the weights whose removal costs most in the diagonal Fisher, unchanged.

Removing weight q alone changes the quadratic model of the loss by ``1/2 w_q^2 (f_q + c)`` (LeCun, Denker and Solla,
1989, with the empirical Fisher for the Hessian).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from swap_prune.checks import is_finite
from swap_prune.methods.scoring import keep_unchanged, select_best
from swap_prune.problem import PruningProblem, PruningSolution

__all__ = ["OBD"]


@dataclass(frozen=True)
class OBD:
    """Optimal brain damage (LeCun, Denker and Solla, 1989) with the empirical Fisher's diagonal.

    Attributes:
        damping: c >= 0, added to the diagonal; it ranks weights that no gradient reaches by their size.
    """

    damping: float = 1e-5

    name: ClassVar[str] = "obd"
    needs_gradients: ClassVar[bool] = True
    needs_held_out: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (is_finite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be a number of at least 0, got {self.damping!r}")

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Keep the weights of largest ``w^2 (f + c)``."""
        scores = problem.reference.square() * (problem.fisher().diagonal() + self.damping)
        return keep_unchanged(problem, select_best(problem, scores))
