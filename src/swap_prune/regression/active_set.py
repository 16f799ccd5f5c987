"""CHITA's solver of the sparse regression: iterative hard thresholding on an active set.

Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao and Mazumder, "Fast as CHITA: Neural Network Pruning with Combinatorial
Optimization", ICML 2023, section 3.1. P_k keeps the k largest weights. Iterations run on few columns of G, those of
the active set. When they have come to rest, a step on all columns looks for weights that should have been in it::

    1. on the active set: w = P_k(w - grad Q(w) / L), then w <- P_k(w - tau grad Q(w)) with tau in two regimes
    2. on all weights: w' = P_k(w - tau grad Q(w)) with tau = 1/2L, doubled as long as Q(w') < Q(w)
    3. what w' has outside the active set joins it; the end, where there is nothing
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from swap_prune.fisher.factor import of_columns
from swap_prune.randomness import standard_normal
from swap_prune.regression.iht import SparseFit, hard_threshold
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.top_k import chosen, top_k
from swap_prune.regression.two_regime import two_regime_step

__all__ = ["solve_active_set"]

_EXPANSION = 1.5  # size of the first active set, in units of k
_RELATIVE_GAIN = 1e-7  # an iteration that gains less ends the iterations
_GROWTHS = 5  # doublings of the step length in an iteration
_SEARCHES = 10  # step lengths tried for new members
_POWER_STEPS = 30
_MARGIN = 1.05  # on the estimate of L, which comes from below


def solve_active_set(
    problem: WeightedRidge, keep: int, generator: torch.Generator, *, max_iterations: int = 50
) -> SparseFit:
    """Minimise Q subject to at most ``keep`` non-zero weights.

    Weights whose column of G is zero are left out, however large they are, where enough others are left and no floor
    needs them.

    Args:
        problem: The regression, with the identity metric and without smoothing.
        keep: k, ``1 <= k <= p``.
        generator: Random state (CPU), for estimates of L.
        max_iterations: Iterations on one active set, and active sets, at the most.

    Returns:
        The best weights found.
    """
    alive = problem.factor.diagonal() > 0
    alive = alive if int(alive.sum()) >= keep else torch.ones_like(alive)
    members = _largest(problem, problem.reference, alive, min(int(_EXPANSION * keep), int(alive.sum())))
    active = chosen(members, alive)
    w, iterations = problem.reference, 0
    for _ in range(max_iterations):
        part, index = _restrict(problem, active)
        bound = _MARGIN * largest_curvature(part, generator)
        fit = _iterate(part, w[index], keep, 1 / bound, max_iterations)
        iterations += fit.iterations
        w = torch.zeros_like(w).index_copy(0, index, fit.weights)
        fit = replace(fit, weights=w, support=index[fit.support], value=problem.value(w), iterations=iterations)
        fit = _search(problem, alive, fit, 1 / (2 * bound))
        if bool(active[fit.support].all()):
            return fit
        active[fit.support] = True
        w = fit.weights
    return replace(fit, converged=False)


def largest_curvature(problem: WeightedRidge, generator: torch.Generator) -> float:
    """Estimate L, the largest eigenvalue of ``G^T G + n lam I``, from below by the power method."""
    v = standard_normal(problem.factor.shape[0], generator).to(problem.target)
    size = _length(v)
    for _ in range(_POWER_STEPS):
        v = problem.factor.matvec(problem.factor.rmatvec((v.double() / size).to(v.dtype)))
        size = _length(v)
    return float(size) + problem.penalty


def _length(v: Tensor) -> Tensor:
    """Return the length of a vector, above 0, in float64: the squares of numbers as large as L are none in float32."""
    length: Tensor = torch.linalg.vector_norm(v, dtype=torch.float64)
    return length.clamp_min(torch.finfo(v.dtype).tiny)


def _largest(problem: WeightedRidge, w: Tensor, among: Tensor, count: int) -> Tensor:
    """Return the indices of the largest weights of a set, and of what floors need beside it, in increasing order."""
    return top_k(w.abs().masked_fill(~among, -1), count, problem.floors)


def _restrict(problem: WeightedRidge, active: Tensor) -> tuple[WeightedRidge, Tensor]:
    """Return the regression on some columns, which leave room for its floors, and their indices."""
    index = active.nonzero().squeeze(1)
    factor = of_columns(problem.factor, index)
    reference, metric = problem.reference[index], problem.metric[index]
    bounds = [(place.start, place.stop) for place, _ in problem.floors]
    places = torch.searchsorted(index, torch.tensor(bounds, dtype=index.dtype, device=index.device)).tolist()
    floors = [(slice(*place), least) for place, (_, least) in zip(places, problem.floors, strict=True)]
    return replace(problem, factor=factor, reference=reference, metric=metric, floors=floors, pattern=None), index


def _iterate(part: WeightedRidge, start: Tensor, keep: int, tau: float, max_iterations: int) -> SparseFit:
    """Iterate on an active set until little is gained; ``start`` may have more than k non-zero weights."""
    u = start - tau * part.gradient(start)
    support = top_k(u.abs(), keep, part.floors)
    w = hard_threshold(u, support)
    fit = SparseFit(w, support, part.value(w), 0, converged=False)
    for iteration in range(1, max_iterations + 1):
        step = two_regime_step(part, fit.weights, fit.support, growth=2, max_growths=_GROWTHS)
        gain = fit.value - step.value
        fit = replace(step, iterations=iteration, converged=gain <= _RELATIVE_GAIN * abs(step.value))
        if fit.converged:
            break
    return fit


def _search(problem: WeightedRidge, alive: Tensor, fit: SparseFit, tau: float) -> SparseFit:
    """Return the longest step on all weights that lowers Q, or the fit where none does."""
    gradient = problem.gradient(fit.weights)
    best = fit
    for _ in range(_SEARCHES):
        u = fit.weights - tau * gradient
        support = _largest(problem, u, alive, len(fit.support))
        w = hard_threshold(u, support)
        value = problem.value(w)
        if value < fit.value:
            best = replace(fit, weights=w, support=support, value=value)
        elif not torch.equal(support, fit.support):  # a step too short to change the support says nothing
            break
        tau *= 2
    return best
