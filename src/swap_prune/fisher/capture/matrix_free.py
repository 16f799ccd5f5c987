"""A Fisher factor that holds nothing of G: every product is a pass through the network.

What is held beside the network and its samples is a few vectors of p: the weights that gradients are taken at, f, and
a block of columns. The rest is time. A product costs one pass over the samples
(:mod:`~swap_prune.fisher.capture.passes`); so does a block of columns, of which a Gram matrix takes as many as its
support has blocks. Up to some thousands of rows that is exact and takes fewer passes than iterating: a block is a few
vectors of p, so that ``G G^T`` takes about n / 12 of them. Beyond that the solver is told to iterate instead.

Place in the pipeline: in the place of :class:`~swap_prune.fisher.factor.DenseFactor`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.backends.blocked import column_limit
from swap_prune.fisher.capture.passes import NetworkPasses, Way
from swap_prune.fisher.capture.rows import Capture, Passed
from swap_prune.fisher.capture.source import RowSource
from swap_prune.fisher.factor import FisherFactor, SubFactor, add_squares_, gram_of_columns
from swap_prune.fisher.storage import AT_ONCE, BLOCK_VECTORS
from swap_prune.losses import check_calibration, check_independence, least_precise
from swap_prune.process_memory import return_free_memory
from swap_prune.samples.batches import is_sliceable, select_samples, split_batches
from swap_prune.selection import Selection

__all__ = ["MatrixFreeFactor", "PassLog", "capture_matrix_free"]

_WAYS: tuple[Way, ...] = ("forward", "double backward")  # in the order of their cost; rows always do
_REMEMBERED = 8  # products G w; solvers ask for some of them again
_MOST_PASSES = 400  # of a Gram matrix of all columns; an iterative solver takes up to 400 as well


@dataclass
class PassLog:
    """How often the samples went through the network, and how long that took.

    Attributes:
        samples: Rows of the whole factor: one pass.
        device: Where they are run: a GPU is waited for.
        runs: Kind of pass to the rows that it was run for.
        seconds: In all of them.
    """

    samples: int
    device: torch.device
    runs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("along", "back", "rows"), 0))
    seconds: float = 0.0

    @contextmanager
    def add(self, kind: str, rows: int) -> Iterator[None]:
        """Count a pass over some rows, and time the block."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.runs[kind] += rows
        self.seconds += time.perf_counter() - started

    def summary(self) -> dict[str, float]:
        """Return passes over all samples by kind, and the seconds, rounded."""
        passes = {kind: round(rows / self.samples, 1) for kind, rows in self.runs.items()}
        return passes | {"seconds": round(self.seconds, 2)}


class MatrixFreeFactor:
    """G as passes through the network; see :func:`capture_matrix_free`.

    Args:
        passes: What runs them.
        batches: The samples, a few at a time.
        counts: Rows of each batch.
        log: Where passes are counted; by default a new one.
        block_vectors: Vectors of p that a block of columns may take.
    """

    def __init__(
        self,
        passes: NetworkPasses,
        batches: Sequence[Any],
        counts: Sequence[int],
        log: PassLog | None = None,
        block_vectors: int = BLOCK_VECTORS,
    ) -> None:
        self.passes, self.block_vectors = passes, block_vectors
        self._batches, self._counts = tuple(batches), tuple(counts)
        self.log = PassLog(sum(counts), passes.weights.device) if log is None else log
        self._diagonal: Tensor | None = None
        self._remembered: dict[bytes, Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        return sum(self._counts), self.passes.selection.total

    @property
    def column_limit(self) -> int:
        """Columns that make a block of a few vectors of p."""
        (n, p), weights = self.shape, self.passes.weights
        return max(column_limit(n, weights.dtype.itemsize, weights.device), self.block_vectors * p // n)

    @property
    def iterative(self) -> bool:
        """Whether a Gram matrix takes more passes than an iterative solver may."""
        return -(-self.shape[1] // self.column_limit) > _MOST_PASSES

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``, (n,), from a forward pass that carries derivatives along w."""
        digest = _digest(w)
        if digest in self._remembered:
            return self._remembered[digest].clone()
        with self._passing("along"), self.passes.source.mode(self.passes.model):
            product = torch.cat([self.passes.along(batch, w) for batch in self._batches])
        self._remembered[digest] = product
        while len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]  # the oldest
        return product.clone()

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``, (p,), from a backward pass of weighted values."""
        total = torch.zeros_like(self.passes.weights)
        with self._passing("back"), self.passes.source.mode(self.passes.model):
            for batch, part in zip(self._batches, torch.split(v, list(self._counts)), strict=True):
                self.passes.back(batch, part, total)
        return total

    def diagonal(self) -> Tensor:
        """Return f, (p,): the mean over rows of the squared entries. The first call takes a pass."""
        if self._diagonal is None:
            self.gather_squares()
        assert self._diagonal is not None, "just gathered"
        return self._diagonal

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense, from a pass over the rows."""
        result = self.passes.weights.new_empty(self.shape[0], len(index))
        filled = 0

        def see(rows: Tensor) -> None:
            nonlocal filled
            torch.index_select(rows, 1, index, out=result[filled : filled + len(rows)])
            filled += len(rows)

        if len(index) > 0:
            self._see_rows(see)
        return result

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``, (n, n), in blocks of columns."""
        return gram_of_columns(self, scale)

    def rows(self, index: Tensor) -> FisherFactor:
        """Return the factor of some rows; its passes run over their samples alone."""
        chosen, places = torch.unique(index, return_inverse=True)
        batches, counts, start = [], [], 0
        for batch, count in zip(self._batches, self._counts, strict=True):
            local = chosen[(chosen >= start) & (chosen < start + count)] - start
            start += count
            if len(local) == 0:
                continue
            if len(local) < count:
                if not is_sliceable(batch):
                    return SubFactor(self, index)
                batch = select_samples(batch, local)
            batches.append(batch)
            counts.append(len(local))
        some = MatrixFreeFactor(self.passes, batches, counts, self.log, self.block_vectors)
        return SubFactor(some, places)

    def row_span(self, first: int, last: int) -> Tensor:
        """Return rows first to last, (m, p), dense; as many of them as there are."""
        span = torch.arange(first, min(last, self.shape[0]), device=self.passes.weights.device)
        return self.rows(span).columns(torch.arange(self.shape[1], device=span.device))

    def gather_squares(self, advance: Callable[[int], None] = lambda _count: None) -> Passed | None:
        """Pass over the rows, and add up the squares of their entries; returns what capture says of the pass."""
        squares = torch.zeros_like(self.passes.weights)
        passed = self._see_rows(partial(add_squares_, squares), advance)
        self._diagonal = squares.div_(self.shape[0])
        return passed

    @contextmanager
    def _passing(self, kind: str) -> Iterator[None]:
        """Count and time a pass; where memory is shortest, what it has freed goes back."""
        with self.log.add(kind, self.shape[0]):
            yield
        if self.block_vectors < BLOCK_VECTORS:
            return_free_memory()

    def _see_rows(
        self, see: Callable[[Tensor], object], advance: Callable[[int], None] = lambda _count: None
    ) -> Passed | None:
        with self._passing("rows"):
            return self.passes.rows(self._batches, self._counts, see, advance)


def _digest(w: Tensor) -> bytes:
    """Return what tells a vector from all others, in 32 bytes: a copy of it would be as large as p."""
    return hashlib.sha256(w.detach().contiguous().cpu().view(torch.uint8).numpy().data).digest()


def capture_matrix_free(
    model: nn.Module,
    selection: Selection,
    source: RowSource,
    advance: Callable[[int], None] = lambda _count: None,
    at_once: int = AT_ONCE,
    block_vectors: int = BLOCK_VECTORS,
    weights: Tensor | None = None,
) -> Capture:
    """Take G at the model's current weights as it comes, and find out how products with it are to be had.

    Args:
        model: The network; as before when this returns. Its selected weights may change later, nothing else of it.
        selection: The p weights.
        source: What the rows are gradients of.
        advance: Called with the number of samples that were done, for progress.
        at_once: Samples that run through the network at once.
        block_vectors: Vectors of p that a block of columns may take.
        weights: The model's selected weights, (p,), where they are held already; held here too.

    Returns:
        G, and the loss of each sample.

    Raises:
        ValueError: As for ``capture_gradients``.
    """
    batches = list(source.batches) if source.in_batches else split_batches(source.batches, at_once)
    if source.in_batches:
        counts = [1] * len(batches)
    else:
        with source.mode(model):
            counts = check_calibration(model, source.function, batches)
            check_independence(model, source.function, batches)
    _check_repeatable(model, source, batches[0])
    held = selection.read(model) if weights is None else weights
    passes = NetworkPasses(model, selection, source, held, at_once=at_once)
    passed = MatrixFreeFactor(passes, batches, counts, block_vectors=block_vectors)
    seen = passed.gather_squares(advance)
    losses = source.losses if seen is None or source.losses is not None else seen.losses
    assert losses is not None, "a sketch finds them when it is drawn"
    passes = replace(passes, backend="auto" if seen is None else seen.backend)
    tries = (replace(passes, way=way) for way in _WAYS)
    passed.passes = next((one for one in tries if one.holds(batches[0], counts[0])), replace(passes, way="rows"))
    return Capture(passed, losses, "mini-batch" if seen is None else seen.backend, at_once)


def _check_repeatable(model: nn.Module, source: RowSource, batch: Any) -> None:
    """Refuse a network that draws random numbers: products would not belong to one G.

    Raises:
        ValueError: If it gives other values the second time.
    """
    with source.mode(model), torch.no_grad():
        first, again = (source.function(model, batch) for _ in range(2))
    digits = torch.finfo(least_precise(model.parameters())).eps ** 0.5
    scale = float(first.abs().nan_to_num(0.0, 0.0, 0.0).max())  # what is not finite is said elsewhere
    if not torch.allclose(first, again, rtol=digits, atol=digits * scale, equal_nan=True):
        raise ValueError(
            "storage 'matrix-free' needs a network that gives the same values each time, and this one draws random "
            "numbers (dropout that is always on, noise): choose another storage, or more memory="
        )
