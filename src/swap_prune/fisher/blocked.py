"""Products with a G that is only ever seen in blocks, and with a part of any G.

What half precision and a file have in common: neither can be handed to a product as it is. A block of rows and columns
is brought to the working precision, used, and dropped, so that what is held beside the storage is one block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.factor import DenseFactor, FisherFactor, add_squares_, gram_of_columns

__all__ = ["BLOCK_BYTES", "BlockedFactor", "SubFactor", "block_bytes", "column_limit", "of_columns"]

BLOCK_BYTES = 16 * 2**20  # of one block in working precision
_GPU_BLOCK_BYTES = 256 * 2**20  # the same there, where small kernels are dear


def block_bytes(device: torch.device) -> int:
    """Return the bytes of a block in working precision."""
    return _GPU_BLOCK_BYTES if device.type == "cuda" else BLOCK_BYTES


def column_limit(n: int, itemsize: int, device: torch.device) -> int:
    """Return how many columns of n rows make a block."""
    return max(1, block_bytes(device) // (n * itemsize))


class BlockedFactor(ABC):
    """A Fisher factor (n, p) that yields its blocks."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(n, p)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of the products."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and ``G[rows, columns]`` in working precision, until all of G was seen once."""

    @abstractmethod
    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense."""

    @property
    def column_limit(self) -> int:
        """Columns that make one block."""
        return column_limit(self.shape[0], self.dtype.itemsize, self.device)

    @property
    def iterative(self) -> bool:
        """Never: a Gram matrix reads G once."""
        return False

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,)."""
        result = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for rows, columns, part in self.blocks():
            result[rows].addmv_(part, w[columns])
        return result

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,)."""
        result = torch.zeros(self.shape[1], dtype=self.dtype, device=self.device)
        for rows, columns, part in self.blocks():
            result[columns].addmv_(part.T, v[rows])
        return result

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries."""
        sums = torch.zeros(self.shape[1], dtype=self.dtype, device=self.device)
        for _, columns, part in self.blocks():
            add_squares_(sums[columns], part)
        return sums.div_(self.shape[0])

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), in blocks of columns."""
        return gram_of_columns(self, scale)

    def rows(self, index: Tensor) -> FisherFactor:
        """Return the factor of some rows, without a copy."""
        return SubFactor(self, index)

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, (m, p), dense; as many of them as there are."""
        n, p = self.shape
        last = min(last, n)
        result = torch.empty(last - first, p, dtype=self.dtype, device=self.device)
        for rows, columns, part in self.blocks():
            start, stop = max(rows.start, first), min(rows.stop, last)
            if start < stop:
                result[start - first : stop - first, columns] = part[start - rows.start : stop - rows.start]
            elif rows.start >= last:
                break
        return result


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
