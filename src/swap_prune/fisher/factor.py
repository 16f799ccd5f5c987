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

__all__ = [
    "DenseFactor",
    "FisherFactor",
    "SubFactor",
    "add_gram_",
    "add_squares_",
    "gram_of_columns",
    "mirror_lower_",
    "of_columns",
]

_BLOCK_BYTES = 256 * 2**20  # size of the temporary copies in `gram`
_BLOCK_ROWS = 96  # of a Gram matrix at least, and a tenth of them: smaller products are slower than what they save


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
            return SubFactor(self, index)
        return DenseFactor(self.matrix.index_select(0, index))

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, a view."""
        return self.matrix[first:last]


@dataclass(frozen=True)
class SubFactor:
    """Some rows, or some columns, of a factor: products with all of it, and no copy.

    Attributes:
        whole: G, (n, p).
        rows_of: Indices of the rows, or None for all.
        columns_of: Indices of the columns, or None for all.
    """

    whole: FisherFactor
    rows_of: Tensor | None = None
    columns_of: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p) of the part."""
        n, p = self.whole.shape
        return (
            n if self.rows_of is None else len(self.rows_of),
            p if self.columns_of is None else len(self.columns_of),
        )

    @property
    def column_limit(self) -> int:
        """That of the whole."""
        return self.whole.column_limit

    @property
    def iterative(self) -> bool:
        """As for the whole."""
        return self.whole.iterative

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,)."""
        if self.columns_of is not None:
            w = w.new_zeros(self.whole.shape[1]).index_copy_(0, self.columns_of, w)
        result = self.whole.matvec(w)
        return result if self.rows_of is None else result.index_select(0, self.rows_of)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,); a row that was taken twice counts twice."""
        if self.rows_of is not None:
            v = v.new_zeros(self.whole.shape[0]).index_add_(0, self.rows_of, v)
        result = self.whole.rmatvec(v)
        return result if self.columns_of is None else result.index_select(0, self.columns_of)

    def diagonal(self) -> Tensor:
        """Return f, (p,)."""
        if self.rows_of is None and self.columns_of is not None:
            return self.whole.diagonal().index_select(0, self.columns_of)
        parts = [
            torch.linalg.vector_norm(self.columns(i), dim=0).square()
            for i in torch.split(self._every(), self.column_limit)
        ]
        return torch.cat(parts) / self.shape[0]

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense."""
        columns = self.whole.columns(index if self.columns_of is None else self.columns_of.index_select(0, index))
        return columns if self.rows_of is None else columns.index_select(0, self.rows_of)

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), in blocks of columns."""
        return gram_of_columns(self, scale)

    def rows(self, index: Tensor) -> FisherFactor:
        """Return the factor of some of these rows."""
        chosen = index if self.rows_of is None else self.rows_of.index_select(0, index)
        return SubFactor(self.whole, chosen, self.columns_of)

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, (m, p), dense; as many of them as there are."""
        return self.columns(self._every())[first:last]

    def _every(self) -> Tensor:
        """Return the indices of all columns, where the others are."""
        own = self.rows_of if self.columns_of is None else self.columns_of
        return torch.arange(self.shape[1], device="cpu" if own is None else own.device)


def of_columns(factor: FisherFactor, index: Tensor) -> FisherFactor:
    """Return the factor of some columns, copied where they are few enough."""
    few = len(index) <= factor.column_limit
    return DenseFactor(factor.columns(index)) if few else SubFactor(factor, columns_of=index)


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
    size = n if columns.device.type == "cuda" else max(_BLOCK_ROWS, -(-n // 10))
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
