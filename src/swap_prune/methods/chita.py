"""CHITA: sparse ridge regression on the empirical Fisher by iterative hard thresholding on an active set.

Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao and Mazumder, "Fast as CHITA: Neural Network Pruning with Combinatorial
Optimization", ICML 2023; its regression without the first-order term::

    minimise  1/2 ||G w - G w_bar||^2 + n lam/2 ||w - w_bar||^2   subject to  ||w||_0 <= k

LR in this package states the same problem in another metric, solves it by exact refits, and chooses its settings. This
is the published method, with its own solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from swap_prune.checks import positive_number, whole_number
from swap_prune.methods.pairing import pairing_regression, solution_of
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.active_set import solve_active_set

__all__ = ["CHITA"]


@dataclass(frozen=True)
class CHITA:
    """CHITA (Benbaki et al., 2023), the network-wide one-shot version.

    Attributes:
        ridge: lam > 0 itself: it has the unit of the Fisher diagonal.
        iterations: Iterations on one active set, and active sets, at the most.
    """

    ridge: float = 0.01
    iterations: int = 50

    name: ClassVar[str] = "chita"
    needs_gradients: ClassVar[bool] = True
    needs_held_out: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    keeps_patterns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_number("ridge", self.ridge)
        whole_number("iterations", self.iterations)

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Solve the regression on its active set."""
        if problem.keep in (0, problem.reference.numel()):
            return problem.trivial_solution()
        fit = solve_active_set(
            pairing_regression(problem, self.ridge, math.inf, "identity"),
            problem.keep,
            generator,
            max_iterations=self.iterations,
        )
        return solution_of(fit, {"ridge": self.ridge, "objective": fit.value})
