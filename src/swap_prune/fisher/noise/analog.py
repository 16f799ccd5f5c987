r"""Analog memory: weights held as conductances, which are neither exact nor constant.

Each layer has its own scale: its largest weight is the largest conductance ``g_max``. A weight is a pair of
cells (V. Joshi et al., Nature Communications 11, 2473, 2020, arXiv 1906.03138):

    w = s (g+ - g-),   s = max|w| / g_max,   with g+ = max(w, 0) / s and g- = max(-w, 0) / s

Gradients are computed with the weights that are read from the cells. The reference weights stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.noise.base import Layers, NoiseModel, check_number
from swap_prune.randomness import standard_normal, uniform

__all__ = ["AnalogMemory"]


@dataclass(frozen=True)
class AnalogMemory(NoiseModel):
    r"""Phase-change or resistive memory, cell by cell, all conductances in units of ``g_max``.

    In this order:

    1. Quantisation: the target conductance is rounded to one of ``levels`` values, evenly spaced from 0 to 1.
    2. Programming noise: ``g <- clip(g + N(0, programming^2), 0, 1)``. The default is of the order that Joshi et al.
       find for phase-change cells; one deviation stands for all conductances.
    3. Drift: ``g(t) = g(t_0) (t / t_0)^-nu`` (M. Le Gallo and A. Sebastian, J. Phys. D 53, 213002, 2020); nu is
       drawn for each cell from ``N(drift, spread^2)``, near 0.05 in phase-change memory. No compensation.
    4. Stuck cells: an off cell reads 0, an on cell 1, whatever was programmed (C.-Y. Chen et al., IEEE Trans.
       Computers 64, 180, 2015).
    5. Read noise: ``g <- g + N(0, read^2)``; on a chip every pass has its own.

    All random numbers are drawn once for the capture of a stage, whatever the number of samples, and again for each
    slope, as if each were taken on another chip. The same ones are drawn whatever the settings, so that two settings
    differ in nothing else.

    Attributes:
        levels: Number of conductance levels, at least 2; 0 for a continuum.
        programming: Deviation of the conductance programmed.
        read: Deviation of the conductance read.
        drift: Mean exponent nu.
        spread: Its deviation from cell to cell.
        time: t / t_0, at least 1: age in units of the time after programming at which cells were verified.
        stuck_off: Part of the cells that is stuck at 0.
        stuck_on: Part of the cells that is stuck at 1; together at most 1.
    """

    levels: int = 0
    programming: float = 0.04
    read: float = 0.0
    drift: float = 0.05
    spread: float = 0.0
    time: float = 1.0
    stuck_off: float = 0.0
    stuck_on: float = 0.0

    def __post_init__(self) -> None:
        check_number("levels", self.levels, 0, whole=True)
        if self.levels == 1:
            raise ValueError("noise setting levels must be 0 (a continuum) or at least 2, got 1")
        for setting in ("programming", "read", "drift", "spread"):
            check_number(setting, getattr(self, setting), 0)
        check_number("time", self.time, 1)
        check_number("stuck_off", self.stuck_off, 0, 1)
        check_number("stuck_on", self.stuck_on, 0, 1)
        if self.stuck_off + self.stuck_on > 1:
            raise ValueError(
                "noise settings stuck_off and stuck_on must be together at most 1, got "
                f"{self.stuck_off} and {self.stuck_on}"
            )

    def disturb(self, weights: Tensor, generator: torch.Generator, layers: Layers) -> Tensor:
        """Return the weights (p,) that are read, layer by layer."""
        read = weights.clone()
        for part in layers.values():
            scale = weights[part].abs().max()
            target = weights[part] / scale.clamp(min=torch.finfo(weights.dtype).tiny)
            positive, negative = (self._cells(g.clamp(min=0), generator) for g in (target, -target))
            read[part] = scale * (positive - negative)
        return read

    def _cells(self, g: Tensor, generator: torch.Generator) -> Tensor:
        """Return what is read from cells that were meant to hold g, (m,) in [0, 1]."""
        programming, exponent, read = (standard_normal(len(g), generator).to(g) for _ in range(3))
        fault = uniform(len(g), generator).to(g.device)
        if self.levels:
            g = (g * (self.levels - 1)).round() / (self.levels - 1)
        g = (g + self.programming * programming).clamp(0, 1)
        g = g * self.time ** -(self.drift + self.spread * exponent)
        g = torch.where(fault < self.stuck_off, 0, torch.where(fault >= 1 - self.stuck_on, 1, g))
        return g + self.read * read
