"""The Fisher factor G (n, p), and the only products with it that the solvers use.

``G^T G / n`` is the Fisher matrix at the reference weights: the empirical one (paper, equation 3), or a sketch of
Gauss-Newton's. A solver sees G through :class:`FisherFactor` alone, so that others can take the place of the dense one:
16 bits, a file, outer products, columns shared out over processes, or passes through the network. docs/size.md says
when which is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DenseFactor", "FisherFactor", "add_gram_", "add_squares_", "gram_of_columns", "mirror_lower_"]

_BLOCK_BYTES = 256 * 2**20  # size of the temporary copies in `gram`
_BLOCK_ROWS = 128  # of a Gram matrix at least, and a quarter of them: smaller products are slower than what they save


class FisherFactor(Protocol):
    """What a solver may ask of G."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        ...

    @property
    def column_limit(self) -> int:
        """Columns that may be copied at once; a solver that wants more does with products."""
        ...

    @property
    def iterative(self) -> bool:
        """Whether a Gram matrix costs more than the products of an iterative solver."""
        ...

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,), for w (p,)."""
        ...

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,), for v (n,)."""
        ...

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries. It may be held here, and is not to be changed."""
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

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, (m, p), dense; as many of them as there are."""
        ...


@dataclass(frozen=True)
class DenseFactor:
    """G held as one tensor.

    Attributes:
        matrix: G, (n, p).
        limit: Columns that may be copied at once; None for any number.
    """

    matrix: Tensor
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or 0 in self.matrix.shape:
            raise ValueError(f"G must have shape (n, p) with n, p >= 1, got {tuple(self.matrix.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        n, p = self.matrix.shape
        return n, p

    @property
    def column_limit(self) -> int:
        """Columns that may be copied at once."""
        return self.matrix.shape[1] if self.limit is None else self.limit

    @property
    def iterative(self) -> bool:
        """Never: a Gram matrix is one product."""
        return False

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,)."""
        return torch.mv(self.matrix, w)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,)."""
        return torch.mv(self.matrix.T, v)

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries."""
        return add_squares_(torch.zeros_like(self.matrix[0]), self.matrix) / len(self.matrix)

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index))."""
        return self.matrix.index_select(1, index)

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), in blocks of columns."""
        if self.limit is not None:
            return gram_of_columns(self, scale)
        n, p = self.shape
        support = scale.nonzero().squeeze(1)
        dense = len(support) > p // 2
        count = p if dense else len(support)
        block = max(1, _BLOCK_BYTES // (n * self.matrix.element_size()))
        result = torch.zeros(n, n, dtype=self.matrix.dtype, device=self.matrix.device)
        for start in range(0, count, block):
            if dense:
                part, own = self.matrix[:, start : start + block], scale[start : start + block]
            else:
                index = support[start : start + block]
                part, own = self.matrix.index_select(1, index), scale.index_select(0, index)
            add_gram_(result, part, own)
        return mirror_lower_(result)

    def rows(self, index: Tensor) -> FisherFactor:
        """Return the factor of some rows: a copy of them, or products with all where copies are limited."""
        if self.limit is not None:
            from swap_prune.fisher.blocked import SubFactor  # it is made of factors

            return SubFactor(self, index)
        return DenseFactor(self.matrix.index_select(0, index))

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, a view."""
        return self.matrix[first:last]


def add_squares_(total: Tensor, rows: Tensor) -> Tensor:
    """Add the sum over rows (m, p) of the squared entries to a total, (p,), in place; return it.

    Rows lie together in memory: one after the other is much faster than torch's norm over them, but on a GPU.
    """
    if rows.device.type == "cuda":
        return total.add_(torch.linalg.vector_norm(rows, dim=0).square_())
    for row in rows:
        total.addcmul_(row, row)
    return total


def add_gram_(total: Tensor, columns: Tensor, scale: Tensor) -> None:
    """Add ``C diag(scale) C^T`` to a total, (n, n), in place: its lower triangle at least.

    It is symmetric: on a CPU, a block of rows is multiplied with no row below it.

    Args:
        total: (n, n); :func:`mirror_lower_` completes it.
        columns: C, (n, r).
        scale: (r,), of any sign.
    """
    scaled, n = columns * scale, len(columns)
    size = n if columns.device.type == "cuda" else max(_BLOCK_ROWS, -(-n // 4))
    for start in range(0, n, size):
        stop = min(start + size, n)
        total[start:stop, :stop].addmm_(scaled[start:stop], columns[:stop].T)


def mirror_lower_(matrix: Tensor) -> Tensor:
    """Make a matrix, (n, n), the symmetric one of its lower triangle, in place; return it.

    In blocks, on a CPU, where a sum with the transpose of all of it would go through memory by columns.
    """
    n = len(matrix)
    size = n if matrix.device.type == "cuda" else _BLOCK_ROWS
    for start in range(0, n, size):
        stop = min(start + size, n)
        own = matrix[start:stop, start:stop]
        own.copy_(own.tril() + own.tril(-1).T)
        matrix[:start, start:stop].copy_(matrix[start:stop, :start].T)
    return matrix


def gram_of_columns(factor: FisherFactor, scale: Tensor) -> Tensor:
    """Return ``G diag(scale) G^T``, (n, n), from ``column_limit`` columns at a time.

    Args:
        factor: G, (n, p).
        scale: (p,); columns of scale zero are not read.
    """
    n = factor.shape[0]
    result = torch.zeros(n, n, dtype=scale.dtype, device=scale.device)
    for index in torch.split(scale.nonzero().squeeze(1), factor.column_limit):
        add_gram_(result, factor.columns(index), scale[index])  # without a name, a block is gone before the next
    return mirror_lower_(result)
