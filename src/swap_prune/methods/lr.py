"""LR: sparse ridge regression on the empirical Fisher (the paper's baseline; CHITA, Benbaki et al., 2023).

minimise  1/2 ||G w - G w_bar||^2 + n lam/2 sum_j m_j (w_j - w_bar_j)^2   subject to  ||w||_0 <= k
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from swap_prune.methods.descent import held_out_losses, is_significant, kept_set, mean_loss, step_down
from swap_prune.problem import FisherKind, PruningProblem, PruningSolution
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.objective import WeightedRidge, diagonal_metric
from swap_prune.regression.swap import swap_weights

__all__ = ["LR"]

# (ridge, damping) in the diagonal metric, where neither has a unit; the first is taken where nothing is held out
_CANDIDATES = ((0.025, 1.0), (0.1, 1.0), (0.0025, 30.0))
# with so few rows that a ridge hardly changes the fit; what matters is how far the metric trusts the single weight
_FEW_ROWS = 1e-4  # a weight
_FEW_ROWS_CANDIDATES = ((0.025, 1.0), (0.025, 0.03), (0.0025, 30.0))


@dataclass(frozen=True)
class LR:
    """Sparse linear regression: EWR with the plan fixed to the pairing.

    Attributes:
        fisher: Which matrix the rows of G stand for: ``"gauss-newton"``, which needs a loss that knows its curvature;
            ``"empirical"``, the paper's; or ``"auto"``: Gauss-Newton where the loss allows it.
        ridge: lam, which has no unit in the diagonal metric and that of the Fisher diagonal in the identity metric;
            or ``"auto"``: chosen by the loss on held-out samples, where there are any.
        metric: ``"diagonal"``, ``m = f + damping mean(f)``, which does not care how layers are scaled, or
            ``"identity"``, the paper's.
        damping: Share of the mean diagonal in the metric, > 0; or ``"auto"``, chosen together with the ridge.
        iterations: Hard-thresholding iterations a stage at the most.
        swaps: Batches of kept and dropped weights that change places after them, at the most; 0 for none.
        first_order: Length of one natural-gradient step on the kept weights after the regression, which leaves the
            mean gradient out (0, the paper); or ``"auto"``: up to twelve, as far as held-out samples gain.
    """

    fisher: FisherKind = "auto"
    ridge: float | Literal["auto"] = "auto"
    metric: Literal["diagonal", "identity"] = "diagonal"
    damping: float | Literal["auto"] = "auto"
    iterations: int = 10
    swaps: int = 10
    first_order: float | Literal["auto"] = "auto"

    name: ClassVar[str] = "lr"
    needs_gradients: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_regression_settings(self)

    @property
    def needs_held_out(self) -> bool:
        """Whether a setting is chosen by the loss on held-out samples."""
        return chooses(self)

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Solve the regression by iterative hard thresholding with refits."""
        if problem.keep in (0, problem.reference.numel()):
            return trivial_solution(problem)
        regression, fit, evidence = fit_pairing(self, problem)
        fit, steps = step_down(problem, regression, fit, self.first_order)
        return solution_of(fit, evidence | {"first_order": steps})


class RegressionSettings(Protocol):
    """The settings that LR and EWR share; see :class:`LR`."""

    @property
    def fisher(self) -> str: ...
    @property
    def ridge(self) -> float | str: ...
    @property
    def metric(self) -> str: ...
    @property
    def damping(self) -> float | str: ...
    @property
    def iterations(self) -> int: ...
    @property
    def swaps(self) -> int: ...
    @property
    def first_order(self) -> float | str: ...


def chooses(settings: RegressionSettings) -> bool:
    """Whether held-out samples have something to choose: a ridge, a damping or the length of a step."""
    return len(ridge_candidates(settings)) > 1 or settings.first_order == "auto"


def ridge_candidates(
    settings: RegressionSettings, diagonal: Tensor | None = None, rows: int | None = None
) -> list[tuple[float, float]]:
    """Return the pairs (ridge, damping) to choose from.

    Args:
        settings: What is fixed is the same in all of them. In the identity metric the damping is infinite.
        diagonal: f, (p,): its mean is the unit of an automatic ridge in the identity metric; 1 if it is not given.
        rows: n, where the pairs may depend on how few there are for p weights.
    """
    identity = settings.metric == "identity"
    unit = float(diagonal.mean()) if identity and diagonal is not None else 1.0
    few = diagonal is not None and rows is not None and rows < _FEW_ROWS * len(diagonal)
    pairs = []
    for automatic_ridge, automatic_damping in _FEW_ROWS_CANDIDATES if few else _CANDIDATES:
        ridge = unit * automatic_ridge if settings.ridge == "auto" else float(settings.ridge)
        damping = automatic_damping if settings.damping == "auto" else float(settings.damping)
        pairs.append((ridge, math.inf if identity else damping))
    return list(dict.fromkeys(pairs))


def fit_pairing(
    settings: RegressionSettings, problem: PruningProblem
) -> tuple[WeightedRidge, SparseFit, dict[str, Any]]:
    """Fit with each candidate for ridge and damping, swap weights, and keep what held-out samples favour.

    Returns:
        The regression, its sparse fit, and the evidence for the report.
    """
    fisher = problem.fisher()
    diagonal, target = fisher.diagonal(), fisher.matvec(problem.reference)
    candidates = ridge_candidates(settings, diagonal, fisher.shape[0])
    if problem.held_out is None:
        candidates = candidates[:1]
    best: tuple[WeightedRidge, SparseFit, float] | None = None
    least, losses = math.inf, None  # of the best: their mean, and each
    tried: list[dict[str, float]] = []
    ends: dict[float, SparseFit] = {}  # damping -> a fit in the same metric: its path need not be walked twice
    for ridge, damping in candidates:
        regression = pairing_regression(problem, ridge, damping, diagonal, target)
        end = ends.get(damping)
        start, previous = (None, None) if end is None else (end.support, end.refit)
        fit = solve_sparse(regression, problem.keep, start=start, previous=previous, max_iterations=settings.iterations)
        ends[damping] = fit
        own = None if problem.held_out is None else held_out_losses(problem, fit)
        loss = mean_loss(own) if own is not None else 0.0
        tried.append({"ridge": ridge, "damping": damping, "held_out_loss": loss})
        if best is None or loss < least:
            best, least, losses = (regression, fit, damping), loss, own
    assert best is not None, "there is at least one candidate"
    regression, fit, damping = best
    swapped = swap_weights(regression, fit, settings.swaps, diagonal)
    if swapped.swaps and losses is not None:
        after = held_out_losses(problem, swapped)
        entry = {"ridge": regression.ridge, "damping": damping, "swaps": swapped.swaps}
        tried.append(entry | {"held_out_loss": mean_loss(after)})
        swapped = swapped if is_significant(losses - after) else fit
    fit = swapped
    evidence: dict[str, Any] = {"ridge": regression.ridge, "objective": fit.value, "swaps": fit.swaps}
    if settings.metric == "diagonal":
        evidence["damping"] = damping
    if len(tried) > 1:
        evidence["candidates"] = [{key: value for key, value in one.items() if math.isfinite(value)} for one in tried]
    return regression, fit, evidence


def check_regression_settings(settings: RegressionSettings) -> None:
    """Refuse settings that LR and EWR share when they make no sense.

    Raises:
        ValueError: If one is out of range.
    """
    if settings.fisher not in get_args(FisherKind):
        raise ValueError(f"fisher must be one of {', '.join(get_args(FisherKind))}, got {settings.fisher!r}")
    if settings.metric not in ("diagonal", "identity"):
        raise ValueError(f"metric must be 'diagonal' or 'identity', got {settings.metric!r}")
    for name, least in (("ridge", "at least"), ("damping", "above"), ("first_order", "at least")):
        value = getattr(settings, name)
        if value == "auto":
            continue
        if not is_number(value) or not math.isfinite(value) or value < 0 or (value == 0 and least == "above"):
            raise ValueError(f"{name} must be 'auto' or a number {least} 0, got {value!r}")
    for name, lowest in (("iterations", 1), ("swaps", 0)):
        count = getattr(settings, name)
        if isinstance(count, bool) or not isinstance(count, int) or count < lowest:
            raise ValueError(f"{name} must be a whole number of at least {lowest}, got {count!r}")


def is_number(value: object) -> bool:
    """Whether a value is an int or a float (and not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def pairing_regression(
    problem: PruningProblem,
    ridge: float,
    damping: float,
    diagonal: Tensor | None = None,
    target: Tensor | None = None,
) -> WeightedRidge:
    """State the regression of LR: the target is y itself.

    Args:
        problem: The pruning problem.
        ridge: lam.
        damping: Of the diagonal metric; infinite for the identity.
        diagonal: f, (p,), where it is known already.
        target: y, (n,), where it is known already.
    """
    factor = problem.fisher()
    f = factor.diagonal() if diagonal is None else diagonal
    y = factor.matvec(problem.reference) if target is None else target
    return WeightedRidge(factor, y, problem.reference, ridge, diagonal_metric(f, damping), floors=problem.floors)


def trivial_solution(problem: PruningProblem) -> PruningSolution:
    """Return the only answer to keeping everything or nothing."""
    everything = problem.keep > 0
    kept = torch.full_like(problem.reference, everything, dtype=torch.bool)
    return PruningSolution(problem.reference * everything, kept)


def solution_of(fit: SparseFit, evidence: Mapping[str, Any]) -> PruningSolution:
    """State a sparse fit as the solution of a pruning problem."""
    return PruningSolution(fit.weights, kept_set(fit), fit.converged, fit.iterations, evidence)
