"""The regression of LR, which EWR starts from: stated, fitted for each candidate setting, chosen on held-out samples.

Samples are paired: the target is ``y = G w_bar`` itself. Ridge, damping and metric that are ``"auto"`` are chosen
together, swaps are taken where they gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from swap_prune.checks import is_number, whole_number
from swap_prune.memory.process import return_free_memory
from swap_prune.methods.descent import held_out_losses, is_significant, kept_set, loss_after_steps, mean_loss
from swap_prune.problem import FisherKind, PruningProblem, PruningSolution
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.metric import Metric, damped_metric
from swap_prune.regression.objective import ScaledGram, WeightedRidge
from swap_prune.regression.swap import swap_weights
from swap_prune.regression.top_k import Floors

__all__ = [
    "Candidate",
    "candidates_of",
    "check_regression_settings",
    "chooses",
    "fit_pairing",
    "pairing_regression",
    "solution_of",
]

_CANDIDATES: tuple[tuple[float, float, Metric], ...] = (  # the first is taken where nothing is held out
    (0.025, 1.0, "diagonal"),
    (0.1, 1.0, "factored"),
    (0.0025, 30.0, "diagonal"),
    (0.0025, 30.0, "layer"),
)
# with so few rows a ridge hardly changes the fit; what matters is how far the metric trusts the single weight
_FEW_ROWS = 1e-4  # a weight
_FLOORS = (0.5, 0.75)  # tried where a layer would keep less: shares of what it would keep if all kept alike
_FEW_ROWS_CANDIDATES: tuple[tuple[float, float, Metric], ...] = (*_CANDIDATES[:3], (0.025, 0.03, "diagonal"))


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
    def floor(self) -> float | str: ...


def chooses(settings: RegressionSettings) -> bool:
    """Whether held-out samples have something to choose: a ridge, a damping, a metric or the length of a step."""
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
        floor = 0.0 if settings.floor == "auto" else float(settings.floor)
        found.append(Candidate(ridge, math.inf if identity else damping, metric, floor))
    return list(dict.fromkeys(found))


class _Fitted(NamedTuple):
    """A candidate's sparse fit, and its losses on held-out samples, (n_v,), where there are any.

    Its regression is stated anew where it is asked for: the metric is as large as p.
    """

    candidate: Candidate
    fit: SparseFit
    losses: Tensor | None


def fit_pairing(
    settings: RegressionSettings, problem: PruningProblem
) -> tuple[WeightedRidge, SparseFit, dict[str, Any]]:
    """Fit with each candidate for ridge, damping and metric, swap weights, and keep what held-out samples favour.

    Returns:
        The regression, its sparse fit, and the evidence for the report.
    """
    fisher = problem.fisher()
    diagonal, target = fisher.diagonal(), fisher.matvec(problem.reference)
    candidates = candidates_of(settings, diagonal, fisher.shape[0])
    if problem.held_out is None:
        candidates = candidates[:1]
    tried: list[dict[str, Any]] = []
    best = _best_fit(settings, problem, candidates, diagonal, target, tried)
    regression = pairing_regression(problem, *best.candidate, diagonal=diagonal, target=target)
    fit = _swapped(settings, problem, regression, best, diagonal, tried)
    evidence: dict[str, Any] = best.candidate._asdict() | {"objective": fit.value, "swaps": fit.swaps}
    if len(tried) > 1:
        evidence["candidates"] = list(map(_finite, tried))
    return regression, fit, _finite(evidence)


def _best_fit(
    settings: RegressionSettings,
    problem: PruningProblem,
    candidates: list[Candidate],
    diagonal: Tensor,
    target: Tensor,
    tried: list[dict[str, Any]],
) -> _Fitted:
    """Return the fit of least held-out loss; what was tried is added to a list.

    Where the best starves a layer, all are tried again with a floor, and then the best with a higher one. The
    regression knows what each weight is worth beside those that are there, and not that none of them counts once all
    of a layer are gone.
    """
    contest = _Contest(settings, problem, diagonal, target, tried)
    contest.hold(candidates)
    if settings.floor == "auto" and problem.held_out is not None:
        low, high = _FLOORS
        if _is_starved(problem, contest.best.fit.support, low):
            contest.hold([one._replace(floor=low) for one in candidates])
        if _is_starved(problem, contest.best.fit.support, high):
            contest.hold([contest.best.candidate._replace(floor=high)])
    return contest.best


class _Contest:
    """Candidates compared by their held-out losses.

    A candidate that is no better than the network without any weight has lost all, and its loss says little about what
    steps will make of it. Until one has not, a few are taken from each, and those are compared after them. One that has
    not lost all goes before all that have.

    Args:
        settings: Of the method.
        problem: The pruning problem.
        diagonal: f, (p,).
        target: y, (n,).
        tried: What is tried is added to it.
    """

    def __init__(
        self,
        settings: RegressionSettings,
        problem: PruningProblem,
        diagonal: Tensor,
        target: Tensor,
        tried: list[dict[str, Any]],
    ) -> None:
        self._settings, self._problem = settings, problem
        self._diagonal, self._target = diagonal, target
        self._tried = tried
        self._best: _Fitted | None = None
        self._least = (True, math.inf)  # of the best: whether it has lost all, and its mean loss
        self._last: _Fitted | None = None
        self._first: dict[tuple[float, Metric], ScaledGram] = {}  # where the path of each metric begins
        self._blank: Tensor | None = None

    @property
    def best(self) -> _Fitted:
        """The best of all so far: nothing else should hold it while others are fitted."""
        assert self._best is not None, "there is at least one candidate"
        return self._best

    def hold(self, candidates: Sequence[Candidate]) -> None:
        """Fit candidates, and compare them with the best so far."""
        steps = self._settings.first_order == "auto" and self._problem.slope is not None
        if self._blank is None and steps and self._problem.blank is not None and len(candidates) > 1:
            self._blank = self._problem.blank()
        for candidate, following in zip_longest(candidates, candidates[1:]):
            self._enter(candidate)
            if following is None or following[1:] != candidate[1:]:
                self._last = None  # its vectors are of no use any more

    def _enter(self, candidate: Candidate) -> None:
        fitted = self._fit(candidate)
        self._last, blank = fitted, self._blank
        loss = 0.0 if fitted.losses is None else mean_loss(fitted.losses)
        self._tried.append(candidate._asdict() | {"held_out_loss": loss})
        lost = blank is not None and loss >= mean_loss(blank)
        if blank is not None and lost and self._least[0] and loss < math.inf:
            stated = pairing_regression(self._problem, *candidate, diagonal=self._diagonal, target=self._target)
            loss = loss_after_steps(self._problem, stated, fitted.fit, blank)
            self._tried[-1]["loss_after_steps"] = loss
        if self._best is None or (lost, loss) < self._least:
            self._best, self._least = fitted, (lost, loss)

    def _fit(self, candidate: Candidate) -> _Fitted:
        """Solve the regression of one candidate; in the metric of the last one its path need not be walked again."""
        return_free_memory()  # the heap grows with each fit, whose vectors come and go
        regression = pairing_regression(self._problem, *candidate, diagonal=self._diagonal, target=self._target)
        near = self._last.fit if self._last is not None and self._last.candidate[1:] == candidate[1:] else None
        known = None if near is None or near.refit is None else near.refit.gram
        metric = (candidate.damping, candidate.metric)
        fit = solve_sparse(
            regression,
            self._problem.keep,
            start=None if near is None else near.support,
            previous=self._first.get(metric) if near is None else known,
            max_iterations=self._settings.iterations,
        )
        if fit.first is not None:
            self._first[metric] = fit.first
            fit = replace(fit, first=None)
        return _Fitted(candidate, fit, None if self._problem.held_out is None else held_out_losses(self._problem, fit))


def fair_floors(problem: PruningProblem, share: float) -> Floors:
    """Return the floors of a problem, raised to a share of what each layer would keep if all kept alike.

    Those that leave nothing to choose are left as they were.
    """
    if share == 0:
        return problem.floors
    given = {place.start: least for place, least in problem.floors}
    density = problem.keep / problem.reference.numel()
    floors = [
        (layer.place, max(given.get(layer.place.start, 0), math.ceil(share * density * layer.shape.numel())))
        for layer in problem.layers()
    ]
    return floors if sum(least for _, least in floors) < problem.keep else problem.floors


def _is_starved(problem: PruningProblem, support: Tensor, share: float) -> bool:
    """Whether a support, in increasing order, leaves a layer fewer weights than its fair floor."""
    floors = fair_floors(problem, share)
    if not floors:
        return False
    places, least = zip(*floors, strict=True)
    bounds = torch.tensor([(place.start, place.stop) for place in places], device=support.device)
    counts = torch.searchsorted(support, bounds).diff(dim=1).squeeze(1)
    return bool((counts < torch.tensor(least, device=support.device)).any())


def _swapped(
    settings: RegressionSettings,
    problem: PruningProblem,
    regression: WeightedRidge,
    best: _Fitted,
    diagonal: Tensor,
    tried: list[dict[str, Any]],
) -> SparseFit:
    """Return a fit after swaps, where held-out samples gain by them or cannot be asked; else as it is."""
    return_free_memory()
    swapped = swap_weights(regression, best.fit, settings.swaps, diagonal)
    if not swapped.swaps or best.losses is None:
        return swapped
    after = held_out_losses(problem, swapped)
    tried.append(best.candidate._asdict() | {"swaps": swapped.swaps, "held_out_loss": mean_loss(after)})
    return swapped if is_significant(best.losses - after) else best.fit


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
    if settings.floor != "auto" and not (is_number(settings.floor) and 0 <= float(settings.floor) < 1):
        raise ValueError(f"floor must be 'auto' or lie in [0, 1), got {settings.floor!r}")
    for name, lowest in (("iterations", 1), ("swaps", 0)):
        whole_number(name, getattr(settings, name), lowest)


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
    m = damped_metric(f, damping, metric, problem.layers(), problem.groups())
    return WeightedRidge(factor, y, problem.reference, ridge, m, floors=fair_floors(problem, floor))


def solution_of(fit: SparseFit, evidence: Mapping[str, Any]) -> PruningSolution:
    """State a sparse fit as the solution of a pruning problem."""
    return PruningSolution(fit.weights, kept_set(fit), fit.converged, fit.iterations, evidence)
