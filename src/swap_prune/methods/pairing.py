"""The regression of LR, which EWR starts from: its settings, the candidates for those left open, and its statement.

Samples are paired: the target is ``y = G w_bar`` itself. Which candidate is taken is decided in
:mod:`swap_prune.methods.contest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from swap_prune.checks import is_finite, true_or_false, whole_number
from swap_prune.problem import FisherKind, PruningProblem, PruningSolution, RowKind
from swap_prune.regression.iht import SparseFit
from swap_prune.regression.metric import Metric, damped_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.top_k import Floors

__all__ = [
    "Candidate",
    "candidates_of",
    "check_regression_settings",
    "chooses",
    "pairing_regression",
    "solution_of",
]

_CANDIDATES: tuple[tuple[float, float, Metric], ...] = (  # the first is taken where nothing is held out
    (0.025, 1.0, "diagonal"),
    (0.1, 1.0, "factored"),
    (0.0025, 30.0, "layer"),
    (0.0025, 30.0, "diagonal"),
)
# with so few rows a ridge hardly changes the fit; what matters is how far the metric trusts the single weight
_FEW_ROWS = 1e-4  # a weight
_FEW_ROWS_CANDIDATES: tuple[tuple[float, float, Metric], ...] = (
    *_CANDIDATES[:2],
    (0.025, 0.03, "diagonal"),
    _CANDIDATES[3],
)
# with a row a weight, or more, rows can be believed: a ridge would hide which of correlated weights are needed
_MANY_ROWS_CANDIDATES: tuple[tuple[float, float, Metric], ...] = (*_CANDIDATES, (1e-4, 0.01, "diagonal"))


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
    @property
    def steps(self) -> int: ...
    @property
    def floor(self) -> float | str: ...
    @property
    def rows(self) -> str: ...
    @property
    def mini_batch(self) -> int: ...
    @property
    def all_samples(self) -> bool: ...


def chooses(settings: RegressionSettings) -> bool:
    """Whether held-out samples have something to choose: a ridge, a damping, a metric or the length of a step.

    ``floor="auto"`` alone does not hold samples out: the floor is 0 then, and all else is as set.
    """
    return len(candidates_of(settings)) > 1 or settings.first_order == "auto"


class Candidate(NamedTuple):
    """What a regression is stated with.

    Attributes:
        ridge: lam.
        damping: c of the metric.
        metric: Its kind.
        floor: Share of the weights that each layer would keep if all kept alike, which it keeps at the least.
    """

    ridge: float
    damping: float
    metric: Metric
    floor: float = 0.0

    @property
    def path(self) -> tuple[float, Metric, float]:
        """All but the ridge: what a path was walked with, whose end serves other ridges as well."""
        return self.damping, self.metric, self.floor


def candidates_of(
    settings: RegressionSettings, diagonal: Tensor | None = None, rows: int | None = None
) -> list[Candidate]:
    """Return what there is to choose from.

    Args:
        settings: What is fixed is the same in all of them.
        diagonal: f, (p,): its mean is the unit of an automatic ridge in the identity metric; 1 if it is not given.
        rows: n, where the candidates may depend on how few there are for p weights.
    """
    automatic = _CANDIDATES
    if diagonal is not None and rows is not None:
        automatic = _FEW_ROWS_CANDIDATES if rows < _FEW_ROWS * len(diagonal) else automatic
        automatic = _MANY_ROWS_CANDIDATES if rows >= len(diagonal) else automatic
    found = []
    for automatic_ridge, automatic_damping, automatic_metric in automatic:
        metric = cast(Metric, settings.metric) if settings.metric != "auto" else automatic_metric
        identity = metric == "identity"
        unit = float(diagonal.mean()) if identity and diagonal is not None else 1.0
        ridge = unit * automatic_ridge if settings.ridge == "auto" else float(settings.ridge)
        damping = automatic_damping if settings.damping == "auto" else float(settings.damping)
        floor = 0.0 if settings.floor == "auto" else float(settings.floor)
        found.append(Candidate(ridge, math.inf if identity else damping, metric, floor))
    return list(dict.fromkeys(found))


def fair_floors(problem: PruningProblem, share: float, diagonal: Tensor | None = None) -> Floors:
    """Return the floors of a problem, raised to a share of what each layer would keep if all kept alike.

    Floors that would use up all k weights are not raised, nor is one above the number of weights that count.

    Args:
        problem: The pruning problem.
        share: In [0, 1).
        diagonal: f, (p,), where it is known: a weight that is zero, and of which no row says anything, stays zero, and
            does not count.
    """
    if share == 0:
        return problem.floors
    given = {place.start: least for place, least in problem.floors}
    density = Fraction(str(share)) * problem.keep / problem.reference.numel()  # a float's ceiling may be one above
    sizes = [layer.shape.numel() for layer in problem.layers()]
    counting = sizes if diagonal is None else _counting(problem, diagonal)
    floors = [
        (layer.place, max(given.get(layer.place.start, 0), min(count, math.ceil(density * size))))
        for layer, size, count in zip(problem.layers(), sizes, counting, strict=True)
    ]
    return floors if sum(least for _, least in floors) < problem.keep else problem.floors


def _counting(problem: PruningProblem, diagonal: Tensor) -> list[int]:
    """Return how many weights of each layer are something, or could become so."""
    places = [layer.place for layer in problem.layers()]
    counts = [((problem.reference[place] != 0) | (diagonal[place] > 0)).count_nonzero() for place in places]
    return [int(count) for count in torch.stack(counts).tolist()]


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
        if not is_finite(value) or value < 0 or (value == 0 and least == "above"):
            raise ValueError(f"{name} must be 'auto' or a number {least} 0, got {value!r}")
    if settings.floor != "auto" and not (is_finite(settings.floor) and 0 <= float(settings.floor) < 1):
        raise ValueError(f"floor must be 'auto' or lie in [0, 1), got {settings.floor!r}")
    if settings.rows not in get_args(RowKind):
        raise ValueError(f"rows must be one of {', '.join(get_args(RowKind))}, got {settings.rows!r}")
    if settings.rows == "mini-batches" and settings.fisher == "empirical":
        raise ValueError("rows='mini-batches' needs Gauss-Newton rows (fisher='auto'), got fisher='empirical'")
    for name, lowest in (("iterations", 1), ("swaps", 0), ("steps", 1), ("mini_batch", 2)):
        whole_number(name, getattr(settings, name), lowest)
    true_or_false("all_samples", settings.all_samples)


def pairing_regression(
    problem: PruningProblem,
    ridge: float,
    damping: float,
    metric: Metric = "diagonal",
    floor: float = 0.0,
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
        floor: Share of what each layer would keep if all kept alike, which it keeps at the least.
        diagonal: f, (p,), where it is known already.
        target: y, (n,), where it is known already.
    """
    factor = problem.fisher()
    f = factor.diagonal() if diagonal is None else diagonal
    y = factor.matvec(problem.reference) if target is None else target
    m = damped_metric(f, damping, metric, problem.layers(), problem.groups(), problem.reference)
    floors = fair_floors(problem, floor, f)
    return WeightedRidge(factor, y, problem.reference, ridge, m, floors=floors, pattern=problem.pattern)


def solution_of(fit: SparseFit, evidence: Mapping[str, Any]) -> PruningSolution:
    """State a sparse fit as the solution of a pruning problem."""
    return PruningSolution(fit.weights, fit.kept(), fit.converged, fit.iterations, evidence)
