"""G shared out over processes by its columns.

The columns are cut into ``PARTS`` parts of the same width, up to one column, and each rank holds the parts that it owns
as factors of their own. Products with w are sums over the parts, products with v and the diagonal are put together from
them; every rank gets the whole answer, with the same bits whatever the number of ranks. A solver that sees G through
:class:`~swap_prune.fisher.factor.FisherFactor` alone so runs on every rank alike, and takes the same decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from swap_prune.distributed import PARTS, Team
from swap_prune.fisher.factor import FisherFactor

__all__ = ["ShardedFactor", "column_parts", "owned_columns"]


def column_parts(p: int) -> list[tuple[int, int]]:
    """Return the first column of each part, and the first behind it; there are fewer parts where p is less."""
    parts = min(PARTS, p)
    return list(pairwise(p * part // parts for part in range(parts + 1)))


def owned_columns(p: int, team: Team, rank: int | None = None) -> list[tuple[int, int]]:
    """Return the first column, and the first behind it, of the parts of this rank, or of another one."""
    parts = column_parts(p)
    return [parts[part] for part in team.owned(len(parts), rank)]


@dataclass(frozen=True)
class ShardedFactor:
    """What one rank sees of G.

    Attributes:
        blocks: The parts that this rank owns, in order.
        size: (n, p) of all of G.
        team: The ranks.
        limit: Columns that may be copied at once.
        like: An empty tensor on the device, and in the dtype, of the products.
    """

    blocks: tuple[FisherFactor, ...]
    size: tuple[int, int]
    team: Team
    limit: int
    like: Tensor

    def __post_init__(self) -> None:
        widths = [b - a for a, b in self._places()]
        if [block.shape for block in self.blocks] != [(self.size[0], width) for width in widths]:
            raise ValueError(
                f"rank {self.team.rank} must hold parts of {self.size[0]} rows and {widths} columns, got "
                f"{[block.shape for block in self.blocks]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        return self.size

    @property
    def column_limit(self) -> int:
        """Columns that may be copied at once."""
        return self.limit

    @property
    def iterative(self) -> bool:
        """Never: a Gram matrix is one sum of small matrices."""
        return False

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,)."""
        own = [block.matvec(w[a:b]) for (a, b), block in zip(self._places(), self.blocks, strict=True)]
        return self._sum(own, self.size[:1])

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,)."""
        return self._joined([block.rmatvec(v) for block in self.blocks])

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries."""
        return self._joined([block.diagonal() for block in self.blocks])

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense, on every rank."""
        result = self.like.new_zeros(self.size[0], len(index))
        for (a, b), block in zip(self._places(), self.blocks, strict=True):
            here = ((index >= a) & (index < b)).nonzero().squeeze(1)
            result.index_copy_(1, here, block.columns(index[here] - a))
        return self.team.overlay(result)

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n)."""
        own = [block.gram(scale[a:b]) for (a, b), block in zip(self._places(), self.blocks, strict=True)]
        return self._sum(own, (self.size[0], self.size[0]))

    def rows(self, index: Tensor) -> FisherFactor:
        """Return the factor of some rows, shared out in the same way."""
        return replace(self, blocks=tuple(block.rows(index) for block in self.blocks), size=(len(index), self.size[1]))

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, (m, p), dense, on every rank; as many of them as there are."""
        last = min(last, self.size[0])
        result = self.like.new_zeros(last - first, self.size[1])
        for (a, b), block in zip(self._places(), self.blocks, strict=True):
            result[:, a:b] = block.row_span(first, last)
        return self.team.overlay(result)

    def _places(self) -> list[tuple[int, int]]:
        return owned_columns(self.size[1], self.team)

    def _sum(self, own: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        stacked = torch.stack(own) if own else self.like.new_zeros(0, *shape)
        return self.team.add_up(stacked, min(PARTS, self.size[1]))

    def _joined(self, own: list[Tensor]) -> Tensor:
        widths = [b - a for a, b in column_parts(self.size[1])]
        return self.team.concatenate(own, widths, self.like)
