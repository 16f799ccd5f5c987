"""A kernel for GPUs, in Triton, which torch brings along where it is built for CUDA.

Torch takes three passes over memory to cut columns out of G, weigh them, and say what rounding lost; this takes one.
Import it where there is Triton alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cut_and_weigh"]

_COLUMNS, _ROWS = 256, 4  # of one program


def cut_and_weigh(stored: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut columns C out of a matrix, and write ``C diag(weights)`` as ``high - low``.

    Args:
        stored: (n, p), bfloat16 or float16, rows without gaps.
        index: (m,), int64.
        weights: (m,), float32.

    Returns:
        C, high and low, (n, m) each, of the matrix's dtype: low is what rounding added to high.
    """
    n, m = len(stored), len(index)
    part, high, low = (stored.new_empty(n, m) for _ in range(3))
    with torch.cuda.device(stored.device):
        _cut_and_weigh[triton.cdiv(m, _COLUMNS), triton.cdiv(n, _ROWS)](
            stored, index, weights, part, high, low, stored.stride(0), n, m, COLUMNS=_COLUMNS, ROWS=_ROWS
        )
    return part, high, low


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _cut_and_weigh(  # type: ignore[no-untyped-def]
    stored, index, weights, part, high, low, stride, n, m, COLUMNS: tl.constexpr, ROWS: tl.constexpr
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
    target = row * m + column[None, :]
    tl.store(part + target, x, mask=inside)
    tl.store(high + target, rounded, mask=inside)
    tl.store(low + target, lost.to(x.dtype), mask=inside)
