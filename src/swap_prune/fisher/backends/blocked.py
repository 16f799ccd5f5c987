"""Products with a G that is only ever seen in blocks.

What half precision and a file have in common: neither can be handed to a product as it is. A block of rows and columns
is brought to the working precision, used, and dropped, so that what is held beside the storage is one block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor, SubFactor, add_squares_, gram_of_columns

__all__ = ["BLOCK_BYTES", "BlockedFactor", "block_bytes", "column_limit"]

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
