"""One step of the paper's Algorithm 1: gradient step with a two-regime step size, then hard threshold.

Up to ``tau_c``, the largest step that keeps the top-k support, Q is a parabola in tau and its minimum is known
in closed form. When that minimum lies past ``tau_c``, tau grows from there by a factor as long as the
thresholded objective falls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swap_prune.regression.iht import SparseFit, hard_threshold
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.top_k import top_k

__all__ = ["critical_step", "two_regime_step"]

_PAST = 1 + 2.0**-10  # of tau_c, where growth begins: at tau_c itself rounding decides which of two supports it is
_FIRST = 1e-3  # of tau_m: where tau starts if tau_c is 0, since a kept weight is exactly zero


def critical_step(w: Tensor, gradient: Tensor, support: Tensor) -> float:
    """Return tau_c, the largest tau for which the support of the top k of ``|w - tau grad|`` stays.

    w is zero outside its support, so that entry i of the support falls behind when
    ``|w_i - tau g_i| < tau max_j |g_j|``, j outside.

    Args:
        w: Weights, (p,), zero outside the support.
        gradient: g, (p,).
        support: Indices, (k,).

    Returns:
        tau_c >= 0, infinite when no entry ever falls behind.
    """
    outside = torch.ones_like(w, dtype=torch.bool).index_fill(0, support, False)
    if not bool(outside.any()):
        return float("inf")
    rival = gradient[outside].abs().max()
    weight, slope = w.index_select(0, support), gradient.index_select(0, support)
    towards_zero = weight.sign() == slope.sign()
    closing = torch.where(towards_zero, rival + slope.abs(), rival - slope.abs())
    steps = torch.where(closing > 0, weight.abs() / closing, torch.inf)
    return float(steps.min()) if len(steps) else 0.0


def two_regime_step(
    problem: WeightedRidge,
    w: Tensor,
    support: Tensor,
    *,
    growth: float = 1.05,
    max_growths: int = 500,
) -> SparseFit:
    """Take one step of Algorithm 1 from sparse weights.

    Args:
        problem: The objective with the plan fixed, ``n/2 <P, C> + ridge`` up to a constant; its metric is not
            used for the step (Euclidean, as in the paper).
        w: Weights, (p,), zero outside ``support``.
        support: Indices of the kept weights, (k,).
        growth: Factor by which tau grows in the second regime, > 1.
        max_growths: Bound on the number of growths.

    Returns:
        The new sparse weights; the old ones when no step lowers Q.
    """
    keep = len(support)
    descent = problem.gradient(w)
    largest = float(descent.abs().max())
    unit = 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 1.0
    gradient = descent / unit  # whose squares are numbers; steps are longer by as much
    before = SparseFit(w, support, problem.value(w), 0, converged=True)
    inside = hard_threshold(gradient, support)
    moved = problem.factor.matvec(inside)
    slope = float(torch.dot(descent, inside))
    curvature = float(
        torch.dot(moved, problem.smooth(moved)) + problem.penalty * torch.dot(problem.metric * inside, inside)
    )
    tau_c = critical_step(w, gradient, support)
    tau_m = slope / curvature if curvature > 0 else float("inf")
    if 0 <= tau_m <= tau_c:
        return _better(before, _at(problem, w - tau_m * inside, keep))
    if tau_m < 0 or tau_c == float("inf") or (tau_c == 0 and tau_m == float("inf")):
        return before  # no descent on the support, or nothing that could change it, or no length to begin with
    edge = w - tau_c * inside  # the last point on the old support, where one entry ties with its rival
    tau = tau_c * _PAST
    found = _at(problem, w - tau * gradient, keep)
    for _ in range(max_growths):
        tau = tau * growth if tau > 0 else _FIRST * tau_m
        tried = _at(problem, w - tau * gradient, keep)
        if not tried.value < found.value:
            break
        found = tried
    return _better(before, _better(SparseFit(edge, support, problem.value(edge), 1, converged=False), found))


def _at(problem: WeightedRidge, u: Tensor, keep: int) -> SparseFit:
    support = top_k(u.abs(), keep, problem.floors, problem.pattern)
    w = hard_threshold(u, support)
    return SparseFit(w, support, problem.value(w), 1, converged=False)


def _better(old: SparseFit, new: SparseFit) -> SparseFit:
    return new if new.value < old.value else old
