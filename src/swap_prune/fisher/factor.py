"""The Fisher factor G (n, p), and the only products with it that the solvers use.

``G^T G / n`` is the empirical Fisher information at the reference weights (paper, equation 3). A solver sees
G through :class:`FisherFactor` alone, so that other representations can take the place of the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DenseFactor", "FisherFactor"]

_BLOCK_BYTES = 256 * 2**20  # size of the temporary copies in `gram`


class FisherFactor(Protocol):
    """What a solver may ask of G."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        ...

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,), for w (p,)."""
        ...

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,), for v (n,)."""
        ...

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries."""
        ...

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense."""
        ...

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), for scale (p,); columns of scale zero cost nothing."""
        ...

    def rows(self, index: Tensor) -> FisherFactor:
        """Return the factor of some rows."""
        ...


@dataclass(frozen=True)
class DenseFactor:
    """G held as one tensor.

    Attributes:
        matrix: G, (n, p).
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or 0 in self.matrix.shape:
            raise ValueError(f"G must have shape (n, p) with n, p >= 1, got {tuple(self.matrix.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        n, p = self.matrix.shape
        return n, p

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,)."""
        return torch.mv(self.matrix, w)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,)."""
        return torch.mv(self.matrix.T, v)

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries."""
        norms: Tensor = torch.linalg.vector_norm(self.matrix, dim=0)
        return norms.square() / len(self.matrix)

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index))."""
        return self.matrix.index_select(1, index)

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), in blocks of columns."""
        n, p = self.shape
        support = scale.nonzero().squeeze(1)
        dense = len(support) > p // 2
        count = p if dense else len(support)
        block = max(1, _BLOCK_BYTES // (n * self.matrix.element_size()))
        result = torch.zeros(n, n, dtype=self.matrix.dtype, device=self.matrix.device)
        for start in range(0, count, block):
            index = slice(start, start + block) if dense else support[start : start + block]
            part = self.matrix[:, index]
            result.addmm_(part * scale[index], part.T)
        return result

    def rows(self, index: Tensor) -> DenseFactor:
        """Return the factor of some rows."""
        return DenseFactor(self.matrix.index_select(0, index))
