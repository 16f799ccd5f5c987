"""LR: sparse ridge regression on the empirical Fisher (the paper's baseline; CHITA, Benbaki et al., 2023).

minimise  1/2 ||G w - G w_bar||^2 + n lam/2 sum_j m_j (w_j - w_bar_j)^2   subject to  ||w||_0 <= k
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.objective import WeightedRidge, diagonal_metric

__all__ = ["LR"]

_AUTO_RIDGE = 0.0025  # in the diagonal metric, where lam has no unit; see docs/method.md
_STEP_RIDGE = 1.0  # damping of the natural-gradient step
_LENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of that step, tried in this order
_DAMPINGS = (1.0, 30.0)  # candidates; the first is taken where nothing is held out


@dataclass(frozen=True)
class LR:
    """Sparse linear regression: EWR with the plan fixed to the pairing.

    Attributes:
        ridge: lam, or ``"auto"``. Without a unit in the diagonal metric, in units of the Fisher diagonal in the
            identity metric.
        metric: ``"diagonal"``, ``m = f + damping mean(f)``, which does not care how layers are scaled, or
            ``"identity"``, the paper's.
        damping: Share of the mean diagonal in the metric, > 0; or ``"auto"``: chosen by the loss on held-out
            samples, where there are any.
        iterations: Hard-thresholding iterations a stage at the most.
        first_order: Length of a natural-gradient step on the kept weights after the regression, which leaves
            the gradient's mean out (0, the paper); or ``"auto"``: as long as held-out samples gain from it.
    """

    ridge: float | Literal["auto"] = "auto"
    metric: Literal["diagonal", "identity"] = "diagonal"
    damping: float | Literal["auto"] = "auto"
    iterations: int = 10
    first_order: float | Literal["auto"] = "auto"

    name: ClassVar[str] = "lr"
    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_regression_settings(self.ridge, self.metric, self.damping, self.iterations, self.first_order)

    @property
    def needs_held_out(self) -> bool:
        """Whether a setting is chosen by the loss on held-out samples."""
        return chooses_damping(self.metric, self.damping) or self.first_order == "auto"

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Solve the regression by iterative hard thresholding with refits."""
        if problem.keep in (0, problem.reference.numel()):
            return trivial_solution(problem)
        regression, fit, evidence = self.fit(problem)
        fit, length = step_down(problem, regression, fit, self.first_order)
        return solution_of(fit, evidence | {"first_order": length})

    def fit(self, problem: PruningProblem) -> tuple[WeightedRidge, SparseFit, dict[str, Any]]:
        """Fit with each candidate for the damping and keep what held-out samples favour.

        Returns:
            The regression, its sparse fit, and the evidence for the report.
        """
        automatic = chooses_damping(self.metric, self.damping) and problem.held_out is not None
        dampings = _DAMPINGS if automatic else (self.damping,)
        diagonal = problem.fisher().diagonal()
        candidates: dict[float, tuple[WeightedRidge, SparseFit]] = {}
        losses: dict[float, float] = {}
        for choice in dampings:
            damping = _DAMPINGS[0] if choice == "auto" else float(choice)
            regression = pairing_regression(problem, self.ridge, self.metric, damping, diagonal)
            fit = solve_sparse(regression, problem.keep, max_iterations=self.iterations)
            candidates[damping] = regression, fit
            losses[damping] = held_out_loss(problem, fit) if len(dampings) > 1 else 0.0
        best = min(losses, key=losses.__getitem__)
        regression, fit = candidates[best]
        evidence: dict[str, Any] = {"ridge": regression.ridge, "damping": best, "objective": fit.value}
        if len(losses) > 1:
            evidence["held_out_loss_by_damping"] = {str(damping): loss for damping, loss in losses.items()}
        return regression, fit, evidence


def chooses_damping(metric: str, damping: float | str) -> bool:
    """Whether there is a damping to choose: the identity metric has none."""
    return metric == "diagonal" and damping == "auto"


def step_down(
    problem: PruningProblem, regression: WeightedRidge, fit: SparseFit, length: float | str
) -> tuple[SparseFit, float]:
    """Go down the loss along the natural gradient, on the support of a fit.

    Args:
        problem: The pruning problem.
        regression: The regression that was solved.
        fit: Its sparse solution.
        length: Length of the step; ``"auto"`` tries longer and longer ones while the mean loss on held-out
            samples falls, none where nothing is held out.

    Returns:
        The fit with its weights moved, and the length taken.
    """
    lengths = _LENGTHS if length == "auto" else (float(length),)
    if lengths == (0.0,) or (length == "auto" and problem.held_out is None):
        return fit, 0.0
    direction = regression.descent(fit.support, _STEP_RIDGE, fit.refit)
    best, taken = fit, 0.0
    least = held_out_loss(problem, fit) if length == "auto" else math.inf
    for trial in lengths:
        moved = replace(fit, weights=fit.weights + trial * direction)
        loss = held_out_loss(problem, moved) if length == "auto" else -math.inf
        if not loss < least:
            break
        best, taken, least = moved, trial, loss
    return best, taken


def held_out_losses(problem: PruningProblem, fit: SparseFit) -> Tensor:
    """Return the network's losses on held-out samples with the weights of a fit, (n_v,)."""
    assert problem.held_out is not None, "the caller checks"
    kept = torch.zeros_like(fit.weights, dtype=torch.bool).index_fill(0, fit.support, True)
    return problem.held_out(fit.weights, kept)


def held_out_loss(problem: PruningProblem, fit: SparseFit) -> float:
    """Return their mean, infinite when it is not a number."""
    mean = float(held_out_losses(problem, fit).mean())
    return mean if math.isfinite(mean) else math.inf


def check_regression_settings(
    ridge: float | str, metric: str, damping: float | str, iterations: int, first_order: float | str
) -> None:
    """Refuse settings that LR and EWR share when they make no sense.

    Raises:
        ValueError: If one is out of range.
    """
    if ridge != "auto" and not (is_number(ridge) and 0 <= float(ridge) < float("inf")):
        raise ValueError(f"ridge must be 'auto' or a number of at least 0, got {ridge!r}")
    if metric not in ("diagonal", "identity"):
        raise ValueError(f"metric must be 'diagonal' or 'identity', got {metric!r}")
    if damping != "auto" and not (is_number(damping) and 0 < float(damping) < float("inf")):
        raise ValueError(f"damping must be 'auto' or a number above 0, got {damping!r}")
    if first_order != "auto" and not (is_number(first_order) and 0 <= float(first_order) < float("inf")):
        raise ValueError(f"first_order must be 'auto' or a number of at least 0, got {first_order!r}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a whole number of at least 1, got {iterations!r}")


def is_number(value: object) -> bool:
    """Whether a value is an int or a float (and not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def pairing_regression(
    problem: PruningProblem,
    ridge: float | str,
    metric: str,
    damping: float = math.inf,
    diagonal: Tensor | None = None,
) -> WeightedRidge:
    """State the regression of LR: the target is y itself. ``diagonal`` saves a pass where f is known."""
    factor = problem.fisher()
    f = factor.diagonal() if diagonal is None else diagonal
    m = diagonal_metric(f, damping if metric == "diagonal" else math.inf)
    if ridge == "auto":
        ridge = _AUTO_RIDGE if metric == "diagonal" else _AUTO_RIDGE * float(f.mean())
    target = factor.matvec(problem.reference)
    return WeightedRidge(factor, target, problem.reference, float(ridge), m)


def trivial_solution(problem: PruningProblem) -> PruningSolution:
    """Return the only answer to keeping everything or nothing."""
    everything = problem.keep > 0
    kept = torch.full_like(problem.reference, everything, dtype=torch.bool)
    return PruningSolution(problem.reference * everything, kept)


def solution_of(fit: SparseFit, evidence: Mapping[str, Any]) -> PruningSolution:
    """State a sparse fit as the solution of a pruning problem."""
    kept: Tensor = torch.zeros_like(fit.weights, dtype=torch.bool).index_fill(0, fit.support, True)
    return PruningSolution(fit.weights, kept, fit.converged, fit.iterations, evidence)
