"""The defence of a stage's gradients: look whether there is noise, and decide what is made of them.

Place in the pipeline: between the capture of G and the regression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.defences import FIXED_DEFENCES
from swap_prune.fisher.capture.rows import Capture
from swap_prune.fisher.capture.sketch import draw_sketch, mini_batches
from swap_prune.fisher.capture.source import RowSource, write_batch_gradient
from swap_prune.fisher.defence.exact import outer_product_layers
from swap_prune.fisher.defence.gradients import (
    LOOKED_CLOSELY_AT,
    DefendedLayer,
    GradientDefence,
    layers_of,
    lies_elsewhere,
    look_noise,
    overwritten,
    rank_noise,
)
from swap_prune.fisher.defence.outliers import clip_rows_
from swap_prune.fisher.defence.rank import CLEAN
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.fisher.storage import Storage
from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import forked_generator
from swap_prune.request import Request
from swap_prune.samples.batches import is_single, split_batches
from swap_prune.surgery.weights import temporary_weights

__all__ = ["Defended", "Defender"]

_LOOKED_AT = 2  # rows that are taken twice, to see whether there is noise
_MOST_OVERWRITTEN = 0.5  # of the rows: where more have a wrong rank, noise is in all of them


@dataclass(frozen=True)
class Defended:
    """What became of G, and why.

    Attributes:
        factor: G, cleaned where that was called for.
        defence: What cleans slopes in the same way; None: nothing does.
        clipped: Share of the rows that were scaled down.
        noise: Share of noise in the energy of the gradients; 0: none was seen.
        left: Why rows that should be cleaned are not.
    """

    factor: FisherFactor
    defence: GradientDefence | None = None
    clipped: float = 0.0
    noise: float = 0.0
    left: str | None = None

    @property
    def is_clean(self) -> bool:
        """Whether nothing was seen."""
        return self.defence is None and self.clipped == 0 and self.noise == 0


@dataclass(frozen=True)
class Defender:
    """What looks at the gradients of one stage.

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

    def defend(self, capture: Capture, fitting: list[Any]) -> Defended:
        """Clean G where that is called for.

        Args:
            capture: G with the noise of the run, which is overwritten, and what its rows should be proportional to.
            fitting: The samples that it was captured on.
        """
        factor, asked = capture.factor, self.request.defences
        fixed = asked.intersection(FIXED_DEFENCES)
        if "gradients" not in asked and not fixed:
            return Defended(factor)
        uncleaned = f"rows in {self.storage.kind} are not cleaned"
        if not self.storage.holds_rows:
            return Defended(factor, left=uncleaned if fixed else None)
        layers = layers_of(self.request.selection, self._exact(fitting))
        beyond = {} if fixed else rank_noise(factor, layers)
        clipped = 0.0
        if isinstance(factor, DenseFactor) and asked & {"gradients", "clip"}:
            clipped = clip_rows_(factor, capture.sizes)
        defence = GradientDefence.as_asked(layers, fixed) if fixed else self._seen(factor, layers, beyond, fitting)
        if defence is None:
            return Defended(factor, clipped=clipped)
        if not isinstance(factor, DenseFactor):
            return Defended(factor, clipped=clipped, noise=defence.noise, left=uncleaned)
        return Defended(defence.clean_rows_(factor), defence, clipped, defence.noise)

    def _exact(self, fitting: list[Any]) -> tuple[str, ...]:
        """Return the layers whose rows have rank 1, which those of mini-batches have not."""
        if self.in_batches:
            return ()
        return outer_product_layers(self.model, self.request.selection, self.request.loss, fitting[0])

    def _seen(
        self, factor: FisherFactor, layers: Mapping[str, DefendedLayer], beyond: Mapping[str, float], fitting: list[Any]
    ) -> GradientDefence | None:
        """Return what is to be done; None where gradients are clean."""
        shares = [*look_noise(layers, *self._looks(factor, fitting, _LOOKED_AT)).values(), *beyond.values()]
        noise = max(shares, default=0.0)
        if noise <= CLEAN:
            return None
        if not isinstance(factor, DenseFactor):  # which is not cleaned
            return GradientDefence(layers, noise)
        closely = self._looks(factor, fitting, LOOKED_CLOSELY_AT)
        differing = look_noise(layers, *closely)
        if not differing:
            written = overwritten(factor.matrix, layers)
            if 0 < float(written.double().mean()) < _MOST_OVERWRITTEN:
                return GradientDefence(layers, noise, written=written)
        elif lies_elsewhere(layers, differing, beyond):
            return GradientDefence(layers, noise)
        defence = GradientDefence.by_looks(layers, *closely, differing, beyond, in_batches=self.in_batches)
        return defence if defence.noise > 0 else None

    def _looks(self, factor: FisherFactor, fitting: list[Any], count: int) -> tuple[Tensor, Tensor]:
        """Return a few rows such as those of G, (m, p), taken twice; where they cannot be, a row of G and itself.

        Both in the same way, so that without noise they are the same, whatever the precision of the network.
        """
        if self.storage.team is None:  # processes could differ in what they see
            generator = forked_generator(self.request.seed, f"looks {self.number}")
            try:
                source = self._source(fitting, count, generator)
                if source.batches:
                    return self._taken(source, generator), self._taken(source, generator)
            except Exception as error:  # a network that takes no sample alone, where rows were captured otherwise
                pass_on_shortage(error)
        row = factor.row_span(0, 1)
        return row, row

    def _source(self, fitting: list[Any], count: int, generator: torch.Generator) -> RowSource:
        """Return what such rows are gradients of."""
        curvature = self.request.curvature
        if self.in_batches and curvature is not None:
            size = self.request.mini_batch
            batches = mini_batches(fitting, size)[:count]
            return draw_sketch(self.model, batches, curvature, generator, in_batches=True, mini_batch=size)
        alone = chain.from_iterable(split_batches([batch], 1) for batch in fitting)
        singles = list(islice(filter(is_single, alone), count))
        if curvature is None or not singles:
            return RowSource(self.request.loss, singles)
        return draw_sketch(self.model, singles, curvature, generator, in_batches=False)

    def _taken(self, source: RowSource, generator: torch.Generator) -> Tensor:
        """Return the rows of a source, (m, p), with the noise of the run."""
        noise, selection = self.request.noise, self.request.selection
        weights = noise.disturb(selection.read(self.model), generator, selection.slices())
        rows = weights.new_empty(len(source.batches), len(weights))
        with temporary_weights(self.model, selection, weights), source.mode(self.model):
            for row, batch in zip(rows, source.batches, strict=True):
                write_batch_gradient(row, self.model, selection, batch, source.function)
        return noise.apply_(DenseFactor(rows), generator, selection.slices()).matrix
