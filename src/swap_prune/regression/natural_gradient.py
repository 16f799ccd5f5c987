"""Damped natural-gradient steps on the support of a fit.

The regression leaves the first-order term of the loss out. For a network that was pruned, or is not at a minimum,
that term is not zero. With gamma the mean gradient of the loss at the current weights, the step minimises the quadratic
model

    gamma . d + 1/2 mean_i (g_i . d)^2 + ridge/2 sum_j m_j d_j^2

over the weights that stay (Amari, 1998; the damping is Levenberg's and Marquardt's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor
from swap_prune.regression.conjugate import DualSystem
from swap_prune.regression.objective import Refit, WeightedRidge
from swap_prune.regression.square import SquareSystem

__all__ = ["NaturalGradient"]


@dataclass(frozen=True)
class NaturalGradient:
    """The factorised quadratic model: one factorisation serves every slope.

    Attributes:
        support: Indices of the kept weights, (k,).
        factor: G, (n, p).
        columns: G on the support, (n, k), or None where so many columns are not copied: then products with all of G
            do, of weights that are zero outside the support.
        metric: m on the support, (k,).
        ridge: Damping, > 0.
        system: The smaller of the two normal systems.
    """

    support: Tensor
    factor: FisherFactor
    columns: Tensor | None
    metric: Tensor
    ridge: float
    system: SquareSystem | DualSystem

    @classmethod
    def on(
        cls, regression: WeightedRidge, support: Tensor, ridge: float, previous: Refit | None = None
    ) -> NaturalGradient:
        """Factorise the model of a regression's G and metric on a support.

        Args:
            regression: Where G (n, p) and m (p,) come from.
            support: Indices of the kept weights, (k,).
            ridge: Damping, > 0.
            previous: A refit on this very support, whose Gram matrix is used again.
        """
        factor, n = regression.factor, regression.factor.shape[0]
        metric = regression.metric.index_select(0, support)
        if len(support) <= n:
            columns = factor.columns(support)
            system = columns.T @ columns
            system.diagonal().add_(n * ridge * metric)
            return cls(support, factor, columns, metric, ridge, SquareSystem.of(system))
        copied = factor.columns(support) if len(support) <= factor.column_limit else None
        known = previous.gram.matrix if previous is not None and previous.gram is not None else None
        if known is not None:
            system = known.clone()
        elif copied is not None:
            system = (copied / metric) @ copied.T
        else:
            scale = torch.zeros_like(regression.metric).index_copy(0, support, 1 / metric)
            if factor.iterative:
                return cls(support, factor, None, metric, ridge, DualSystem(factor, scale, n * ridge))
            system = factor.gram(scale)
        system.diagonal().add_(n * ridge)
        return cls(support, factor, copied, metric, ridge, SquareSystem.of(system))

    def direction(self, slope: Tensor) -> Tensor:
        """Return the step for a slope gamma, (p,): d, (p,), zero outside the support.

        ``(G_s^T G_s / n + ridge M) d = -gamma``, through Woodbury's identity for k > n.
        """
        n, k = self.factor.shape[0], len(self.support)
        right = slope.index_select(0, self.support)
        if k <= n:
            step = -n * self.system.solve(right)
        else:
            scaled = right / self.metric
            dual = self.system.solve(self._times(scaled))
            step = (self._transposed(dual) / self.metric - scaled) / self.ridge
        return torch.zeros_like(slope).index_copy(0, self.support, step)

    def _times(self, v: Tensor) -> Tensor:
        """Return ``G_s v``, (n,), for v (k,)."""
        if self.columns is not None:
            return self.columns @ v
        return self.factor.matvec(v.new_zeros(self.factor.shape[1]).index_copy_(0, self.support, v))

    def _transposed(self, u: Tensor) -> Tensor:
        """Return ``G_s^T u``, (k,), for u (n,)."""
        return self.columns.T @ u if self.columns is not None else self.factor.rmatvec(u).index_select(0, self.support)
