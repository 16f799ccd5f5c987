"""What capture writes rows of G to.

Place in the pipeline: beneath capture; :mod:`~swap_prune.fisher.capture.stores` has those that hold all of G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor
from swap_prune.selection import Selection

__all__ = ["RowBuffer", "RowSink", "RowStore", "RowStream", "check_rows"]

_LONGEST = 0.01  # row, of the root of the largest number: the squares of ten thousand can be added up


class RowSink(Protocol):
    """What capture asks of whoever takes rows."""

    def room(self, count: int) -> Tensor:
        """Return at least ``count`` rows (m, p) to write to."""
        ...

    def keep(self, count: int) -> None:
        """Take the first ``count`` of them over."""
        ...


class RowStore(RowSink, Protocol):
    """One that holds them."""

    def finish(self) -> FisherFactor:
        """Return the factor of all rows that were kept.

        Raises:
            ValueError: If an entry is not finite.
        """
        ...


class RowBuffer:
    """Base class of what takes rows over from a buffer."""

    def __init__(self, selection: Selection, dtype: torch.dtype, device: torch.device) -> None:
        self._selection = selection
        self._buffer = torch.empty(0, selection.total, dtype=dtype, device=device)

    def room(self, count: int) -> Tensor:
        """Return the buffer."""
        if len(self._buffer) < count:
            size, kind = (count, self._buffer.shape[1]), self._buffer
            self._buffer = torch.empty(0, device="cpu")
            self._buffer = torch.empty(size, dtype=kind.dtype, device=kind.device)
        return self._buffer

    def keep(self, count: int) -> None:
        """Check the rows, and take them over."""
        rows = self._buffer[:count]
        check_rows(rows, self._selection)
        self.take(rows)

    def take(self, rows: Tensor) -> None:
        """Take rows (m, p) over; they may be overwritten."""
        raise NotImplementedError


class RowStream(RowBuffer):
    """Rows that are looked at as they come, and not held.

    Args:
        selection: The p weights.
        dtype: Of the rows.
        device: Of the rows.
        see: Called with rows (m, p), which it may overwrite and must not keep.
    """

    def __init__(
        self, selection: Selection, dtype: torch.dtype, device: torch.device, see: Callable[[Tensor], object]
    ) -> None:
        super().__init__(selection, dtype, device)
        self._see = see

    def take(self, rows: Tensor) -> None:
        """Show them."""
        self._see(rows)


def check_rows(rows: Tensor, selection: Selection) -> None:
    """Check that gradients (n, p) are numbers whose squares can be added up.

    Raises:
        ValueError: If one is not.
    """
    sizes = torch.linalg.vector_norm(rows, dim=1)
    most = _LONGEST * torch.finfo(rows.dtype).max ** 0.5
    if bool((sizes <= most).all()):
        return
    bad = int((~(sizes <= most)).sum())
    infinite = int((~torch.isfinite(rows).all(1)).sum())
    layers = [name for name, s in selection.slices().items() if not bool(torch.isfinite(rows[:, s]).all())]
    if not layers:
        raise ValueError(
            f"the gradient is longer than {most:.1e} on {bad} of {len(rows)} samples, too long to be squared; divide "
            "the loss by a constant"
        )
    raise ValueError(
        f"the gradient is not finite on {infinite} of {len(rows)} samples (first in {layers[0]!r}); check the loss "
        "and the data"
    )
