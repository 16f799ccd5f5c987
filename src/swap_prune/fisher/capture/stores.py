"""Where the rows of G go as they are captured.

Capture asks a store for room, writes gradients to it, and hands them over. The dense store gives room in G itself;
the others lend a buffer of a few rows and round it, write it to a file, or send its columns to other processes. Two
storages hold no rows and have no store: low-rank (:mod:`~swap_prune.fisher.capture.low_rank`) and matrix-free
(:mod:`~swap_prune.fisher.capture.matrix_free`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from swap_prune.fisher.backends.blocked import column_limit
from swap_prune.fisher.backends.half import ALIGNED, HalfFactor, row_scales
from swap_prune.fisher.backends.mapped import MappedWriter
from swap_prune.fisher.capture.row_buffer import RowBuffer, RowStore, check_rows
from swap_prune.fisher.capture.shared_rows import SharedStore
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.fisher.storage import Storage
from swap_prune.process_memory import is_out_of_memory
from swap_prune.selection import Selection

__all__ = ["DenseStore", "HalfStore", "MappedStore", "open_store"]

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def open_store(storage: Storage, n: int, selection: Selection, dtype: torch.dtype, device: torch.device) -> RowStore:
    """Make a store for at most n rows.

    Args:
        storage: How G is held.
        n: Rows at the most.
        selection: Where the p columns lie.
        dtype: Of the gradients.
        device: Where they are taken.

    Raises:
        ValueError: If the storage holds no rows, or the disk has no room for them.
        MemoryError: If the memory has none.
    """
    if not storage.holds_rows:
        raise ValueError(f"storage {storage.kind!r} holds no rows of G; use one that does, such as 'float32'")
    if storage.kind == "float32":
        limit = column_limit(n, dtype.itemsize, device) if storage.lean else None
        return DenseStore(n, selection, dtype, device, limit)
    if storage.kind in _HALVES:
        return HalfStore(n, selection, dtype, device, _HALVES[storage.kind])
    if storage.kind == "sharded":
        assert storage.team is not None, "the pipeline gives it one"
        return SharedStore(n, selection, dtype, device, storage.team)
    assert storage.scratch is not None, "checked when it was made"
    return MappedStore(selection, dtype, device, MappedWriter(storage.scratch, n, selection.total, dtype))


class DenseStore:
    """Rows written to G itself, in the memory where it stays."""

    def __init__(
        self, n: int, selection: Selection, dtype: torch.dtype, device: torch.device, limit: int | None = None
    ) -> None:
        self._rows = _allocate(n, selection, dtype, device)
        self._selection, self._limit, self._filled = selection, limit, 0

    def room(self, count: int) -> Tensor:
        """Return all rows that are still free."""
        return self._rows[self._filled :]

    def keep(self, count: int) -> None:
        """Count them."""
        self._filled += count

    def finish(self) -> FisherFactor:
        """Return the factor."""
        rows = self._rows[: self._filled]
        check_rows(rows, self._selection)
        return DenseFactor(rows, self._limit)


class HalfStore(RowBuffer):
    """Rows rounded to 16 bits."""

    def __init__(
        self, n: int, selection: Selection, dtype: torch.dtype, device: torch.device, half: torch.dtype
    ) -> None:
        super().__init__(selection, dtype, device)
        self._stored = _allocate(n, selection, half, device, ALIGNED if device.type == "cuda" else 1)
        self._scale = torch.ones(n, dtype=dtype, device=device)
        self._filled = 0

    def take(self, rows: Tensor) -> None:
        """Round them."""
        place = slice(self._filled, self._filled + len(rows))
        if self._stored.dtype == torch.float16:
            self._scale[place] = row_scales(rows)
            rows.div_(self._scale[place].unsqueeze(1))
        self._stored[place] = rows
        self._filled += len(rows)

    def finish(self) -> FisherFactor:
        """Return the factor."""
        return HalfFactor(self._stored[: self._filled], self._scale[: self._filled])


class MappedStore(RowBuffer):
    """Rows written to a file."""

    def __init__(self, selection: Selection, dtype: torch.dtype, device: torch.device, writer: MappedWriter) -> None:
        super().__init__(selection, dtype, device)
        self._device, self._writer = device, writer

    def take(self, rows: Tensor) -> None:
        """Write them."""
        self._writer.append(rows)

    def finish(self) -> FisherFactor:
        """Return the factor."""
        return self._writer.finish(self._device)


def _allocate(n: int, selection: Selection, dtype: torch.dtype, device: torch.device, aligned: int = 1) -> Tensor:
    """Return room for n rows, each of which begins at a multiple of so many entries."""
    width = -(-selection.total // aligned) * aligned
    try:
        return torch.empty(n, width, dtype=dtype, device=device)[:, : selection.total]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        need = dtype.itemsize * n * selection.total / 2**30
        raise MemoryError(
            f"G with {n} rows of {selection.total} weights needs {need:.1f} GiB, which could not be had; "
            "use fewer samples, or another storage"
        ) from error
