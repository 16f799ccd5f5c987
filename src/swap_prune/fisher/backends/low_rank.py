"""A Fisher factor that keeps the leading outer products of each row, layer by layer, and never the rows.

The gradient of sample i with respect to a layer's weight, as a matrix (out, d) for each group, is replaced by its best
approximation of rank r::

    g_i[layer] = sum_r u_ir v_ir^T,        u_ir (out,), v_ir (d,)

which is the row itself for a Linear layer that sees one token a sample, and ``r (out + d)`` numbers instead of
``out d``. Every product with G follows from the factors:

    G w = sum_r u_ir^T W v_ir,             G^T v = sum_ir v_i u_ir v_ir^T,
    sum_i G_ij^2 = sum_i sum_rs (u_ir u_is)(v_ir v_is)^T      (products by entries)

``G diag(scale) G^T`` has no such form for a general scale. It is put together from blocks of columns, or from the
inner products of the factors where the scale is the same all over a layer.

Place in the pipeline: in the place of :class:`~swap_prune.fisher.factor.DenseFactor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from swap_prune.fisher.backends.blocked import column_limit
from swap_prune.fisher.factor import add_gram_, add_squares_, mirror_lower_

__all__ = ["LowRankFactor", "OuterRows", "PlainRows"]

_BLOCK_BYTES = 32 * 2**20  # temporary results of a product


@dataclass(frozen=True)
class PlainRows:
    """The columns of G of one layer, as they are.

    Attributes:
        matrix: (n, p of the layer).
    """

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p of the layer)."""
        n, p = self.matrix.shape
        return n, p

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return (self.matrix,)

    def matvec(self, w: Tensor) -> Tensor:
        """Return the product with w (p,), (n,)."""
        return self.matrix @ w

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return the product of the transpose with v (n,), (p,)."""
        return self.matrix.T @ v

    def squares(self) -> Tensor:
        """Return the sums of squares over the rows, (p,)."""
        return add_squares_(torch.zeros_like(self.matrix[0]), self.matrix)

    def columns(self, index: Tensor) -> Tensor:
        """Return some columns, (n, len(index))."""
        return self.matrix.index_select(1, index)

    def inner_products(self) -> Tensor:
        """Return the rows' inner products, (n, n)."""
        return self.matrix @ self.matrix.T

    def rows(self, index: Tensor) -> PlainRows:
        """Return some rows."""
        return PlainRows(self.matrix.index_select(0, index))


@dataclass(frozen=True)
class OuterRows:
    """The columns of G of one layer as sums of outer products.

    Attributes:
        left: u, (groups, n, rank, out / groups).
        right: v, (groups, n, rank, d), d in the order of the weight.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 4 or self.right.ndim != 4 or self.left.shape[:3] != self.right.shape[:3]:
            raise ValueError(
                "left and right must have shapes (groups, n, rank, out) and (groups, n, rank, d), got "
                f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p of the layer)."""
        groups, n, _, out = self.left.shape
        return n, groups * out * self.right.shape[3]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.left, self.right

    def matvec(self, w: Tensor) -> Tensor:
        """Return the product with w (p,), (n,)."""
        weight = w.view(len(self.left), self.left.shape[3], self.right.shape[3])
        thin, wide = self.left, self.right
        if thin.shape[3] > wide.shape[3]:
            thin, wide, weight = wide, thin, weight.mT
        parts = [
            ((wide[:, rows].flatten(1, 2) @ weight.mT) * thin[:, rows].flatten(1, 2)).sum((0, 2))
            for rows in self._blocks(thin[:, :1].numel())
        ]
        return torch.cat(parts).view(self.shape[0], -1).sum(1)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return the product of the transpose with v (n,), (p,)."""
        weighted = self.left * v.view(1, -1, 1, 1)
        return (weighted.flatten(1, 2).mT @ self.right.flatten(1, 2)).flatten()

    def squares(self) -> Tensor:
        """Return the sums of squares over the rows, (p,)."""
        rank = self.left.shape[2]
        pairs = torch.triu_indices(rank, rank, device=self.left.device)
        twice = 1 + (pairs[0] != pairs[1]).to(self.left.dtype)
        total = self.left.new_zeros(len(self.left), self.left.shape[3], self.right.shape[3])
        numbers = pairs.shape[1] * (self.left[:, :1, 0].numel() + self.right[:, :1, 0].numel())
        for rows in self._blocks(numbers):
            left, right = self.left[:, rows], self.right[:, rows]
            u = left[:, :, pairs[0]] * left[:, :, pairs[1]] * twice.view(-1, 1)
            v = right[:, :, pairs[0]] * right[:, :, pairs[1]]
            total += u.flatten(1, 2).mT @ v.flatten(1, 2)
        return total.flatten().clamp(min=0)

    def columns(self, index: Tensor) -> Tensor:
        """Return some columns, (n, len(index))."""
        out, d = self.left.shape[3], self.right.shape[3]
        group, row, column = index // (out * d), index // d % out, index % d
        result = self.left.new_zeros(self.shape[0], len(index))
        for part in range(len(self.left)):
            here = slice(None) if len(self.left) == 1 else (group == part).nonzero().squeeze(1)
            for r in range(self.left.shape[2]):
                u = self.left[part, :, r].index_select(1, row[here])
                result[:, here] += u.mul_(self.right[part, :, r].index_select(1, column[here]))
        return result

    def inner_products(self) -> Tensor:
        """Return the rows' inner products, (n, n)."""
        n, rank = self.left.shape[1:3]
        total = self.left.new_zeros(n, n)
        for left, right in zip(self.left, self.right, strict=True):
            u, v = left.flatten(0, 1), right.flatten(0, 1)
            size = max(1, _BLOCK_BYTES // (2 * rank * rank * n * self.left.element_size()))
            for start in range(0, n, size):
                some = slice(start * rank, (start + size) * rank)
                product = (u[some] @ u.T).mul_(v[some] @ v.T)
                total[start : start + size] += product.view(-1, rank, n, rank).sum((1, 3))
        return total

    def rows(self, index: Tensor) -> OuterRows:
        """Return some rows."""
        return OuterRows(self.left.index_select(1, index), self.right.index_select(1, index))

    def _blocks(self, numbers: int) -> Iterator[slice]:
        """Yield ranges of samples that make so many temporary numbers each."""
        size = max(1, _BLOCK_BYTES // (numbers * self.left.element_size()))
        for start in range(0, self.shape[0], size):
            yield slice(start, start + size)


@dataclass(frozen=True)
class LowRankFactor:
    """G with low-rank rows, as a :class:`~swap_prune.fisher.factor.FisherFactor`.

    Attributes:
        layers: Parameter name to the columns of G of that parameter, in the order of the selection.
    """

    layers: Mapping[str, OuterRows | PlainRows]

    def __post_init__(self) -> None:
        counts = {layer.shape[0] for layer in self.layers.values()}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"layers must be at least one, of n >= 1 rows each, got row counts {sorted(counts)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        shapes = [layer.shape for layer in self.layers.values()]
        return shapes[0][0], sum(p for _, p in shapes)

    @property
    def nbytes(self) -> int:
        """Bytes held; dense rows would be ``n p`` numbers."""
        return sum(t.numel() * t.element_size() for layer in self.layers.values() for t in layer.tensors)

    @property
    def column_limit(self) -> int:
        """Columns that make one block."""
        return column_limit(self.shape[0], self._first.element_size(), self._first.device)

    @property
    def iterative(self) -> bool:
        """Never: a Gram matrix puts every column together once."""
        return False

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,)."""
        return torch.stack([layer.matvec(w[a:b]) for a, b, layer in self._placed()]).sum(0)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,)."""
        return torch.cat([layer.rmatvec(v) for layer in self.layers.values()])

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries."""
        return torch.cat([layer.squares() for layer in self.layers.values()]) / self.shape[0]

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index))."""
        result = self._first.new_empty(self.shape[0], len(index))
        for a, b, layer in self._placed():
            here = ((index >= a) & (index < b)).nonzero().squeeze(1)
            if len(here) > 0:
                result[:, here] = layer.columns(index[here] - a)
        return result

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), in blocks of columns; columns of scale zero cost nothing."""
        n = self.shape[0]
        result = scale.new_zeros(n, n)
        block = max(1, _BLOCK_BYTES // (n * scale.element_size()))
        for a, b, layer in self._placed():
            part = scale[a:b]
            if bool((part == part[0]).all()):
                if bool(part[0] != 0):
                    result += part[0] * layer.inner_products()
                continue
            for index in part.nonzero().squeeze(1).split(block):  # type: ignore[no-untyped-call]
                add_gram_(result, layer.columns(index), part[index])
        return mirror_lower_(result)

    def rows(self, index: Tensor) -> LowRankFactor:
        """Return the factor of some rows."""
        return LowRankFactor({name: layer.rows(index) for name, layer in self.layers.items()})

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, (m, p), dense; as many of them as there are."""
        n, p = self.shape
        span = torch.arange(first, min(last, n), device=self._first.device)
        return self.rows(span).columns(torch.arange(p, device=span.device))

    @property
    def _first(self) -> Tensor:
        return next(iter(self.layers.values())).tensors[0]

    def _placed(self) -> Iterator[tuple[int, int, OuterRows | PlainRows]]:
        """Yield each layer with the first of its columns and the first behind them."""
        ends = [0]
        for layer in self.layers.values():
            ends.append(ends[-1] + layer.shape[1])
        for (a, b), layer in zip(pairwise(ends), self.layers.values(), strict=True):
            yield a, b, layer
