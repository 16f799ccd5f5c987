"""Damped natural-gradient steps on the support of a fit.

The regression leaves the first-order term of the loss out. For a network that was pruned, or is not at a minimum,
that term is not zero. With s the mean gradient of the loss at the current weights, the step minimises the quadratic
model

    s . d + 1/2 mean_i (g_i . d)^2 + ridge/2 sum_j m_j d_j^2

over the weights that stay (Amari, 1998; the damping is Levenberg's and Marquardt's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.regression.objective import Refit, WeightedRidge
from swap_prune.regression.square import SquareSystem

__all__ = ["NaturalGradient"]


@dataclass(frozen=True)
class NaturalGradient:
    """The factorised quadratic model: one factorisation serves every slope.

    Attributes:
        support: Indices of the kept weights, (k,).
        columns: G on the support, (n, k).
        metric: m on the support, (k,).
        ridge: Damping, > 0.
        system: The smaller of the two normal systems.
        size: p.
    """

    support: Tensor
    columns: Tensor
    metric: Tensor
    ridge: float
    system: SquareSystem
    size: int

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
        n = regression.factor.shape[0]
        columns = regression.factor.columns(support)
        metric = regression.metric.index_select(0, support)
        if len(support) <= n:
            system = columns.T @ columns
            system.diagonal().add_(n * ridge * metric)
        else:
            known = previous.gram.matrix if previous is not None and previous.gram is not None else None
            system = (columns / metric) @ columns.T if known is None else known.clone()
            system.diagonal().add_(n * ridge)
        return cls(support, columns, metric, ridge, SquareSystem.of(system), regression.metric.numel())

    def direction(self, slope: Tensor) -> Tensor:
        """Return the step for a slope s, (p,): d, (p,), zero outside the support.

        ``(G_s^T G_s / n + ridge M) d = -s``, through Woodbury's identity for k > n.
        """
        n, k = self.columns.shape
        right = slope.index_select(0, self.support)
        if k <= n:
            step = -n * self.system.solve(right)
        else:
            scaled = right / self.metric
            dual = self.system.solve(self.columns @ scaled)
            step = (self.columns.T @ dual / self.metric - scaled) / self.ridge
        return torch.zeros(self.size, dtype=slope.dtype, device=slope.device).index_copy(0, self.support, step)
