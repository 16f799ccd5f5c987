r"""G in 16 bits an entry, with products in the precision that it was captured in.

A block of columns is converted, used and dropped: there is never a float32 copy of G. Products accumulate in working
precision, so that what is lost is the rounding of the entries alone: relative 2^-9 in bfloat16, 2^-12 in float16.
float16 has few exponents. Each of its rows is stored over a power of two, exact to divide by, that brings its largest
entry to [2^14, 2^15): entries keep full precision down to 2^-29 of it, and what is below 2^-40 of it becomes zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.blocked import BlockedFactor

__all__ = ["HalfFactor", "row_scales"]

_TOP = 15  # the largest entry of a row lies below two to this power
_LEAST = -100  # exponent of a scale: its reciprocal is a normal number


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
        """Yield all rows of some columns."""
        n, p = self.shape
        for start in range(0, p, self.column_limit):
            columns = slice(start, min(start + self.column_limit, p))
            yield slice(0, n), columns, self._converted(self.stored[:, columns])

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense."""
        return self._converted(self.stored.index_select(1, index))

    def _converted(self, part: Tensor) -> Tensor:
        result = part.to(self.dtype)
        return result if part.dtype == torch.bfloat16 else result.mul_(self.scale.unsqueeze(1))


def row_scales(rows: Tensor) -> Tensor:
    """Return the power of two (n,) that each row (n, p) is divided by before it is rounded to float16."""
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    exponent = torch.frexp(largest).exponent - _TOP
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=_LEAST))
    return torch.where(largest > 0, scale, torch.ones_like(scale))
