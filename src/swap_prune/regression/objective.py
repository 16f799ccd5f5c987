"""The weighted ridge regression behind LR and EWR: value, gradient, exact refit on a support.

With the transport plan fixed, both of the paper's problems are (its equations 4 and 7)::

    Q(w) = 1/2 (G w - t)^T S (G w - t) + n lam/2 sum_j m_j (w_j - w_bar_j)^2

LR has ``t = y``, EWR's exact gradient has the barycentric target; both have ``S = I``. The gradient of the
paper's Algorithm 1 has ``t = y`` and ``S = n P``: residuals smoothed over neighbours. ``m`` is 1 in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor
from swap_prune.regression.conjugate import DualSystem, symmetric_root
from swap_prune.regression.normal import NormalMatrix, smoothed
from swap_prune.regression.pattern import GroupPattern
from swap_prune.regression.square import SquareSystem, solve_square
from swap_prune.regression.top_k import Floors

__all__ = ["Refit", "ScaledGram", "WeightedRidge"]


@dataclass(frozen=True)
class ScaledGram:
    """``G_s M^-1 G_s^T``.

    Attributes:
        support: s, indices, (k,).
        matrix: (n, n).
    """

    support: Tensor
    matrix: Tensor


@dataclass(frozen=True)
class Refit:
    """The minimiser of Q on a support.

    Attributes:
        weights: w, (p,), zero outside the support.
        gram: The Gram matrix behind it, or None where the k x k system was solved, or none was formed.
        normal: What the k x k system was made of, where that was solved.
        fitted: ``G w``, (n,), where solving gave it.
        dual: v with ``S (G w - t) = -n lam v``, (n,), where it was solved for.
        pulled: ``G^T v``, (p,), of which the gradient is made; None where it is not held any more.
        system: The factorised system, where one was solved.
        exact: Whether it is the minimiser, and not what conjugate gradients had come to at their limit.
    """

    weights: Tensor
    gram: ScaledGram | None = None
    normal: NormalMatrix | None = None
    fitted: Tensor | None = None
    dual: Tensor | None = None
    pulled: Tensor | None = None
    system: SquareSystem | None = None
    exact: bool = True

    @property
    def known(self) -> ScaledGram | NormalMatrix | None:
        """What a refit on a support near its own can begin with."""
        return self.gram or self.normal

    def lighter(self) -> Refit:
        """Return this refit with a vector of p less: asking for its gradient again takes a pass."""
        return replace(self, pulled=None)


@dataclass(frozen=True)
class WeightedRidge:
    """The regression of one stage.

    Attributes:
        factor: G, (n, p).
        target: t, (n,).
        reference: w_bar, (p,).
        ridge: lam >= 0.
        metric: m, (p,), positive.
        smoothing: S, (n, n), or None for the identity.
        floors: Layers of which a support has so many weights at least.
        pattern: What its groups of neighbours are held to.
    """

    factor: FisherFactor
    target: Tensor
    reference: Tensor
    ridge: float
    metric: Tensor
    smoothing: Tensor | None = None
    floors: Floors = ()
    pattern: GroupPattern | None = None

    @property
    def penalty(self) -> float:
        """``n lam``: the ridge as it stands in the normal equations."""
        return self.factor.shape[0] * self.ridge

    def smooth(self, residual: Tensor) -> Tensor:
        """Return ``S r``, (n,), in the dtype of r."""
        return residual if self.smoothing is None else self.smoothing.to(residual.dtype) @ residual

    def value(self, w: Tensor, x: Tensor | None = None) -> float:
        """Return Q(w); ``x = G w`` saves a pass where it is known."""
        residual = (self.factor.matvec(w) if x is None else x) - self.target
        fit = torch.dot(residual.double(), self.smooth(residual).double())
        drift = (w - self.reference).square_().mul_(self.metric).sum(dtype=torch.float64)
        return float(0.5 * fit + 0.5 * self.penalty * drift)

    def gradient(self, w: Tensor, x: Tensor | None = None) -> Tensor:
        """Return ``G^T S (G w - t) + n lam m (w - w_bar)``, (p,)."""
        residual = (self.factor.matvec(w) if x is None else x) - self.target
        drift = (w - self.reference).mul_(self.metric)
        return self.factor.rmatvec(self.smooth(residual)).add_(drift, alpha=self.penalty)

    def value_of(self, refit: Refit) -> float:
        """Return Q at a refit."""
        return self.value(refit.weights, refit.fitted)

    def gradient_of(self, refit: Refit) -> Tensor:
        """Return ``grad Q`` at a refit, (p,), a vector of its own."""
        if refit.dual is None:
            return self.gradient(refit.weights, refit.fitted)
        pulled = self.factor.rmatvec(refit.dual) if refit.pulled is None else refit.pulled
        return (refit.weights - self.reference).mul_(self.metric).sub_(pulled).mul_(self.penalty)

    def refit(self, support: Tensor, previous: ScaledGram | NormalMatrix | None = None) -> Refit:
        """Minimise Q over the weights of a support, exactly.

        The stationarity condition for the change ``d`` on the support is
        ``(G_s^T S G_s + n lam M) d = G_s^T S r`` with ``r = t - G_s w_bar_s``. For k > n it is solved through
        Woodbury's identity, ``d = M^-1 G_s^T v`` with ``(S G_s M^-1 G_s^T + n lam I) v = S r``: the larger
        of the two systems is never formed. A factor that knows products only gets the latter solved by
        conjugate gradients, as far as these come.

        Then ``S (G w - t) = -n lam v``: the product ``G^T v``, which d needs, is the gradient too.

        Args:
            support: Indices of the kept weights, (k,).
            previous: What is ``known`` of an earlier refit of the same factor and metric; where the supports differ by
                less than k, it is up- and downdated instead of being computed anew.

        Returns:
            The weights, zero outside the support, and what the next refit can use.
        """
        if len(support) <= self.factor.shape[0]:
            near = previous if isinstance(previous, NormalMatrix) else None
            normal = NormalMatrix.of(self.factor, support, self.smoothing, near)
            return self.normal_refit(normal, *self.solve_normal(normal))
        residual = self.target - self.factor.matvec(self._placed(support, self.reference.index_select(0, support)))
        if self.factor.iterative:
            scale = self._placed(support, self._inverse(support))
            dual, exact = DualSystem.of(self.factor, scale, self.penalty, self.smoothing).approach(residual)
            return replace(self.primal(support, residual, dual, None, None), exact=exact)
        gram, system, dual = self._dual(support, residual, previous if isinstance(previous, ScaledGram) else None)
        return self.primal(support, residual, dual, gram, system)

    def solve_normal(self, normal: NormalMatrix) -> tuple[SquareSystem, Tensor, Tensor]:
        """Solve for the weights of a support of at most n, in float64: a small ridge would be lost in float32.

        Returns:
            The factorised ``G_s^T S G_s + n lam M``, ``r``, (n,), and ``d``, (k,).
        """
        support, matrix = normal.support, normal.matrix.clone()
        matrix.diagonal().add_(self.penalty * self.metric.index_select(0, support).double())
        rounding = 8 * torch.finfo(self.target.dtype).eps ** 2  # of the columns, squared as they are
        system = SquareSystem.of(matrix, rounding=rounding)
        residual = self.target.double() - self.reference.index_select(0, support).double() @ normal.columns
        return system, residual, system.solve(normal.columns @ smoothed(residual, self.smoothing))

    def normal_refit(self, normal: NormalMatrix, system: SquareSystem, residual: Tensor, change: Tensor) -> Refit:
        """Return the refit that :meth:`solve_normal` has found."""
        kept, dtype = self.reference.index_select(0, normal.support), self.target.dtype
        fitted = self.target - (residual - change @ normal.columns).to(dtype)
        weights = self._placed(normal.support, kept + change.to(kept.dtype))
        return Refit(weights, normal=normal, fitted=fitted, system=system)

    def primal(
        self, support: Tensor, residual: Tensor, dual: Tensor, gram: ScaledGram | None, system: SquareSystem | None
    ) -> Refit:
        """Return the refit that a dual solution stands for; it takes a pass over G.

        Args:
            support: Indices of the kept weights, (k,).
            residual: r, (n,), in any dtype.
            dual: v, (n,), in any dtype.
            gram: The Gram matrix of the support, where there is one.
            system: The factorised system, where one was solved.
        """
        dual = dual.to(self.target.dtype)
        pulled = self.factor.rmatvec(dual)
        change = self._inverse(support) * pulled.index_select(0, support)
        weights = self._placed(support, self.reference.index_select(0, support) + change)
        if gram is None or self.penalty == 0 or system is None or system.kind == "inverse":
            return Refit(weights, gram)
        fitted = self.target - residual.to(self.target.dtype) + gram.matrix @ dual
        return Refit(weights, gram, None, fitted, dual, pulled, system)

    def dual_system(self, gram: Tensor) -> SquareSystem:
        """Factorise ``S K + n lam I`` for a Gram matrix K, (n, n)."""
        system = gram.clone() if self.smoothing is None else self.smoothing @ gram
        system.diagonal().add_(self.penalty)
        return SquareSystem.of(system, symmetric=self.smoothing is None)

    def _placed(self, support: Tensor, values: Tensor) -> Tensor:
        """Return the vector (p,) that has values on a support and zeros elsewhere."""
        return torch.zeros_like(self.reference).index_copy_(0, support, values)

    def _inverse(self, support: Tensor) -> Tensor:
        """Return ``1/m`` on a support, (k,)."""
        return 1 / self.metric.index_select(0, support)

    def _dual(
        self, support: Tensor, residual: Tensor, previous: ScaledGram | None
    ) -> tuple[ScaledGram, SquareSystem | None, Tensor]:
        """Return v with ``(S G diag(scale) G^T + n lam I) v = S r``.

        Returns:
            The Gram matrix, the factorised system, if there is one, and v. Of a system that cannot be told from a
            singular one, v solves only as much as can.
        """
        gram = self._gram(support, previous)
        if self.smoothing is not None and self.penalty == 0:  # S K may be singular: of R K R, what can be solved is
            root = symmetric_root(self.smoothing)
            dual = root @ solve_square(root @ gram.matrix.double() @ root, root @ residual.double())
            return gram, None, dual.to(residual.dtype)
        system = self.dual_system(gram.matrix)
        return gram, system, system.solve(self.smooth(residual))

    def _gram(self, support: Tensor, previous: ScaledGram | None) -> ScaledGram:
        """Return ``G_s M^-1 G_s^T``, from the previous one where that touches fewer columns."""
        if previous is not None and torch.equal(support, previous.support):
            return previous
        scale = self._placed(support, self._inverse(support))
        if previous is not None:
            scale.index_add_(0, previous.support, self._inverse(previous.support), alpha=-1)
            if int(scale.count_nonzero()) < len(support):
                return ScaledGram(support, previous.matrix + self.factor.gram(scale))
            scale.zero_().index_copy_(0, support, self._inverse(support))
        return ScaledGram(support, self.factor.gram(scale))
