"""Noise on the rows of G: the paper's own protocol."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.noise.base import Layers, NoiseModel, check_choice, check_number
from swap_prune.randomness import standard_normal, subset

__all__ = ["GradientNoise", "RowNoise"]


class RowNoise(NoiseModel):
    """Base class of noise that overwrites rows of G, a few at a time."""

    def overwrite(self, rows: Tensor, generator: torch.Generator, layers: Layers | None) -> None:
        """Put the noise into G, (n, p), in place."""
        raise NotImplementedError

    def apply(self, factor: DenseFactor, generator: torch.Generator, layers: Layers | None = None) -> DenseFactor:
        """Return the factor of the noisy rows; the one given is left as it is."""
        return self.apply_(DenseFactor(factor.matrix.clone()), generator, layers)

    def apply_(self, factor: DenseFactor, generator: torch.Generator, layers: Layers | None = None) -> DenseFactor:
        """Put the noise into the factor given, and return it."""
        self.overwrite(factor.matrix, generator, layers)
        return factor


@dataclass(frozen=True)
class GradientNoise(RowNoise):
    """The paper's protocol (You and Cheng, ICLR 2024, section 5.2): Gaussian noise on a random part of each gradient.

    In each row of G, ``round(fraction * p)`` entries drawn without replacement get independent noise
    ``N(0, (std * s)^2)``, s being the row's own (population) standard deviation.

    Attributes:
        std: Standard deviation of the noise as a multiple of the row's, >= 0.
        fraction: Part of the entries that is hit, in [0, 1].
        scope: What counts as a row: ``row``, all of it, or ``layer``: every layer gets its own
            ``round(fraction * p_layer)`` hits, in units of its own deviation.
        batch: Rows in succession that share a pattern: which entries are hit, and the draw in units of each row's
            deviation, as when one disturbance lasts for a mini-batch. 1 is the paper's; noise that rows
            share does not cancel between them.
    """

    std: float = 1.0
    fraction: float = 0.1
    scope: str = "row"
    batch: int = 1

    def __post_init__(self) -> None:
        check_number("std", self.std, 0)
        check_number("fraction", self.fraction, 0, 1)
        check_choice("scope", self.scope, ("row", "layer"))
        check_number("batch", self.batch, 1, whole=True)

    def overwrite(self, rows: Tensor, generator: torch.Generator, layers: Layers | None) -> None:
        """Put the noise into G, (n, p), in place; only vectors are allocated."""
        if self.scope == "layer" and layers is None:
            raise ValueError("noise setting scope=layer needs the layers' columns of G, got none; pass layers")
        parts = list(layers.values()) if self.scope == "layer" and layers else [slice(0, rows.shape[1])]
        for block in torch.split(rows, self.batch):
            for part in parts:
                self._overwrite(block[:, part], generator)

    def _overwrite(self, block: Tensor, generator: torch.Generator) -> None:
        hit = round(self.fraction * block.shape[1])
        if hit == 0 or self.std == 0:
            return
        index = subset(block.shape[1], hit, generator).to(block.device)
        unit = standard_normal(hit, generator).to(block)
        for row in block:
            row.index_add_(0, index, self.std * row.std(correction=0) * unit)
