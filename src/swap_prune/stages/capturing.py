"""The capture of a stage: which rows G has, and where they come from.

Rows are those of the Gauss-Newton matrix where there is a loss that knows it, else gradients of the loss; of single
samples, or of mini-batches where BatchNorm will be recalibrated.

Place in the pipeline: between the samples and the defence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.low_rank import capture_low_rank
from swap_prune.fisher.capture.matrix_free import capture_matrix_free
from swap_prune.fisher.capture.rows import Capture, capture_gradients
from swap_prune.fisher.capture.sketch import draw_sketch, mini_batches, once_each, sketch_curvature, sketch_draws
from swap_prune.fisher.capture.source import RowSource
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.storage import Storage
from swap_prune.losses import run_loss
from swap_prune.network.modes import batch_statistics, eval_mode
from swap_prune.randomness import forked_generator
from swap_prune.request import Request
from swap_prune.samples.batches import batch_size, is_single, split_batches
from swap_prune.stages.kept_rows import KeptRows
from swap_prune.surgery.weights import temporary_weights
from swap_prune.training.teaching import Taught, output_slopes

__all__ = ["RowCapture", "rows_in_batches"]


def rows_in_batches(request: Request, batches: list[Any]) -> bool:
    """Whether rows of G are those of mini-batches, with their statistics; one sample alone has none."""
    return request.in_batches and not all(map(is_single, batches))


@dataclass(frozen=True)
class RowCapture:
    """What takes the gradients of one stage.

    Attributes:
        model: The network.
        request: What is asked for.
        storage: How G is held.
        number: Of the stage, from 1.
        in_batches: Whether rows are those of mini-batches.
    """

    model: nn.Module
    request: Request
    storage: Storage
    number: int
    in_batches: bool

    def capture(
        self, weights: Tensor, batches: list[Any], advance: Callable[[int], None]
    ) -> tuple[Capture, str | None]:
        """Return G, captured; or, in a first stage, what an earlier run has left of the same.

        Args:
            weights: Where gradients are taken, (p,).
            batches: The samples.
            advance: Called with the number of samples that are done.

        Returns:
            The capture, and the name of the file that an earlier run has left it in; None: it is new.
        """
        with temporary_weights(self.model, self.request.selection, weights):
            if self.storage.kept is None or self.number > 1:
                return self._rows(weights, batches, advance), None
            kept, batched = self.storage.kept, self.in_batches
            draws = 1 if self.request.curvature is None else self._draws(batches)
            rows = KeptRows.of(kept, self.model, self.request, batches, in_batches=batched, draws=draws)
            found = rows.find(lambda: self._first_row(weights, batches), lambda: self._losses(batches))
            if found is None:
                return rows.keep(self._rows(weights, batches, advance)), None
        advance(len(found.losses))
        return found, rows.name

    def _first_row(self, weights: Tensor, batches: list[Any]) -> Tensor:
        """Return the first row of G, (p,), taken alone."""
        alone = split_batches(batches[:1], 1)[:1]
        if self.in_batches:
            alone = mini_batches(batches[:1], self.request.mini_batch)[:1]
        once = replace(self, storage=Storage(at_once=self.storage.at_once))
        return once._rows(weights, alone, lambda _count: None, draws=1).factor.row_span(0, 1)[0]

    def _losses(self, batches: list[Any]) -> Tensor:
        """Return the losses of all samples, as capture finds them, (n,)."""
        parts = mini_batches(batches, self.request.mini_batch) if self.in_batches else batches
        with (batch_statistics if self.in_batches else eval_mode)(self.model), torch.no_grad():
            return torch.cat([run_loss(self.model, part, self.request.loss) for part in parts])

    def _rows(
        self, weights: Tensor, batches: list[Any], advance: Callable[[int], None], draws: int | None = None
    ) -> Capture:
        """Return G at the network's weights (p,); signs are drawn as often as there should be rows of each sample."""
        signs = forked_generator(self.request.seed, f"signs {self.number}")
        if not self.storage.holds_rows:
            return self._products(weights, batches, signs, advance)
        selection, curvature = self.request.selection, self.request.curvature
        if curvature is not None:
            return sketch_curvature(
                self.model,
                selection,
                batches,
                curvature,
                signs,
                in_batches=self.in_batches,
                draws=self._draws(batches) if draws is None else draws,
                mini_batch=self.request.mini_batch,
                storage=self.storage,
                advance=advance,
            )
        loss = self.request.loss
        capture = capture_gradients(self.model, selection, batches, loss, storage=self.storage, advance=advance)
        if not self.request.clips or not isinstance(capture.factor, DenseFactor):
            return capture
        with eval_mode(self.model):
            return replace(capture, sizes=output_slopes(loss, self.model, list(map(Taught, batches))))

    def _draws(self, batches: list[Any]) -> int:
        """Return how often signs are drawn for each sample, at the most."""
        if self.request.in_batches and (self.in_batches or not rows_in_batches(self.request, batches)):
            return 1  # also where no batch can be made, and a plan has counted one row for many samples
        return sketch_draws(sum(map(batch_size, batches)), self.request.selection.total)

    def _products(
        self, weights: Tensor, batches: list[Any], signs: torch.Generator, advance: Callable[[int], None]
    ) -> Capture:
        """Return G as a storage without rows holds it: the function that rows are gradients of is settled first."""
        source = RowSource(self.request.loss, batches)
        if self.request.curvature is not None:
            source = draw_sketch(
                self.model,
                batches,
                self.request.curvature,
                signs,
                in_batches=self.in_batches,
                draws=self._draws(batches),
                mini_batch=self.request.mini_batch,
            )
        advance = once_each(advance, source.draws)
        if self.storage.kind == "matrix-free":
            few, wide = self.storage.at_once, self.storage.block_vectors
            return capture_matrix_free(self.model, self.request.selection, source, advance, few, wide, weights)
        return capture_low_rank(self.model, self.request.selection, source, advance, self.storage.at_once)
