"""Where the rows of G go as they are captured: the choice of a run, and the stores that take them.

Capture asks a store for room, writes gradients to it, and hands them over. The dense store gives room in G itself;
the others lend a buffer of a few rows and round it, write it to a file, or show it to someone and forget it. Two
storages hold no rows and have no store: low-rank (:mod:`~swap_prune.fisher.low_rank_capture`) and matrix-free
(:mod:`~swap_prune.fisher.matrix_free`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from swap_prune.distributed import Team
from swap_prune.fisher.blocked import column_limit
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.fisher.half import ALIGNED, HalfFactor, row_scales
from swap_prune.fisher.mapped import MappedWriter
from swap_prune.memory.process import is_out_of_memory
from swap_prune.samples.spill import Spilled
from swap_prune.selection import Selection

__all__ = [
    "AT_ONCE",
    "BLOCK_VECTORS",
    "CHUNK_BYTES",
    "HOLDING_NO_ROWS",
    "RowSink",
    "RowStore",
    "RowStream",
    "Storage",
    "StorageKind",
    "check_rows",
    "chunk_bytes",
]

StorageKind = Literal["float32", "bfloat16", "float16", "mapped", "sharded", "low-rank", "matrix-free"]

HOLDING_NO_ROWS = ("low-rank", "matrix-free")  # be it rounded or in a file

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
AT_ONCE = 64  # samples, where memory allows
BLOCK_VECTORS, _FEW_BLOCK_VECTORS = 12, 1  # of p, that a block of columns may take; where memory is shortest
CHUNK_BYTES = 512 * 2**20  # saved activations and gradients of one chunk of samples at capture together
_LEAN_CHUNK_BYTES = 64 * 2**20  # the same where memory is short
_GPU_SAMPLE_BYTES = 64 * 2**20  # the same on a GPU, for each of the samples that may run at once
_ROOMY_CHUNK_BYTES = 32 * 2**30  # the same on a GPU, where small kernels are dear and there is room


@dataclass(frozen=True)
class Storage:
    """How G is held.

    Attributes:
        kind: ``float32`` holds it in the precision of the gradients (float64, where the weights are).
        lean: Whether the solver does without copies of many columns in float32 too; in the others it always does.
        scratch: Directory of files: of G for ``mapped``, of what is spilled.
        kept: Where G of the first stage is left for later runs, and looked for; None: nowhere.
        at_once: Samples that run through the network forwards and backwards at once, at the most. Mini-batches that
            make a row keep their own size.
        roomy: Whether a GPU has room for large chunks of samples at capture.
        spilled: What is spilled to files: the samples of a stage, and what a forward pass keeps for its backward pass.
        team: The processes that share G, for ``sharded``; None until the run has them.
    """

    kind: StorageKind = "float32"
    lean: bool = False
    scratch: Path | None = None
    kept: Path | None = None
    team: Team | None = None
    at_once: int = AT_ONCE
    roomy: bool = False
    spilled: Spilled = "nothing"

    def __post_init__(self) -> None:
        if self.kind not in get_args(StorageKind):
            raise ValueError(f"storage must be one of {', '.join(get_args(StorageKind))}, got {self.kind!r}")
        if self.kind == "mapped" and self.scratch is None:
            raise ValueError("storage 'mapped' needs a directory, got none; give scratch=")

    def chunk_bytes(self, device: torch.device) -> int:
        """Return the bytes of one chunk of samples at capture."""
        return chunk_bytes(device, self.at_once, lean=not self.copies_columns, roomy=self.roomy)

    @property
    def copies_columns(self) -> bool:
        """Whether the solver copies many columns of G at once."""
        return self.kind == "float32" and not self.lean

    @property
    def forwards(self) -> int:
        """Samples that run through the network forwards alone at once: twice as many, unless memory is shortest."""
        return self.at_once if self.spilled == "activations" else 2 * self.at_once

    @property
    def block_vectors(self) -> int:
        """Vectors of p that a block of columns may take where nothing is held of G."""
        return _FEW_BLOCK_VECTORS if self.spilled == "activations" else BLOCK_VECTORS

    @property
    def holds_rows(self) -> bool:
        """Whether there are rows of G somewhere, be it rounded or in a file."""
        return self.kind not in HOLDING_NO_ROWS

    def open(self, n: int, selection: Selection, dtype: torch.dtype, device: torch.device) -> RowStore:
        """Make a store for at most n rows.

        Raises:
            ValueError: If the storage holds no rows, or the disk has no room for them.
            MemoryError: If the memory has none.
        """
        p = selection.total
        if not self.holds_rows:
            raise ValueError(f"storage {self.kind!r} holds no rows of G; use one that does, such as 'float32'")
        if self.kind == "float32":
            limit = column_limit(n, dtype.itemsize, device) if self.lean else None
            return DenseStore(n, selection, dtype, device, limit)
        if self.kind in _HALVES:
            return HalfStore(n, selection, dtype, device, _HALVES[self.kind])
        if self.kind == "sharded":
            from swap_prune.fisher.shared_rows import SharedStore  # it is a store itself

            assert self.team is not None, "the pipeline gives it one"
            return SharedStore(n, selection, dtype, device, self.team)
        assert self.scratch is not None, "checked when it was made"
        return MappedStore(selection, dtype, device, MappedWriter(self.scratch, n, p, dtype))


def chunk_bytes(device: torch.device, at_once: int, *, lean: bool, roomy: bool = False) -> int:
    """Return the bytes of one chunk of samples at capture.

    Args:
        device: Where the network runs.
        at_once: Samples that may run through it at once.
        lean: Whether memory is short.
        roomy: Whether that of a GPU is plenty.
    """
    if device.type == "cuda":
        return _ROOMY_CHUNK_BYTES if roomy else at_once * _GPU_SAMPLE_BYTES
    return _LEAN_CHUNK_BYTES if lean else CHUNK_BYTES


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


def check_rows(rows: Tensor, selection: Selection) -> None:
    """Check that gradients (n, p) are finite.

    Raises:
        ValueError: If one is not.
    """
    sums = torch.linalg.vector_norm(rows, ord=1, dim=1)  # an overflow of the sum is as bad as an infinite entry
    if bool(torch.isfinite(sums).all()):
        return
    bad = int((~torch.isfinite(sums)).sum())
    layers = [name for name, s in selection.slices().items() if not bool(torch.isfinite(rows[:, s]).all())]
    raise ValueError(
        f"the gradient is not finite on {bad} of {len(rows)} samples"
        + (f" (first in {layers[0]!r})" if layers else "")
        + "; check the loss and the data"
    )
