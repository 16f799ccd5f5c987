"""The dual system of a ridge regression by conjugate gradients, where only products with G can be had.

The refit and the natural-gradient step solve, for k > n, a system of n equations (Woodbury)::

    (S G D G^T + shift I) v = S r

with D diagonal, 1/m on the support and zero elsewhere. Where no Gram matrix is formed, it is solved in these n
dimensions by conjugate gradients (Hestenes and Stiefel, 1952), one product with G and one with G^T an iteration. With
R the symmetric root of S, ``v = R z`` turns it into the positive definite ``(R G D G^T R + shift I) z = R r``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor

__all__ = ["DualSystem", "symmetric_root"]

_MOST_ITERATIONS = 200
_TOLERANCE_POWER = 0.75  # of the machine epsilon: products with G are no more exact


@dataclass(frozen=True)
class DualSystem:
    """``S G diag(scale) G^T + shift I``, (n, n), known by its products.

    Attributes:
        factor: G, (n, p).
        scale: (p,), >= 0.
        shift: >= 0.
        root: R, (n, n), symmetric with ``R R = S``; None for the identity.
    """

    factor: FisherFactor
    scale: Tensor
    shift: float
    root: Tensor | None = None

    @classmethod
    def of(cls, factor: FisherFactor, scale: Tensor, shift: float, smoothing: Tensor | None = None) -> DualSystem:
        """State the system for a symmetric positive semi-definite S, or none."""
        if smoothing is None:
            return cls(factor, scale, shift)
        return cls(factor, scale, shift, symmetric_root(smoothing))

    def solve(self, right: Tensor) -> Tensor:
        """Return v for a residual r, (n,): ``(S G D G^T + shift I) v = S r``, as near as :meth:`approach` comes."""
        return self.approach(right)[0]

    def approach(self, right: Tensor) -> tuple[Tensor, bool]:
        """Return v for a residual r, (n,), and whether it solves the system.

        The iterations end at a relative residual of rounding size, or after twice as many as there are equations,
        200 at the most. Residuals are kept orthogonal to all before them, twice (Giraud et al., 2005): rounding would
        else bring back what is solved already, and a system of bad condition take many times as many.
        """
        r = self._rooted(right.double())
        z, direction = torch.zeros_like(r), r.clone()
        square = torch.dot(r, r)
        least = square * torch.finfo(right.dtype).eps ** (2 * _TOLERANCE_POWER)
        most = min(2 * len(r), _MOST_ITERATIONS)
        before = torch.zeros(most, len(r), dtype=r.dtype, device=r.device)  # residuals of unit length
        for number in range(most):
            if not bool(square > least):
                break
            before[number] = r / square.sqrt()
            image = self._product(direction, right.dtype)
            curvature = torch.dot(direction, image)
            if not bool(curvature > 0):  # the rest lies where the matrix is zero: nothing more can be solved
                return self._rooted(z).to(right.dtype), True
            length = square / curvature
            z = z + length * direction
            r = r - length * image
            for _ in range(2):
                r = r - before[: number + 1].T @ (before[: number + 1] @ r)
            square, previous = torch.dot(r, r), square
            direction = r + (square / previous) * direction
        return self._rooted(z).to(right.dtype), not bool(square > least)

    def _product(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        inner = self.factor.rmatvec(self._rooted(z).to(dtype)).mul_(self.scale)
        return self._rooted(self.factor.matvec(inner).double()) + self.shift * z

    def _rooted(self, v: Tensor) -> Tensor:
        return v if self.root is None else self.root @ v


def symmetric_root(matrix: Tensor) -> Tensor:
    """Return R with ``R R = S`` for a symmetric S, (n, n), in float64; eigenvalues below zero count as zero."""
    values, vectors = torch.linalg.eigh(matrix.double())
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
