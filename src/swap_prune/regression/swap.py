r"""Local search on the support: kept and dropped weights change places, many pairs at a time.

Let w minimise Q on its support s, with ``A = G_s^T S G_s + n lam M_s`` and ``q = grad Q(w)``. Without weight j, the
others refitted, Q is higher, and with weight i as well it is lower, by exactly (Hassibi and Stork, 1993)::

    leave_j = w_j^2 / (2 [A^-1]_jj),
    enter_i = q_i^2 / (2 c_i),     c_i = n lam m_i + g_i^T S g_i - g_i^T S G_s A^-1 G_s^T S g_i.

Gains of several pairs do not add up, so a batch counts only if its refit lowers Q, and is halved where it does not.
For k > n both come from the n x n system of the refit, ``K = S G_s M_s^-1 G_s^T + n lam I``::

    [A^-1]_jj = (1 - h_j / m_j) / (n lam m_j),     c_i = n lam (m_i + h_i),     h = g^T K^-1 S g.

What a batch gains is known without its weights (:mod:`swap_prune.regression.exchanged`); its columns are copied once.

Place in the pipeline: after the path, or hard thresholding, has come to rest, on the same Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from swap_prune.regression.exchanged import KnownFit, fit_behind
from swap_prune.regression.iht import SparseFit
from swap_prune.regression.objective import Refit, WeightedRidge
from swap_prune.regression.pattern import GroupPattern
from swap_prune.regression.top_k import Floors, kept_beyond, top_k

__all__ = ["Exchange", "Swaps", "can_swap", "exchange_of", "propose_swaps", "swap_weights"]

SHARE = 0.02  # of the kept weights, exchanged at once
_HALVINGS = 4  # of a batch that does not lower Q
SHORTLIST = 4  # weights looked at exactly, in units of the batch
_RELATIVE_GAIN = 1e-4  # a batch that gains less ends the search
_TINY = 1e-12


def can_swap(problem: WeightedRidge, keep: int) -> bool:
    """Whether swaps can be looked for: there is a choice, a ridge, and a Gram matrix for k > n."""
    n, p = problem.factor.shape
    return keep < p and problem.penalty > 0 and (keep <= n or not problem.factor.iterative)


def swap_weights(
    problem: WeightedRidge, fit: SparseFit, max_batches: int = 10, diagonal: Tensor | None = None
) -> SparseFit:
    """Exchange kept and dropped weights in batches as long as Q falls by more than a little.

    Args:
        problem: The regression; where :func:`can_swap` says no, the fit is returned as it is.
        fit: A refitted support.
        max_batches: Batches accepted at the most; a search that they end has not converged.
        diagonal: f, (p,), where it is known already.
    """
    keep = len(fit.support)
    if max_batches == 0 or fit.refit is None or not can_swap(problem, keep):
        return fit
    f = problem.factor.diagonal() if diagonal is None else diagonal
    scale = torch.add(f, problem.metric, alpha=problem.ridge).mul_(problem.factor.shape[0])
    scale.clamp_min_(torch.finfo(scale.dtype).tiny)
    batch = max(1, round(SHARE * keep))
    refit = fit.refit if fit.refit.known is not None else problem.refit(fit.support)  # what waits holds no k equations
    tried = fit_behind(problem, fit.support, refit)
    for _ in range(max_batches):
        gradient, refit = problem.gradient_of(refit), refit.lighter()
        fit = replace(fit, refit=refit)
        swaps = propose_swaps(exchange_of(problem, fit.support, refit, gradient), scale, batch)
        del gradient
        better = _first_gain(tried, swaps, fit.value)
        if better is None:
            break
        tried, count = better
        batch = max(1, min(batch, 2 * count))
        del swaps, better  # the columns
        refit = tried.refit()
        fit = replace(fit, weights=refit.weights, support=tried.support, value=tried.value, swaps=fit.swaps + count)
    else:
        fit = replace(fit, converged=False)
    return replace(fit, refit=refit.lighter())


def _first_gain(fit: KnownFit, swaps: Swaps, value: float) -> tuple[KnownFit, int] | None:
    """Return the fit of the longest batch, of those halved and halved again, that lowers Q, and its size; else None."""
    count = len(swaps.leaving)
    for _ in range(_HALVINGS + 1):
        if count == 0:
            return None
        tried = fit.exchanged(*swaps.first(count))
        if tried.value < value - _RELATIVE_GAIN * abs(value):
            return tried, count
        count //= 2
    return None


class Swaps(NamedTuple):
    """Pairs of weights that are to change places, the best first.

    Attributes:
        leaving: Positions in the support, (t,).
        entering: Indices of weights, (t,).
        columns: Of G, those that leave and those that enter, (n, 2 t), where they were copied.
    """

    leaving: Tensor
    entering: Tensor
    columns: Tensor | None

    def first(self, count: int) -> Swaps:
        """Return the first of the pairs."""
        if count == len(self.leaving):
            return self
        if self.columns is None:
            return Swaps(self.leaving[:count], self.entering[:count], None)
        out, into = self.columns.tensor_split(2, dim=1)
        columns = torch.cat([out[:, :count], into[:, :count]], dim=1)
        return Swaps(self.leaving[:count], self.entering[:count], columns)


@dataclass(frozen=True)
class Exchange:
    """What single weights cost that leave a support, and gain that enter it, the others refitted.

    Attributes:
        problem: The regression.
        support: Indices of the kept weights, (k,).
        weights: Their refit, (p,).
        gradient: ``grad Q`` there, (p,).
        quadratic: Maps columns g of G, (n, r), to ``g^T (S - S G_s A^-1 G_s^T S) g``, (r,).
        inverse: Maps positions in the support, (r,), and their columns of G, where those are at hand, to
            ``[A^-1]_jj``, (r,).
        is_dual: Whether both look at columns of G alone.
    """

    problem: WeightedRidge
    support: Tensor
    weights: Tensor
    gradient: Tensor
    quadratic: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor | None], Tensor]
    is_dual: bool

    def leave(self, position: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return how much Q rises when a kept weight leaves, (r,), for positions in the support."""
        return self.weights[self.support[position]].double().square() / (2 * self.inverse(position, columns))

    def enter(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return how much Q falls when a dropped weight enters, (r,), for indices of weights."""
        own = self.problem.penalty * self.problem.metric[index].double()
        curvature = own + in_parts(self.problem, index, self.quadratic, columns)
        return self.gradient[index].double().square() / (2 * torch.maximum(curvature, own))


def in_parts(
    problem: WeightedRidge, index: Tensor, function: Callable[[Tensor], Tensor], columns: Tensor | None = None
) -> Tensor:
    """Map columns of G by a function (n, r) -> (r,) that takes any dtype, as many at once as the factor allows."""
    if columns is not None:
        return function(columns)
    return torch.cat([function(exact(problem, part)) for part in torch.split(index, problem.factor.column_limit)])


def exact(problem: WeightedRidge, index: Tensor) -> Tensor:
    """Return columns of G, (n, r), in any dtype that holds them."""
    columns: Tensor = getattr(problem.factor, "exact_columns", problem.factor.columns)(index)
    return columns


def exchange_of(problem: WeightedRidge, support: Tensor, refit: Refit, gradient: Tensor) -> Exchange:
    """Factorise what single exchanges need.

    Args:
        problem: The regression, with a ridge above 0.
        support: Indices of the kept weights, (k,).
        refit: The refit on this support.
        gradient: ``grad Q`` at its weights, (p,).
    """
    penalty = problem.penalty
    metric = problem.metric[support].double()

    def smooth(columns: Tensor) -> Tensor:
        return columns if problem.smoothing is None else problem.smoothing.double() @ columns

    if refit.gram is not None:
        system = problem.dual_system(refit.gram.matrix) if refit.system is None else refit.system

        def explained(columns: Tensor) -> Tensor:
            if problem.smoothing is None:
                return system.forms(columns)
            g = columns.double()
            return (g * system.solve(smooth(g))).sum(0)

        def inverse(position: Tensor, columns: Tensor | None) -> Tensor:
            own = metric[position]
            h = in_parts(problem, support[position], explained, columns)
            return (1 - h / own).clamp_min(_TINY) / (penalty * own)

        return Exchange(problem, support, refit.weights, gradient, lambda g: penalty * explained(g), inverse, True)
    normal, primal = refit.normal, refit.system
    assert normal is not None and primal is not None, "k equations were solved"

    def residual(columns: Tensor) -> Tensor:
        g = smooth(columns.double())
        return (columns.double() * g).sum(0) - primal.forms(normal.columns @ g)

    def of_inverse(position: Tensor, columns: Tensor | None) -> Tensor:
        del columns
        return primal.forms(torch.eye(len(support), dtype=torch.float64, device=support.device)[:, position])

    return Exchange(problem, support, refit.weights, gradient, residual, of_inverse, False)


def spared(leaving: Tensor, floors: Floors, support: Tensor) -> Tensor:
    """Return which of the indices that are to leave a support, one after the other, no layer needs, boolean.

    Args:
        leaving: Indices of the support, in this order.
        floors: Of layers, in the order of their places.
        support: In increasing order.
    """
    may = torch.ones_like(leaving, dtype=torch.bool)
    if not floors:
        return may
    beyond = kept_beyond(support, floors)
    starts, stops = torch.tensor([(place.start, place.stop) for place, _ in floors], device=leaving.device).T
    layer = torch.searchsorted(starts.contiguous(), leaving, right=True) - 1
    inside = (layer >= 0) & (leaving < stops[layer])
    may[inside] = _among_first(layer[inside], beyond)
    return may


def propose_swaps(exchange: Exchange, scale: Tensor, batch: int) -> Swaps:
    """Pair the weights that cost least with those that gain most, as long as a pair gains.

    Only a shortlist is looked at exactly: those that look best by ``w^2 a/2`` and ``q^2 / 2a``, a being the curvature
    of the weight alone.

    Args:
        exchange: The exchanges.
        scale: a, (p,), positive: the diagonal of ``G^T G + n lam M``.
        batch: Pairs at the most.

    Returns:
        Those that gain, best pair first.
    """
    pattern = exchange.problem.pattern
    if pattern is not None and pattern.is_full(len(exchange.support)):
        return _within_groups(exchange, pattern, scale, batch)
    return _anywhere(exchange, scale, batch)


def _promises(exchange: Exchange, scale: Tensor) -> Tensor:
    """Return ``q^2 / a``, (p,), and -1 where a weight is kept."""
    root = scale.sqrt()  # squares of gradients may be too small for a number, or too large
    return torch.div(exchange.gradient, root, out=root).square_().index_fill_(0, exchange.support, -1)


def _anywhere(exchange: Exchange, scale: Tensor, batch: int) -> Swaps:
    """Pair weights wherever they are."""
    problem, support = exchange.problem, exchange.support
    wanted = SHORTLIST * batch
    worth = exchange.weights[support].square().mul_(scale[support])
    cheap = top_k(worth.neg_(), min(wanted, len(support)))
    promise = _promises(exchange, scale)
    if problem.pattern is not None:
        promise.masked_fill_(problem.pattern.spread(problem.pattern.room(support) == 0), -1)
    eager = top_k(promise, min(wanted, len(promise) - len(support)))
    eager = eager[promise[eager] >= 0]
    del promise
    columns, out, into = _copied(exchange, support[cheap], eager)
    cost, order = exchange.leave(cheap, out).sort()
    may = spared(support[cheap[order]], problem.floors, support)
    if problem.pattern is not None:
        may &= _among_first(problem.pattern.group_of(support[cheap[order]]), problem.pattern.spare(support))
    cost, order = cost[may], order[may]
    gain, rank = exchange.enter(eager, into).sort(descending=True)
    if problem.pattern is not None:
        may = _among_first(problem.pattern.group_of(eager[rank]), problem.pattern.room(support))
        gain, rank = gain[may], rank[may]
    pairs = min(batch, len(cost), len(gain))
    count = int((gain[:pairs] > cost[:pairs]).sum())  # gains fall and costs rise: those that gain come first
    return _paired(cheap, order[:count], eager, rank[:count], columns)


def _within_groups(exchange: Exchange, pattern: GroupPattern, scale: Tensor, batch: int) -> Swaps:
    """Pair the dropped weight of each group that promises most with the kept one that is worth least.

    Where all groups are full nothing else can change places. Layers keep as many as before.
    """
    support, promise = exchange.support, _promises(exchange, scale)
    worth = torch.full_like(promise, -torch.inf)
    worth[support] = -exchange.weights[support].square() * scale[support]
    gain, entering = pattern.best(promise)
    cost, leaving = pattern.best(worth)
    del promise, worth
    surplus = (gain + cost).masked_fill_(gain < 0, -torch.inf)
    pairs = surplus.topk(min(SHORTLIST * batch, len(surplus))).indices
    pairs = pairs[surplus[pairs].isfinite()]
    eager, cheap = entering[pairs], torch.searchsorted(support, leaving[pairs])
    columns, out, into = _copied(exchange, support[cheap], eager)
    surplus, order = (exchange.enter(eager, into) - exchange.leave(cheap, out)).sort(descending=True)
    order = order[: min(batch, int((surplus > 0).sum()))]
    return _paired(cheap, order, eager, order, columns)


def _among_first(group: Tensor, counts: Tensor) -> Tensor:
    """Return which of some weights, of groups (r,) and in this order, are among the first so many of theirs, boolean.

    Args:
        group: Number of the group of each.
        counts: How many of each group may be, (groups,).
    """
    order = group.argsort(stable=True)
    ordered = group[order]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return place < counts[group]


def _copied(
    exchange: Exchange, leaving: Tensor, entering: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return columns of G, of all these weights, of those that leave and of those that enter, where they are few."""
    problem, seen = exchange.problem, torch.cat([leaving, entering])
    if not exchange.is_dual or len(seen) > problem.factor.column_limit:
        return None, None, None
    columns = exact(problem, seen)
    return columns, columns[:, : len(leaving)], columns[:, len(leaving) :]


def _paired(cheap: Tensor, order: Tensor, eager: Tensor, rank: Tensor, columns: Tensor | None) -> Swaps:
    """Return the pairs of positions in the support ``cheap[order]`` and of indices ``eager[rank]``."""
    if columns is not None:
        columns = columns.index_select(1, torch.cat([order, len(cheap) + rank]))
    return Swaps(cheap[order], eager[rank], columns)
