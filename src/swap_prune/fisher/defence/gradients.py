"""The defence of gradients in one stage: what is made of the rows of G, and of slopes, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from swap_prune.fisher.defence.looks import choose_average, choose_treatment, noise_between
from swap_prune.fisher.defence.rank import CLEAN, energies, shares_beyond
from swap_prune.fisher.defence.treatment import AS_THEY_ARE, Average, Treatment
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.selection import Selection

__all__ = [
    "LOOKED_CLOSELY_AT",
    "PIECE",
    "DefendedLayer",
    "GradientDefence",
    "layers_of",
    "lies_elsewhere",
    "look_noise",
    "overwritten",
    "rank_noise",
]

LOOKED_CLOSELY_AT = 16  # rows that are taken twice, to see what helps
_PROBE = 32  # rows whose rank is looked at
PIECE = 4  # of them at once, for the memory
_RANK = 3  # of rows of layers without rank 1, where nothing tells a better one


class DefendedLayer(NamedTuple):
    """A selected parameter as the defence sees it.

    Attributes:
        place: Its columns of G.
        shape: (a, b), of its gradient as a matrix; (1, q) of one that is none.
        exact: Whether gradients of single samples, and so the rows of G, have rank 1.
    """

    place: slice
    shape: tuple[int, int]
    exact: bool

    @property
    def fixed_rank(self) -> int | None:
        """The rank that rows of its kind are cut to by default; None where that would be full rank."""
        rank = 1 if self.exact else _RANK
        return rank if rank < min(self.shape) else None


def layers_of(selection: Selection, exact: Collection[str]) -> dict[str, DefendedLayer]:
    """Return the selected parameters that have entries, by name.

    Args:
        selection: Where they lie.
        exact: Names of those whose rows have rank 1.
    """
    places = selection.slices()
    return {
        name: DefendedLayer(
            places[name], (shape[0] if len(shape) > 1 else 1, math.prod(shape[1:] or shape)), name in exact
        )
        for name, shape in selection.shapes.items()
        if shape.numel() > 0
    }


def rank_noise(factor: FisherFactor, layers: Mapping[str, DefendedLayer]) -> dict[str, float]:
    """Return the share of energy outside rank 1 in some rows of G, for each layer where there should be none."""
    exact = {name: layer for name, layer in layers.items() if layer.exact}
    totals = {name: [0.0, 0.0] for name in exact}
    n = factor.shape[0]
    pieces = min(_PROBE // PIECE, -(-n // PIECE))  # from all of G: a few rows may be the noisy ones
    for start in (number * n // pieces for number in range(pieces if exact else 0)):
        rows = factor.row_span(start, min(start + PIECE, n))
        for name, layer in exact.items():
            energy, rest = energies(rows[:, layer.place].reshape(-1, *layer.shape))
            totals[name] = [totals[name][0] + energy, totals[name][1] + rest]
    return {name: rest / energy if energy > 0 else 0.0 for name, (energy, rest) in totals.items()}


def look_noise(layers: Mapping[str, DefendedLayer], first: Tensor, second: Tensor) -> dict[str, float]:
    """Return the share of noise in two looks at the same rows, (m, p) each, of the layers that have some."""
    shares = {name: noise_between(first[:, layer.place], second[:, layer.place]) for name, layer in layers.items()}
    return {name: share for name, share in shares.items() if share > CLEAN}


def lies_elsewhere(
    layers: Mapping[str, DefendedLayer], shares: Mapping[str, float], beyond: Mapping[str, float]
) -> bool:
    """Whether noise is not in the entries of gradients, but in what they are gradients of, as that of weights.

    All rows of a capture share it then, each keeps its rank, and no treatment of rows takes it out. To make them
    smaller brings them nearer to a second look all the same.

    Args:
        layers: By name.
        shares: :func:`look_noise`.
        beyond: :func:`rank_noise`.

    Returns:
        True where two looks differ in layers of rank 1, and rows have that rank in all of them.
    """
    told = [name for name in shares if layers[name].exact and min(layers[name].shape) > 1]
    return bool(told) and all(beyond.get(name, 0.0) <= CLEAN for name in told)


def overwritten(rows: Tensor, layers: Mapping[str, DefendedLayer]) -> Tensor:
    """Return which gradients (n, p) have a higher rank than 1 in a layer where each should have that, boolean, (n,)."""
    found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for layer in layers.values():
        if layer.exact and min(layer.shape) > 1:
            parts = (part[:, layer.place].reshape(-1, *layer.shape) for part in torch.split(rows, PIECE))
            found |= torch.cat([shares_beyond(part) for part in parts]) > CLEAN
    return found


@dataclass
class GradientDefence:
    """What is done in a stage where noise was seen, or where it was asked for; the first slope settles what is open.

    Attributes:
        layers: By name.
        noise: Largest share of the energy of a layer's rows that is noise; 0 where none was seen.
        treatments: What is made of the rows of G, for layers that are not left as they are.
        averages: How slopes are averaged, for layers where that is settled and not the plain mean. Those of ``open``
            are added when the first slope is taken.
        open: Layers whose average two looks at the first slope settle: those of rank 1 whose rows come nearer to the
            truth by what is made of them. What a low rank cuts off the others adds up in a mean, more so when slopes
            have become small; and noise that all rows share, as of weights in analog memory, no average takes out.
        written: Which rows of G somebody else has written, as their rank says, boolean, (n,); None: nobody has.
            They count for nothing, and nor do such gradients in slopes.
    """

    layers: Mapping[str, DefendedLayer]
    noise: float = 0.0
    treatments: Mapping[str, Treatment] = field(default_factory=dict)
    averages: dict[str, Average] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    written: Tensor | None = None

    @classmethod
    def by_looks(
        cls,
        layers: Mapping[str, DefendedLayer],
        first: Tensor,
        second: Tensor,
        shares: Mapping[str, float],
        beyond: Mapping[str, float],
        *,
        in_batches: bool = False,
    ) -> GradientDefence:
        """Choose by two looks at the same rows.

        Args:
            layers: By name.
            first: Rows such as those of G, (m, p).
            second: The same, taken again.
            shares: :func:`look_noise` of the two.
            beyond: :func:`rank_noise` of G. Noise that is the same in both looks shows in it alone. Rows are then cut
                to the rank of their kind, and slopes are averaged over cleaned rows where the rank is exact.
            in_batches: Whether rows and gradients are those of mini-batches, of which no rank is low: slopes are then
                averaged by the trimmed mean.
        """
        hidden = max((share for name, share in beyond.items() if name not in shares), default=0.0)
        treatments = {
            name: choose_treatment(first[:, layers[name].place], second[:, layers[name].place], layers[name].shape)
            for name in shares
        }
        helped = [name for name in shares if treatments[name] != AS_THEY_ARE]
        averages = dict.fromkeys(helped, Average(kind="trimmed mean")) if in_batches else {}
        if hidden > CLEAN:
            quiet = {name: layer for name, layer in layers.items() if name not in shares}
            treatments |= {name: Treatment(rank=layer.fixed_rank) for name, layer in quiet.items()}
            averages |= {name: Average(treatments[name]) for name, layer in quiet.items() if layer.exact}
        noise = max([*shares.values(), hidden if hidden > CLEAN else 0.0])
        return cls(layers, noise, treatments, averages, {n for n in helped if layers[n].exact and not in_batches})

    @classmethod
    def as_asked(cls, layers: Mapping[str, DefendedLayer], asked: Collection[str]) -> GradientDefence:
        """Return a defence that does what was asked for to all layers, whatever is in their gradients.

        Args:
            layers: By name.
            asked: Some of ``FIXED_DEFENCES``.
        """
        treatments, averages = {}, {}
        for name, layer in layers.items():
            rank = layer.fixed_rank if "low-rank" in asked else None
            treatments[name] = Treatment("winsorise" in asked, rank)
            if "trimmed-mean" in asked:
                averages[name] = Average(kind="trimmed mean")
            elif "median-of-means" in asked:
                averages[name] = Average(kind="median of means")
        return cls(layers, 0.0, treatments, averages)

    @property
    def left_out(self) -> float | None:
        """Share of the rows of G that count for nothing; None: all count."""
        return None if self.written is None else float(self.written.double().mean())

    @property
    def cleans_slopes(self) -> bool:
        """Whether slopes are averaged over gradients one by one."""
        return bool(self.averages or self.open or self.written is not None)

    def clean_rows_(self, factor: DenseFactor) -> DenseFactor:
        """Overwrite the rows of G by what is made of them; return it."""
        if self.written is not None:
            factor.matrix[self.written] = 0
        for name, treatment in self.treatments.items():
            if treatment != AS_THEY_ARE:
                rows = factor.matrix[:, self.layers[name].place]
                for which, treated in treatment.in_chunks(rows, self.layers[name].shape):
                    rows[which] = treated
        return factor

    def mean(self, rows: Tensor, again: Tensor | None = None) -> Tensor:
        """Return the mean of gradients (n, p), (p,).

        Args:
            rows: Gradients of samples, or of batches that are about as large.
            again: The plain mean of a second look at the same, (p,), by which averages are settled that are open.
        """
        result = torch.empty_like(rows[0])
        honest = None if self.written is None else ~overwritten(rows, self.layers)
        honest = None if honest is None or not bool(honest.any()) else honest
        for name, layer in self.layers.items():
            own = rows[:, layer.place] if honest is None else rows[honest, layer.place]
            if name in self.open and again is not None:
                self.averages[name], result[layer.place] = choose_average(own, again[layer.place], layer.shape)
                self.open.discard(name)
            else:
                result[layer.place] = self.averages.get(name, Average()).of(own, layer.shape)
        return result

    def said(self) -> dict[str, dict[str, str]]:
        """Return what was done, by layer, for the report."""
        done: dict[str, dict[str, str]] = {}
        for name in self.layers:
            treatment, average = self.treatments.get(name, AS_THEY_ARE), self.averages.get(name, Average())
            if treatment != AS_THEY_ARE or average != Average():
                done[name] = {"rows": str(treatment), "slopes": str(average)}
        return done
