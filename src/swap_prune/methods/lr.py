"""LR: sparse ridge regression on the rows of the Fisher factor (the paper's baseline; CHITA, Benbaki et al., 2023).

minimise  1/2 ||G w - G w_bar||^2 + n lam/2 sum_j m_j (w_j - w_bar_j)^2   subject to  ||w||_0 <= k
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from swap_prune.checks import is_number, whole_number
from swap_prune.methods.descent import (
    held_out_losses,
    is_significant,
    kept_set,
    loss_after_step,
    mean_loss,
    step_down,
)
from swap_prune.problem import FisherKind, PruningProblem, PruningSolution
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.metric import Metric, damped_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights

__all__ = ["LR"]

_CANDIDATES: tuple[tuple[float, float, Metric], ...] = (  # the first is taken where nothing is held out
    (0.025, 1.0, "diagonal"),
    (0.1, 1.0, "factored"),
    (0.0025, 30.0, "diagonal"),
    (0.0025, 30.0, "layer"),
)
# with so few rows a ridge hardly changes the fit; what matters is how far the metric trusts the single weight
_FEW_ROWS = 1e-4  # a weight
_FEW_ROWS_CANDIDATES: tuple[tuple[float, float, Metric], ...] = (*_CANDIDATES[:3], (0.025, 0.03, "diagonal"))


@dataclass(frozen=True)
class LR:
    """Sparse linear regression: EWR with the plan fixed to the pairing.

    Attributes:
        fisher: Which matrix the rows of G stand for: ``"gauss-newton"``, which needs a loss that knows its curvature;
            ``"empirical"``, the paper's; or ``"auto"``: Gauss-Newton where the loss allows it.
        ridge: lam, in units of the Fisher diagonal in the identity metric, a pure number in the others; or ``"auto"``:
            chosen by the loss on held-out samples, where there are any.
        metric: ``m = f + damping b``, b being the mean of the Fisher diagonal f over all weights (``"diagonal"``), over
            the layer (``"layer"``), or over the output and the input of each weight (``"factored"``); ``"identity"``,
            the paper's, which is 1; or ``"auto"``, chosen together with the ridge.
        damping: c > 0; or ``"auto"``, chosen together with the ridge.
        iterations: Hard-thresholding iterations a stage at the most.
        swaps: Batches of kept and dropped weights that change places after them, at the most; 0 for none.
        first_order: Length of one natural-gradient step on the kept weights after the regression, which leaves the
            mean gradient out (0, the paper); or ``"auto"``: up to twelve in each of two metrics, as far as held-out
            samples gain.
    """

    fisher: FisherKind = "auto"
    ridge: float | Literal["auto"] = "auto"
    metric: Metric | Literal["auto"] = "auto"
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
            return problem.trivial_solution()
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
    """Whether held-out samples have something to choose: a ridge, a damping, a metric or the length of a step."""
    return len(candidates_of(settings)) > 1 or settings.first_order == "auto"


class Candidate(NamedTuple):
    """What a regression is stated with."""

    ridge: float
    damping: float
    metric: Metric


def candidates_of(
    settings: RegressionSettings, diagonal: Tensor | None = None, rows: int | None = None
) -> list[Candidate]:
    """Return what there is to choose from.

    Args:
        settings: What is fixed is the same in all of them.
        diagonal: f, (p,): its mean is the unit of an automatic ridge in the identity metric; 1 if it is not given.
        rows: n, where the candidates may depend on how few there are for p weights.
    """
    few = diagonal is not None and rows is not None and rows < _FEW_ROWS * len(diagonal)
    found = []
    for automatic_ridge, automatic_damping, automatic_metric in _FEW_ROWS_CANDIDATES if few else _CANDIDATES:
        metric = cast(Metric, settings.metric) if settings.metric != "auto" else automatic_metric
        identity = metric == "identity"
        unit = float(diagonal.mean()) if identity and diagonal is not None else 1.0
        ridge = unit * automatic_ridge if settings.ridge == "auto" else float(settings.ridge)
        damping = automatic_damping if settings.damping == "auto" else float(settings.damping)
        found.append(Candidate(ridge, math.inf if identity else damping, metric))
    return list(dict.fromkeys(found))


def fit_pairing(
    settings: RegressionSettings, problem: PruningProblem
) -> tuple[WeightedRidge, SparseFit, dict[str, Any]]:
    """Fit with each candidate for ridge, damping and metric, swap weights, and keep what held-out samples favour.

    A candidate that is no better than the network without any weight has lost all, and its loss says little about what
    steps will make of it. Until one has not, one step is taken from each, and those are compared after it. One that has
    not lost all goes before all that have.

    Returns:
        The regression, its sparse fit, and the evidence for the report.
    """
    fisher = problem.fisher()
    diagonal, target = fisher.diagonal(), fisher.matvec(problem.reference)
    candidates = candidates_of(settings, diagonal, fisher.shape[0])
    if problem.held_out is None:
        candidates = candidates[:1]
    steps = settings.first_order == "auto" and problem.slope is not None
    blank = problem.blank() if len(candidates) > 1 and steps and problem.blank is not None else None
    best: tuple[WeightedRidge, SparseFit, Candidate] | None = None
    rank, losses = (True, math.inf), None  # of the best: whether it has lost all, and its mean loss; each loss
    tried: list[dict[str, Any]] = []
    fit: SparseFit | None = None
    metric = None  # of the last fit: its path need not be walked twice
    for candidate in candidates:
        regression = pairing_regression(problem, *candidate, diagonal=diagonal, target=target)
        last = fit if fit is not None and metric == candidate[1:] else None
        fit = solve_sparse(
            regression,
            problem.keep,
            start=None if last is None else last.support,
            previous=None if last is None else last.refit,
            max_iterations=settings.iterations,
        )
        metric = candidate[1:]
        own = None if problem.held_out is None else held_out_losses(problem, fit)
        loss = mean_loss(own) if own is not None else 0.0
        tried.append(candidate._asdict() | {"held_out_loss": loss})
        lost = blank is not None and loss >= mean_loss(blank)
        if blank is not None and lost and rank[0] and loss < math.inf:
            loss = tried[-1]["loss_after_step"] = loss_after_step(problem, regression, fit, blank)
        if best is None or (lost, loss) < rank:
            best, rank, losses = (regression, fit, candidate), (lost, loss), own
    assert best is not None, "there is at least one candidate"
    regression, fit, candidate = best
    swapped = swap_weights(regression, fit, settings.swaps, diagonal)
    if swapped.swaps and losses is not None:
        after = held_out_losses(problem, swapped)
        tried.append(candidate._asdict() | {"swaps": swapped.swaps, "held_out_loss": mean_loss(after)})
        swapped = swapped if is_significant(losses - after) else fit
    fit = swapped
    evidence: dict[str, Any] = candidate._asdict() | {"objective": fit.value, "swaps": fit.swaps}
    if len(tried) > 1:
        evidence["candidates"] = list(map(_finite, tried))
    return regression, fit, _finite(evidence)


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """Leave out the numbers that JSON cannot hold."""
    return {key: value for key, value in entry.items() if not isinstance(value, float) or math.isfinite(value)}


def check_regression_settings(settings: RegressionSettings) -> None:
    """Refuse settings that LR and EWR share when they make no sense.

    Raises:
        ValueError: If one is out of range.
    """
    if settings.fisher not in get_args(FisherKind):
        raise ValueError(f"fisher must be one of {', '.join(get_args(FisherKind))}, got {settings.fisher!r}")
    metrics = ("auto", *get_args(Metric))
    if settings.metric not in metrics:
        raise ValueError(f"metric must be one of {', '.join(metrics)}, got {settings.metric!r}")
    for name, least in (("ridge", "at least"), ("damping", "above"), ("first_order", "at least")):
        value = getattr(settings, name)
        if value == "auto":
            continue
        if not is_number(value) or not math.isfinite(value) or value < 0 or (value == 0 and least == "above"):
            raise ValueError(f"{name} must be 'auto' or a number {least} 0, got {value!r}")
    for name, lowest in (("iterations", 1), ("swaps", 0)):
        object.__setattr__(settings, name, whole_number(name, getattr(settings, name), lowest))


def pairing_regression(
    problem: PruningProblem,
    ridge: float,
    damping: float,
    metric: Metric = "diagonal",
    *,
    diagonal: Tensor | None = None,
    target: Tensor | None = None,
) -> WeightedRidge:
    """State the regression of LR: the target is y itself.

    Args:
        problem: The pruning problem.
        ridge: lam.
        damping: c of the metric; the identity has none.
        metric: See :mod:`swap_prune.regression.metric`.
        diagonal: f, (p,), where it is known already.
        target: y, (n,), where it is known already.
    """
    factor = problem.fisher()
    f = factor.diagonal() if diagonal is None else diagonal
    y = factor.matvec(problem.reference) if target is None else target
    m = damped_metric(f, damping, metric, problem.layers())
    return WeightedRidge(factor, y, problem.reference, ridge, m, floors=problem.floors)


def solution_of(fit: SparseFit, evidence: Mapping[str, Any]) -> PruningSolution:
    """State a sparse fit as the solution of a pruning problem."""
    return PruningSolution(fit.weights, kept_set(fit), fit.converged, fit.iterations, evidence)
