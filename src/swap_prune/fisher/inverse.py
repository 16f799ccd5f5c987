r"""The inverse of the damped empirical Fisher, ``F^-1 = (G^T G/n + c I)^-1``, for optimal-brain-surgeon methods.

Woodbury's identity needs an n x n system only::

    F^-1 = 1/c (I - G^T K^-1 G),     K = n c I + G G^T = L L^T

Nothing of size p x p is formed. All of it is in float64, since c is small and ``I - G^T K^-1 G`` cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor

__all__ = ["WHOLE", "BlockFisher", "DampedFisher"]

WHOLE = 50_000  # with up to so many weights nothing of the Fisher is left out


@dataclass(frozen=True)
class DampedFisher:
    """``F = G^T G/n + c I`` and products with its inverse.

    Attributes:
        matrix: G, (n, p), in float64.
        damping: c > 0.
        lower: L, (n, n), the Cholesky factor of K.
    """

    matrix: Tensor
    damping: float
    lower: Tensor

    @classmethod
    def of(cls, matrix: Tensor, damping: float) -> DampedFisher:
        """Factorise K for G (n, p)."""
        G = matrix.double()
        kernel = G @ G.T
        # Rounding may leave K indefinite where the damping is tiny against G: this much of it does no harm.
        rounding = 16 * torch.finfo(G.dtype).eps * float(kernel.diagonal().sum())
        kernel.diagonal().add_(len(G) * damping + rounding)
        return cls(G, damping, torch.linalg.cholesky(kernel))

    def diagonal(self) -> Tensor:
        """Return the diagonal of F^-1, (p,), in float64."""
        whitened = torch.linalg.solve_triangular(self.lower, self.matrix, upper=False)
        explained = torch.linalg.vector_norm(whitened, dim=0).square()
        f = torch.linalg.vector_norm(self.matrix, dim=0).square() / len(self.matrix)
        # [F^-1]_jj >= 1 / F_jj for any positive definite F: a bound on what cancellation can do.
        return torch.maximum((1 - explained) / self.damping, 1 / (f + self.damping))

    def solve(self, right: Tensor) -> Tensor:
        """Return ``F^-1 v``, (p,), in float64, for v (p,)."""
        v = right.double()
        dual = torch.cholesky_solve((self.matrix @ v).unsqueeze(1), self.lower).squeeze(1)
        return (v - self.matrix.T @ dual) / self.damping


@dataclass(frozen=True)
class BlockFisher:
    """The same with everything outside diagonal blocks left out.

    Attributes:
        factor: G, (n, p).
        damping: c > 0.
        members: Indices of each block; together 0..p in order.
    """

    factor: FisherFactor
    damping: float
    members: tuple[Tensor, ...]

    def blocks(self) -> Iterator[tuple[Tensor, DampedFisher]]:
        """Yield block after block with its indices; only one is held."""
        for index in self.members:
            yield index, DampedFisher.of(self.factor.columns(index), self.damping)

    def diagonal(self) -> Tensor:
        """Return the diagonal of the inverse, (p,), in float64."""
        return torch.cat([block.diagonal() for _, block in self.blocks()])

    def solve(self, right: Tensor) -> Tensor:
        """Return the inverse times v (p,), (p,), in float64."""
        return torch.cat([block.solve(right[index]) for index, block in self.blocks()])
