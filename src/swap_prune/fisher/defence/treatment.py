"""What may be made of the gradients of one layer: of rows of G each, and of their mean for a slope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swap_prune.fisher.defence.rank import low_rank_rows
from swap_prune.fisher.defence.robust import column_scales, median_of_means, middle_mean, winsorised

__all__ = ["AS_THEY_ARE", "Average", "Treatment"]

_CHUNK_BYTES = 16 * 2**20  # of rows that are worked on together: what a cache holds
_GPU_CHUNK_BYTES = 256 * 2**20  # the same on a GPU, where small kernels are dear


@dataclass(frozen=True)
class Treatment:
    """What is made of each row of a layer.

    Attributes:
        winsorised: Whether entries that stand out are brought back.
        rank: Leading outer products that are kept, after that; None: all of them.
    """

    winsorised: bool = False
    rank: int | None = None

    def __str__(self) -> str:
        parts = ["winsorised"] * self.winsorised + [f"rank {self.rank}"] * (self.rank is not None)
        return ", ".join(parts) or "as they are"

    def of(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return what is made of rows (m, a b), each a matrix of a shape (a, b)."""
        return torch.cat([treated for _, treated in self.in_chunks(rows, shape)])

    def in_chunks(self, rows: Tensor, shape: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """Yield a few rows at a time: which, and what is made of them.

        They may be written back at once; the scales of columns are those before.
        """
        scales = column_scales(rows) if self.winsorised else None
        rank = None if self.rank is None or self.rank >= min(shape) else self.rank
        together = _CHUNK_BYTES if rows.device.type == "cpu" else _GPU_CHUNK_BYTES
        size = max(1, together // (4 * shape[0] * shape[1] * rows.element_size()))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            if scales is not None:
                part = winsorised(part, scales)
            if rank is not None:
                part = low_rank_rows(part.reshape(-1, *shape), rank).reshape(len(part), -1)
            yield slice(start, start + size), part


AS_THEY_ARE = Treatment()


@dataclass(frozen=True)
class Average:
    """How the mean of rows of a layer is taken.

    Attributes:
        treatment: What is made of each row before.
        kind: The plain mean, that of the middle, or the median of means.
        scale: What the mean is multiplied by: what leaves something out makes it smaller, noise makes it larger.
    """

    treatment: Treatment = AS_THEY_ARE
    kind: Literal["mean", "trimmed mean", "median of means"] = "mean"
    scale: float = 1.0

    def __str__(self) -> str:
        parts = [self.kind, str(self.treatment) if self.treatment != AS_THEY_ARE else ""]
        return ", ".join(filter(None, [*parts, "" if self.scale == 1 else f"times {self.scale:.2g}"]))

    def of(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the mean of rows (n, a b), (a b,), each a matrix of a shape (a, b)."""
        mean = self._unscaled(rows, shape)
        return mean if self.scale == 1 else mean.mul_(self.scale)

    def _unscaled(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        if self.kind != "mean":
            treated = rows if self.treatment == AS_THEY_ARE else self.treatment.of(rows, shape)
            return middle_mean(treated) if self.kind == "trimmed mean" else median_of_means(treated)
        if self.treatment == AS_THEY_ARE:
            return rows.mean(0)
        total = torch.zeros_like(rows[0])
        for _, treated in self.treatment.in_chunks(rows, shape):
            total += treated.sum(0)
        return total / len(rows)
