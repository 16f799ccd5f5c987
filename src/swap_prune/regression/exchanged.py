r"""The refit on a support of which some weights change places: its value first, its weights only if they are wanted.

For k > n let v solve the n equations of the refit, ``(S G_s M^-1 G_s^T + n lam I) v = S r``, ``r = t - G_s w_bar_s``.
Then no weight is needed to know Q at its minimum on the support, and no pass over G to know it on another::

    Q = n lam/2 (r^T v + sum over dropped of m_j w_bar_j^2)
    K + C diag(+-1/m) C^T,      r - C (+- w_bar),      C the columns that leave (-) and enter (+)

For k <= n the same is known of the k equations of the weights themselves, of which most stay as they were::

    Q = 1/2 (r^T S r - d^T G_s^T S r + n lam sum over dropped of m_j w_bar_j^2)

Place in the pipeline: what swaps (:mod:`swap_prune.regression.swap`) try.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from swap_prune.regression.normal import NormalMatrix, smoothed
from swap_prune.regression.objective import Refit, ScaledGram, WeightedRidge
from swap_prune.regression.square import SquareSystem

__all__ = ["DirectFit", "DualFit", "KnownFit", "PrimalFit", "fit_behind"]


@dataclass(frozen=True)
class DualFit:
    """The minimiser of Q on a support, as the dual system knows it.

    Attributes:
        problem: The regression, with a ridge above 0.
        gram: The support, and K, (n, n).
        residual: r, (n,), float64.
        dual: v, (n,), float64.
        dropped: ``m_j w_bar_j^2``, summed over the weights that are not on the support, float64, ().
        system: Its system, where it was factorised.
    """

    problem: WeightedRidge
    gram: ScaledGram
    residual: Tensor
    dual: Tensor
    dropped: Tensor
    system: SquareSystem | None = None

    @property
    def support(self) -> Tensor:
        """Indices of the kept weights, (k,)."""
        return self.gram.support

    @property
    def value(self) -> float:
        """Q; infinite where the system cannot be told from a singular one."""
        if self.system is not None and self.system.kind == "inverse":
            return torch.inf
        return 0.5 * self.problem.penalty * float(torch.dot(self.residual, self.dual) + self.dropped)

    def exchanged(self, leaving: Tensor, entering: Tensor, columns: Tensor | None = None) -> DualFit:
        """Return the fit after an exchange.

        Args:
            leaving: Positions in the support of weights that leave, (t,).
            entering: Indices of weights that enter, (t,).
            columns: Of G, those that leave and those that enter, (n, 2 t), in any dtype, where they are at hand.
        """
        problem, support = self.problem, self.gram.support
        index = torch.cat([support[leaving], entering])
        sign = problem.reference.new_ones(len(index))
        sign[: len(leaving)] = -1
        metric, reference = problem.metric[index], problem.reference[index]
        scale, kept = sign / metric, sign * reference
        matrix, residual = self.gram.matrix.clone(), self.residual.clone()
        limit = problem.factor.column_limit if columns is None else len(index)
        for start in range(0, len(index), limit):
            at = slice(start, start + limit)
            part = problem.factor.columns(index[at]) if columns is None else columns.to(matrix.dtype)
            matrix.addmm_(part * scale[at], part.T)
            residual -= part @ kept[at]
        system = problem.dual_system(matrix)
        return replace(
            self,
            gram=ScaledGram(exchanged_support(support, leaving, entering), matrix),
            residual=residual,
            dual=system.solve(problem.smooth(residual)),
            dropped=self.dropped - torch.dot(kept.double(), metric.double() * reference),
            system=system,
        )

    def refit(self) -> Refit:
        """Return the refit; it takes a pass over G."""
        return self.problem.primal(self.gram.support, self.residual, self.dual, self.gram, self.system)


@dataclass(frozen=True)
class PrimalFit:
    """The minimiser of Q on a support of at most n weights, as their own system knows it.

    Attributes:
        problem: The regression.
        normal: The support, and what its system is made of.
        drift: ``m_j w_bar_j^2``, summed over all weights, float64, ().
    """

    problem: WeightedRidge
    normal: NormalMatrix
    drift: Tensor

    @property
    def support(self) -> Tensor:
        """Indices of the kept weights, (k,)."""
        return self.normal.support

    @cached_property
    def solved(self) -> tuple[SquareSystem, Tensor, Tensor]:
        """The system, r, (n,), and d, (k,)."""
        return self.problem.solve_normal(self.normal)

    @cached_property
    def value(self) -> float:
        """Q."""
        _, residual, change = self.solved
        pull = smoothed(residual, self.problem.smoothing)
        dropped = self.drift - _drift(self.problem, self.support)
        fit = torch.dot(residual - change @ self.normal.columns, pull)
        return 0.5 * float(fit + self.problem.penalty * dropped)

    def exchanged(self, leaving: Tensor, entering: Tensor, columns: Tensor | None = None) -> PrimalFit:
        """Return the fit after an exchange; see :meth:`DualFit.exchanged`."""
        del columns  # they are copied as float64
        support = exchanged_support(self.support, leaving, entering)
        normal = NormalMatrix.of(self.problem.factor, support, self.problem.smoothing, self.normal)
        return replace(self, normal=normal)

    def refit(self) -> Refit:
        """Return the refit."""
        return self.problem.normal_refit(self.normal, *self.solved)


@dataclass(frozen=True)
class DirectFit:
    """A fit whose support is refitted to be judged, for its system of n equations cannot be told from a singular one.

    Attributes:
        problem: The regression.
        support: Indices of the kept weights, (k,).
        known: Its refit.
    """

    problem: WeightedRidge
    support: Tensor
    known: Refit

    @cached_property
    def value(self) -> float:
        """Q."""
        return self.problem.value_of(self.known)

    def exchanged(self, leaving: Tensor, entering: Tensor, columns: Tensor | None = None) -> DirectFit:
        """Return the fit after an exchange."""
        del columns  # they would be of no use
        support = exchanged_support(self.support, leaving, entering)
        return DirectFit(self.problem, support, self.problem.refit(support, self.known.gram))

    def refit(self) -> Refit:
        """Return the refit."""
        return self.known


def exchanged_support(support: Tensor, leaving: Tensor, entering: Tensor) -> Tensor:
    """Return a support, (k,), after an exchange, in increasing order as it was before; few are sorted.

    Args:
        support: Indices in increasing order, (k,).
        leaving: Positions in it, (t,).
        entering: Indices that are not in it, (t,).
    """
    stays = torch.ones_like(support, dtype=torch.bool).index_fill_(0, leaving, False)
    staying, entering = support[stays], entering.sort().values
    places = torch.searchsorted(staying, entering) + torch.arange(len(entering), device=support.device)
    is_old = stays.fill_(True).index_fill_(0, places, False)
    return torch.empty_like(support).index_copy_(0, places, entering).masked_scatter_(is_old, staying)


KnownFit = PrimalFit | DualFit | DirectFit


def fit_behind(problem: WeightedRidge, support: Tensor, refit: Refit) -> KnownFit:
    """Return what can be exchanged of a refit: the system that was solved."""
    if refit.normal is not None:
        return PrimalFit(problem, refit.normal, _drift(problem))
    if refit.gram is None or refit.dual is None or refit.fitted is None:
        return DirectFit(problem, support, refit)
    residual = (problem.target - refit.fitted + refit.gram.matrix @ refit.dual).double()
    dropped = _drift(problem) - _drift(problem, support)
    return DualFit(problem, refit.gram, residual, refit.dual.double(), dropped, refit.system)


def _drift(problem: WeightedRidge, support: Tensor | None = None) -> Tensor:
    """Return ``m_j w_bar_j^2``, summed over a support or all weights, float64, ()."""
    reference, metric = problem.reference, problem.metric
    if support is not None:
        reference, metric = reference[support], metric[support]
    return (reference.square() * metric).sum(dtype=torch.float64)
