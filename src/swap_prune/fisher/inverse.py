r"""The inverse of the damped empirical Fisher, ``F^-1 = (G^T G/n + c I)^-1``, for optimal-brain-surgeon methods.

Neither F nor the n x n matrix of Woodbury's identity is formed: their condition is that of G squared, and c is small.
Factorisations of G itself by reflections (Golub and Van Loan, 2013, chapter 5) keep its digits::

    p <= n:   [G / sqrt(n); sqrt(c) I] = U R,   F^-1 = R^-1 R^-T
    p > n:    G^T = Q B,   [B^T / sqrt(n); sqrt(c) I] = U R,   F^-1 = Q R^-1 R^-T Q^T + (I - Q Q^T) / c

All of it is in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor

__all__ = ["WHOLE", "BlockFisher", "DampedFisher"]

WHOLE = 50_000  # with up to so many weights nothing of the Fisher is left out


@dataclass(frozen=True)
class DampedFisher:
    """``F = G^T G/n + c I``, known by what solves it.

    Attributes:
        damping: c > 0.
        basis: Q, (p, n), of orthonormal columns; None for p <= n.
        root: R, upper triangular, (min(n, p), min(n, p)).
    """

    damping: float
    basis: Tensor | None
    root: Tensor

    @classmethod
    def of(cls, matrix: Tensor, damping: float) -> DampedFisher:
        """Factorise for G (n, p)."""
        G = matrix.double()
        n, p = G.shape
        if p <= n:
            return cls(damping, None, _damped_root(G / n**0.5, damping))
        basis, rest = torch.linalg.qr(G.T)
        return cls(damping, basis, _damped_root(rest.T / n**0.5, damping))

    def diagonal(self) -> Tensor:
        """Return the diagonal of F^-1, (p,), in float64."""
        if self.basis is None:
            unit = torch.eye(len(self.root), dtype=self.root.dtype, device=self.root.device)
            rows: Tensor = torch.linalg.solve_triangular(self.root, unit, upper=True)
            return rows.square().sum(1)
        seen = torch.linalg.solve_triangular(self.root.T, self.basis.T, upper=False)
        unseen = (1 - self.basis.square().sum(1)).clamp_min(0)
        diagonal: Tensor = torch.linalg.vector_norm(seen, dim=0).square_().add_(unseen, alpha=1 / self.damping)
        return diagonal

    def solve(self, right: Tensor) -> Tensor:
        """Return ``F^-1 v``, (p,), in float64, for v (p,)."""
        v = right.double()
        if self.basis is None:
            return torch.cholesky_solve(v.unsqueeze(1), self.root, upper=True).squeeze(1)
        inside = self.basis.T @ v
        solved = torch.cholesky_solve(inside.unsqueeze(1), self.root, upper=True).squeeze(1)
        return self.basis @ (solved - inside / self.damping) + v / self.damping


def _damped_root(matrix: Tensor, damping: float) -> Tensor:
    """Return R with ``R^T R = A^T A + c I`` for A (m, k), m >= k, from A itself."""
    damper = damping**0.5 * torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    root: Tensor = torch.linalg.qr(torch.cat([matrix, damper]), mode="r").R
    return root


@dataclass(frozen=True)
class BlockFisher:
    """The damped Fisher with everything outside diagonal blocks left out.

    Attributes:
        factor: G, (n, p).
        damping: c > 0.
        members: Indices of each block; together 0..p in order.
    """

    factor: FisherFactor
    damping: float
    members: tuple[Tensor, ...]

    def blocks(self) -> Iterator[tuple[Tensor, DampedFisher]]:
        """Yield block after block with its indices; only one is held, and only one that is all is kept."""
        if len(self.members) == 1:
            yield self.members[0], self._whole
            return
        for index in self.members:
            yield index, DampedFisher.of(self.factor.columns(index), self.damping)

    @cached_property
    def _whole(self) -> DampedFisher:
        return DampedFisher.of(self.factor.columns(self.members[0]), self.damping)

    def diagonal(self) -> Tensor:
        """Return the diagonal of the inverse, (p,), in float64."""
        return torch.cat([block.diagonal() for _, block in self.blocks()])

    def solve(self, right: Tensor) -> Tensor:
        """Return the inverse times v (p,), (p,), in float64."""
        return torch.cat([block.solve(right[index]) for index, block in self.blocks()])
