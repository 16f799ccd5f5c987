"""Iterative hard thresholding with exact refits: the sparse solver of LR and EWR.

One iteration takes a gradient step in the metric, keeps the k weights of largest ``m_j u_j^2`` and refits them
exactly (hard thresholding pursuit; Foucart, 2011)::

    u = w - tau M^-1 grad Q(w),     s = top-k of m u^2,     w = argmin Q over s

Only an iteration that lowers Q is accepted, so Q never rises.

The first support is found along a path: k falls in steps that each keep a fixed share of the weights, the least
of ``m_j w_j^2`` leave, and the others are refitted. A weight whose work others can take over is thereby found
out before the end, at the price of a few refits on the one G (see docs/method.md). Hard thresholding hardly ever finds
a better support than the end of such a path; where swaps follow, which do, it is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.regression.normal import NormalMatrix
from swap_prune.regression.objective import Refit, ScaledGram, WeightedRidge
from swap_prune.regression.top_k import chosen, top_k

__all__ = ["SparseFit", "hard_threshold", "solve_sparse"]

_RELATIVE_GAIN = 1e-4  # an iteration that gains less ends the search
_PATH_START = 0.2  # of the weights: above it the metric chooses as well as the path
_PATH_SHARE = 0.75  # of the weights, kept by one step of the path


@dataclass(frozen=True)
class SparseFit:
    """A sparse minimiser.

    Attributes:
        weights: w, (p,), zero outside the support.
        support: Indices of the kept weights, (k,).
        value: Q(w).
        iterations: Accepted iterations.
        converged: Whether the search ended by itself, and not by a limit, and the last refit is exact.
        refit: The refit behind the weights, for those who go on from there.
        first: The Gram matrix of the path's first refit, unless there was none or it began with another's: a path in
            the same metric begins there.
        swaps: Pairs of weights that changed places since (:mod:`swap_prune.regression.swap`).
    """

    weights: Tensor
    support: Tensor
    value: float
    iterations: int
    converged: bool
    refit: Refit | None = None
    first: ScaledGram | None = None
    swaps: int = 0

    def kept(self) -> Tensor:
        """Return the support as a boolean vector, (p,)."""
        return chosen(self.support, self.weights)


def hard_threshold(w: Tensor, support: Tensor) -> Tensor:
    """Return w with everything outside the support set to zero."""
    return torch.zeros_like(w).index_copy(0, support, w.index_select(0, support))


def solve_sparse(
    problem: WeightedRidge,
    keep: int,
    *,
    start: Tensor | None = None,
    previous: ScaledGram | NormalMatrix | None = None,
    max_iterations: int = 10,
    swaps_follow: bool = False,
) -> SparseFit:
    """Minimise Q subject to at most ``keep`` non-zero weights.

    Args:
        problem: The regression.
        keep: k, ``1 <= k <= p``.
        start: Indices of a first support, (k,); by default the end of the path.
        previous: What is known of an earlier refit of the same factor and metric, on a support near the first one or
            near that of the path; it is up- and downdated in place of being computed anew.
        max_iterations: Gradient steps tried; with 0, the first support is all that is wanted.
        swaps_follow: Whether the caller swaps weights then. No gradient step is tried after a path with refits.

    Returns:
        The best weights found.
    """
    first = None
    if start is None:
        support, known, first = shrink_support(problem, keep, previous)
        if swaps_follow and len(path_sizes(problem.reference, keep)) > 1:
            max_iterations = 0
    else:
        support, known = start, previous
    refit = problem.refit(support, known)
    value = problem.value_of(refit)
    iteration, converged = 0, max_iterations == 0
    while iteration < max_iterations and not converged:
        gradient, refit = problem.gradient_of(refit), refit.lighter()
        candidate = _next_support(problem, refit.weights, gradient, keep)
        del gradient
        tried = problem.refit(candidate, refit.known)
        tried_value = problem.value_of(tried)
        if tried_value < value - _RELATIVE_GAIN * abs(value):
            support, refit, value = candidate, tried, tried_value
            iteration += 1
        else:
            converged = True
    converged = converged and refit.exact
    return SparseFit(refit.weights, support, value, iteration, converged, refit.lighter(), first)


def shrink_support(
    problem: WeightedRidge, keep: int, previous: ScaledGram | NormalMatrix | None = None
) -> tuple[Tensor, ScaledGram | NormalMatrix | None, ScaledGram | None]:
    """Follow the path from about ``_PATH_START`` of the weights down to ``keep`` of them.

    Args:
        problem: The regression.
        keep: k, ``1 <= k <= p``.
        previous: What is known of another path's first refit, of the same factor and metric.

    Returns:
        Indices of the support, (k,), in increasing order; what is known of the path's last refit, if there was one; and
        the Gram matrix of the first, if it has one that is not another's.
    """
    w, known, beginning = problem.reference, previous, None
    sizes = path_sizes(w, keep)
    for step, size in enumerate(sizes, 1):
        support = top_k(w.square().mul_(problem.metric), size, problem.floors, problem.pattern)
        if step < len(sizes):
            del w  # as large as p, and not asked for any more
            refit = problem.refit(support, known)
            w, known = refit.weights, refit.known
            if step == 1 and previous is None:
                beginning = refit.gram
            del refit
    return support, known, beginning


def path_sizes(reference: Tensor, keep: int) -> list[int]:
    """Return how many weights each step of the path keeps, the last one ``keep``; all but that one are refitted."""
    first = min(int(reference.count_nonzero()), max(keep, round(_PATH_START * reference.numel() / _PATH_SHARE)))
    steps = math.ceil(math.log(first / keep) / -math.log(_PATH_SHARE)) if first > keep else 1
    return [*(round(first * (keep / first) ** (step / steps)) for step in range(1, steps)), keep]


def _next_support(problem: WeightedRidge, w: Tensor, gradient: Tensor, keep: int) -> Tensor:
    """Go to the line minimum along the preconditioned gradient, and keep the k largest weights there.

    The gradient is overwritten.
    """
    direction = gradient.div_(problem.metric)
    size = torch.linalg.vector_norm(direction, ord=torch.inf).clamp_min(torch.finfo(direction.dtype).tiny)
    direction.div_(size)  # of what it would be by itself, squares may be no number
    moved = problem.factor.matvec(direction)
    slope = torch.dot(problem.metric * direction, direction)
    curvature = torch.dot(moved, problem.smooth(moved)) + problem.penalty * slope
    length = size * slope / curvature.clamp_min(torch.finfo(slope.dtype).tiny)
    u = torch.addcmul(w, length, direction, value=-1, out=direction)
    return top_k(u.square_().mul_(problem.metric), keep, problem.floors, problem.pattern)
