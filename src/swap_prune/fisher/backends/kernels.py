"""Kernels for GPUs, in Triton, which torch brings along where it is built for CUDA.

Torch takes three passes over memory to cut columns out of G, weigh them, and say what rounding lost, and nine to write
a vector as a sum of three in 16 bits; these take one. Import it where there is Triton alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cut", "cut_and_weigh", "split_in_pieces"]

_COLUMNS, _ROWS = 256, 4  # of one program
_ENTRIES = 1024  # the same, of a vector


def cut(stored: Tensor, index: Tensor) -> Tensor:
    """Cut columns out of a matrix, (n, m).

    Args:
        stored: (n, p), bfloat16 or float16, the entries of a row side by side.
        index: (m,), int64, without gaps.
    """
    n, m = len(stored), len(index)
    part = stored.new_empty(n, m)
    with torch.cuda.device(stored.device):
        _cut[triton.cdiv(m, _COLUMNS), triton.cdiv(n, _ROWS)](
            stored, index, part, stored.stride(0), n, m, COLUMNS=_COLUMNS, ROWS=_ROWS
        )
    return part


def cut_and_weigh(stored: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cut columns C out of a matrix, and write ``C diag(weights)`` as ``high - low``.

    Args:
        stored: As for :func:`cut`.
        index: The same.
        weights: (m,), float32, without gaps.

    Returns:
        C, (n, m), and both of these, (2 n, m), of the matrix's dtype: low is what rounding added to high. First come
        those of the first n // 2 rows, high before low, then those of the others.
    """
    n, m = len(stored), len(index)
    part, both = stored.new_empty(n, m), stored.new_empty(2 * n, m)
    with torch.cuda.device(stored.device):
        _cut_and_weigh[triton.cdiv(m, _COLUMNS), triton.cdiv(n, _ROWS)](
            stored, index, weights, part, both, stored.stride(0), n, m, COLUMNS=_COLUMNS, ROWS=_ROWS
        )
    return part, both


def split_in_pieces(x: Tensor, pieces: Tensor) -> None:
    """Write a vector as a sum of three of 16 bits: what is left of it after one is rounded to the next.

    Args:
        x: (m,), float32, without gaps.
        pieces: (4, m), bfloat16 or float16, without gaps: overwritten, the last with zeros.
    """
    with torch.cuda.device(x.device):
        _split_in_pieces[triton.cdiv(len(x), _ENTRIES),](x, pieces, len(x), ENTRIES=_ENTRIES)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cut(stored, index, part, stride, n, m, COLUMNS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    there = column < m
    source = tl.load(index + column, mask=there, other=0)[None, :]
    inside = (row < n) & there[None, :]
    x = tl.load(stored + row * stride + source, mask=inside, other=0.0)
    tl.store(part + row * m + column[None, :], x, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cut_and_weigh(  # type: ignore[no-untyped-def]
    stored, index, weights, part, both, stride, n, m, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    there = column < m
    source = tl.load(index + column, mask=there, other=0)[None, :]
    weight = tl.load(weights + column, mask=there, other=0.0)[None, :]
    inside = (row < n) & there[None, :]
    x = tl.load(stored + row * stride + source, mask=inside, other=0.0)
    rounded = (x.to(tl.float32) * weight).to(x.dtype)
    lost = tl.fma(x.to(tl.float32), -weight, rounded.to(tl.float32))
    half = n // 2
    high, low = tl.where(row < half, row, half + row), tl.where(row < half, half + row, n + row)
    tl.store(part + row * m + column[None, :], x, mask=inside)
    tl.store(both + high * m + column[None, :], rounded, mask=inside)
    tl.store(both + low * m + column[None, :], lost.to(x.dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _split_in_pieces(x, pieces, m, ENTRIES: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < m
    rest = tl.load(x + entry, mask=there, other=0.0)
    for _ in tl.static_range(3):
        piece = rest.to(pieces.dtype.element_ty)
        tl.store(pieces + entry, piece, mask=there)
        rest -= piece.to(tl.float32)
        pieces += m  # a row further: three times m may be above 2^31
    tl.store(pieces + entry, tl.zeros_like(rest).to(pieces.dtype.element_ty), mask=there)
