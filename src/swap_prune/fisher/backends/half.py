r"""G in 16 bits an entry, with products in the precision that it was captured in.

A block of columns is converted, used and dropped: there is never a float32 copy of G. Products accumulate in working
precision, so that what is lost is the rounding of the entries alone: relative 2^-8 in bfloat16, 2^-11 in float16.
float16 has few exponents. Each of its rows is stored over a power of two, exact to divide by, that brings its largest
entry to [2^14, 2^15): entries keep full precision down to 2^-28 of it, and what is below 2^-40 of it becomes zero.

On a GPU a product with a vector converts nothing: the vector is the sum of three of 16 bits (eight digits each in
bfloat16), and matrix units multiply them by G as it is stored, in float32. It then reads G once, in 16 bits. A Gram
matrix is made of two such pieces of its left factor; of its four quarters three are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from swap_prune.fisher.backends.blocked import BlockedFactor
from swap_prune.process_memory import pass_on_shortage

__all__ = ["ALIGNED", "HalfFactor", "cut_and_weigh", "row_scales", "wide_product"]

_TOP = 15  # the largest entry of a row lies below two to this power
_LEAST = -100  # exponent of a scale: its reciprocal is a normal number
_LEAST_UNIT = -126  # the same of what a vector is divided by
_PIECES = 3  # of 16 bits, that make a float32
_WIDTH = 4  # vectors that matrix units multiply at once
_SLICE = 2**22  # columns of one product
ALIGNED = 64  # entries: where a row should begin, for matrix units to read it fast


@dataclass(frozen=True)
class HalfFactor(BlockedFactor):
    """G as ``diag(scale) stored``.

    Attributes:
        stored: (n, p), bfloat16 or float16.
        scale: (n,), powers of two in the dtype of the products.
    """

    stored: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.stored.ndim != 2 or 0 in self.stored.shape or self.scale.shape != self.stored.shape[:1]:
            raise ValueError(
                "G must have shape (n, p) with n, p >= 1 and a scale (n,), "
                f"got {tuple(self.stored.shape)} and {tuple(self.scale.shape)}"
            )
        if self.stored.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"G must be stored in bfloat16 or float16, got {self.stored.dtype}")

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype) -> HalfFactor:
        """Round G (n, p) to a dtype."""
        scale = row_scales(matrix) if dtype == torch.float16 else torch.ones_like(matrix[:, 0])
        return cls((matrix / scale.unsqueeze(1)).to(dtype), scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        n, p = self.stored.shape
        return n, p

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Of the products."""
        return self.stored.device

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield all rows of some columns; each block lies where the one before it lay."""
        n, p = self.shape
        width = min(self.column_limit, p)
        place = self.scale.new_empty(n * width)
        for start in range(0, p, width):
            columns = slice(start, min(start + width, p))
            part = place[: n * (columns.stop - start)].view(n, -1).copy_(self.stored[:, columns])
            yield slice(0, n), columns, self._scaled(part)

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,)."""
        if not self._by_matrix_units:
            return super().matvec(w)
        pieces, unit = in_pieces(w, self.stored.dtype)
        total = torch.zeros_like(self.scale)
        for columns in self._slices():
            total += wide_product(pieces[:, columns], self.stored[:, columns].T).sum(0)
        return total.mul_(self.scale).mul_(unit)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,)."""
        if not self._by_matrix_units:
            return super().rmatvec(v)
        pieces, unit = in_pieces(v * self.scale, self.stored.dtype)
        result = self.scale.new_empty(self.shape[1])
        for columns in self._slices():
            result[columns] = wide_product(pieces, self.stored[:, columns]).sum(0)
        return result.mul_(unit)

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries."""
        if not self._by_matrix_units or self.stored.dtype != torch.bfloat16:
            return super().diagonal()
        norms: Tensor = torch.linalg.vector_norm(self.stored, dim=0, dtype=self.dtype)
        return norms.square_().div_(self.shape[0])

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), in blocks of columns."""
        if not self._by_matrix_units:
            return super().gram(scale)
        n, unit = self.shape[0], 2.0**_TOP * power_of_two(scale) if self.stored.dtype == torch.float16 else 1.0
        half = n // 2
        above, below = self.scale.new_zeros(2 * half, half), self.scale.new_zeros(2 * (n - half), n)
        for index in torch.split(scale.nonzero().squeeze(1), self.column_limit):
            more = (0, -len(index) % ALIGNED)  # columns of weight zero
            weights = functional.pad(scale[index] / unit, more)
            part, both = self._operations.cut_and_weigh(self.stored, functional.pad(index, more), weights)
            if half > 0:
                above += wide_product(both[: 2 * half], part[:half].T)
            below += wide_product(both[2 * half :], part.T)
        result = self.scale.new_empty(n, n)
        result[:half, :half] = above[:half] - above[half:]
        result[half:] = below[: n - half] - below[n - half :]
        result[:half, half:] = result[half:, :half].T
        return result.mul_(self.scale).mul_(self.scale.unsqueeze(1)).mul_(unit)

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense."""
        return self._converted(self._operations.cut(self.stored, index))

    def exact_columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]`` in any dtype that holds it: as it is stored, where matrix units multiply that."""
        as_stored = self._by_matrix_units and self.stored.dtype == torch.bfloat16  # its scale is one
        return self._operations.cut(self.stored, index) if as_stored else self.columns(index)

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, (m, p), dense; as many of them as there are."""
        span = replace(self, stored=self.stored[first:last], scale=self.scale[first:last])
        return span._converted(span.stored)

    def _slices(self) -> Iterator[slice]:
        """Yield slices of columns whose products are looked at together."""
        for start in range(0, self.shape[1], _SLICE):
            yield slice(start, min(start + _SLICE, self.shape[1]))

    @property
    def _by_matrix_units(self) -> bool:
        return self.dtype == torch.float32 and _has_matrix_units(self.stored.device)

    @property
    def _operations(self) -> _Operations:
        return _operations(self.stored.device, self.stored.dtype)

    def _converted(self, part: Tensor) -> Tensor:
        return self._scaled(part.to(self.dtype))

    def _scaled(self, part: Tensor) -> Tensor:
        return part if self.stored.dtype == torch.bfloat16 else part.mul_(self.scale.unsqueeze(1))


class _Operations(NamedTuple):
    """What is done to entries of 16 bits beside products.

    Attributes:
        cut: Columns of a matrix (n, p), for indices (m,): (n, m).
        cut_and_weigh: See :func:`cut_and_weigh`.
        split_in_pieces: See :func:`split_in_pieces`.
    """

    cut: Callable[[Tensor, Tensor], Tensor]
    cut_and_weigh: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    split_in_pieces: Callable[[Tensor, Tensor], None]


def cut_and_weigh(stored: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Do what :func:`swap_prune.fisher.backends.kernels.cut_and_weigh` does, with torch's own operations."""
    part = stored.index_select(1, index)
    half, both = len(part) // 2, part.new_empty(2 * len(part), len(index))
    for rows, place in ((part[:half], both[: 2 * half]), (part[half:], both[2 * half :])):
        high, low = place.tensor_split(2)
        torch.mul(rows, weights, out=high)  # computed in float32, and rounded as it is written
        torch.addcmul(high, rows, weights, value=-1, out=low)
    return part, both


def split_in_pieces(x: Tensor, pieces: Tensor) -> None:
    """Do what :func:`swap_prune.fisher.backends.kernels.split_in_pieces` does, with torch's own operations."""
    rest = x.clone()
    for piece in pieces[:_PIECES]:
        piece.copy_(rest)
        rest -= piece
    pieces[_PIECES:] = 0


_TORCH = _Operations(lambda stored, index: stored.index_select(1, index), cut_and_weigh, split_in_pieces)


def _has_matrix_units(device: torch.device) -> bool:
    """Whether 16 bits are multiplied there, and summed in float32, without a copy."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    known = hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8
    return known and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _operations(device: torch.device, dtype: torch.dtype) -> _Operations:
    """Return kernels where there are matrix units, Triton and a C compiler for it; elsewhere torch's operations."""
    if not _has_matrix_units(device):
        return _TORCH
    try:
        from swap_prune.fisher.backends import kernels

        found = _Operations(kernels.cut, kernels.cut_and_weigh, kernels.split_in_pieces)
        works = _is_right(found, device, dtype)
    except Exception as error:  # whatever a compiler raises
        pass_on_shortage(error)
        return _TORCH
    return found if works else _TORCH


def _is_right(operations: _Operations, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether columns are what they were, and the pieces that operations make sum up to what they are made of."""
    index = torch.arange(ALIGNED, device=device)
    stored, weights = (index / 3 - 5).to(dtype).expand(3, -1).contiguous(), index / 7
    part, both = operations.cut_and_weigh(stored, index, weights)
    first, lost_of_first, others, lost_of_others = torch.split(both.double(), [1, 1, 2, 2])
    sums = torch.cat([first - lost_of_first, others - lost_of_others])
    pieces = stored.new_empty(_WIDTH, ALIGNED)
    operations.split_in_pieces(weights, pieces)
    return (
        torch.equal(operations.cut(stored, index.flip(0)), stored.flip(1))
        and torch.equal(part, stored)
        and torch.allclose(sums, stored.double() * weights.double(), rtol=2**-15, atol=0)
        and torch.allclose(pieces.double().sum(0), weights.double(), rtol=2**-22, atol=0)
    )


def row_scales(rows: Tensor) -> Tensor:
    """Return the power of two (n,) that each row (n, p) is divided by before it is rounded to float16."""
    largest = torch.maximum(rows.amax(1), -rows.amin(1))  # torch's infinity norm is far slower on a CPU
    exponent = torch.frexp(largest).exponent - _TOP
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=_LEAST)).to(largest)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def in_pieces(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return a float32 vector as a sum of vectors of 16 bits.

    Args:
        x: (m,).
        dtype: bfloat16 or float16.

    Returns:
        Pieces, (4, m), of which three hold something; and the power of two that their sum is to be multiplied by.
    """
    unit = power_of_two(x) if dtype == torch.float16 else 1.0
    pieces = x.new_empty(_WIDTH, len(x), dtype=dtype)
    _operations(x.device, dtype).split_in_pieces((x / unit if unit != 1 else x).contiguous(), pieces)
    return pieces, unit


def power_of_two(x: Tensor) -> float:
    """Return a power of two that brings the largest entry of a vector to [2^14, 2^15), which float16 can hold."""
    largest = float(torch.linalg.vector_norm(x, ord=torch.inf))
    return 2.0 ** max(math.frexp(largest)[1] - _TOP, _LEAST_UNIT) if 0 < largest < math.inf else 1.0


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices of 16 bits, summed and returned in float32."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
