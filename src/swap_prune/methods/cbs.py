r"""The Combinatorial Brain Surgeon: choose the removed weights together, by swaps, then update the others jointly.

Yu, Serra, Ramalingam and Zhe, "The Combinatorial Brain Surgeon: Pruning Weights That Cancel One Another in Neural
Networks", ICML 2022. With ``F = G^T G/n + c I``, the selection problem (CBS-S) is to find the removed set R of least ::

    S(R) = 1/2 sum_{i, j in R} w_i F_ij w_j = 1/2n ||r||^2 + c/2 sum_{j in R} w_j^2,     r = sum_{j in R} w_j g_j

and the update problem (CBS-U) is the joint optimal-brain-surgeon update. S knows of pairs that cancel each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from swap_prune.checks import positive_number, whole_number
from swap_prune.fisher.factor import FisherFactor
from swap_prune.methods.scoring import select_best
from swap_prune.methods.woodfisher import joint_update
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.top_k import Floors, chosen

__all__ = ["CBS", "improve_by_swaps"]

_LEAST_GAIN = 1e-7  # of what the candidates weigh; less is rounding


@dataclass(frozen=True)
class CBS:
    """The Combinatorial Brain Surgeon (Yu et al., 2022), without its randomised restarts (RMP).

    Attributes:
        damping: c > 0; how the default was chosen: docs/results.md.
        candidates: Weights on each side, those that promise most, among which a round looks for swaps.
        rounds: Rounds at the most.
    """

    damping: float = 0.01
    candidates: int = 256
    rounds: int = 50

    name: ClassVar[str] = "cbs"
    needs_gradients: ClassVar[bool] = True
    needs_held_out: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    keeps_patterns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_number("damping", self.damping)
        for name in ("candidates", "rounds"):
            whole_number(name, getattr(self, name))

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Swap from magnitude pruning on, then update."""
        if problem.keep in (0, problem.reference.numel()):
            return problem.trivial_solution()
        start = select_best(problem, problem.reference.abs())
        kept, swaps, rounds = improve_by_swaps(
            problem.fisher(), problem.reference, start, self.damping, self.candidates, self.rounds, problem.floors
        )
        weights = joint_update(problem, kept, self.damping)
        return PruningSolution(weights, kept, rounds < self.rounds, rounds, {"swaps": swaps})


def improve_by_swaps(
    factor: FisherFactor,
    w: Tensor,
    kept: Tensor,
    damping: float,
    candidates: int,
    rounds: int,
    floors: Floors = (),
) -> tuple[Tensor, int, int]:
    """Lower S by exchanging a kept and a removed weight at a time.

    A round takes the candidates that promise most when looked at alone, on each side, and makes the best swap among
    them until none lowers S; with floors, of those that layers can spare as many more. With at least p candidates every
    swap is the best one that floors allow.

    Args:
        factor: G, (n, p).
        w: Weights, (p,).
        kept: First kept set, (p,), boolean.
        damping: c.
        candidates: Number of candidates on each side.
        rounds: Rounds at the most.
        floors: Layers of which so many are kept at least, as they are of the first set.

    Returns:
        The kept set, the number of swaps, and the rounds that made any.
    """
    kept, swaps, n = kept.clone(), 0, factor.shape[0]
    own = w.double().square() * (factor.diagonal().double() + damping) / 2  # S of one weight alone
    unit = damping * w.double().square()
    for done in range(rounds):
        residual = factor.matvec(w.masked_fill(kept, 0))
        pull = (w * factor.rmatvec(residual)).double() / n  # w_j g_j . r / n
        removal, comeback = own + pull, own - pull - unit  # change of S when j is removed; when it comes back
        inside, layers = _least(removal, kept, candidates), _Layers.of(kept, floors)
        if floors:
            inside = torch.cat([inside, _least(removal, layers.spared(kept), candidates)]).unique()  # type: ignore[no-untyped-call]
        outside = _least(comeback, ~kept, candidates)
        index = torch.cat([inside, outside])
        scaled = (factor.columns(index) * w[index]).double()
        parts = own[index], unit[index], pull[index]
        chosen, made = _swap_among(scaled.T @ scaled / n, *parts, len(inside), layers.among(index))
        if made == 0:
            return kept, swaps, done
        kept[index] = chosen
        swaps += made
    return kept, swaps, rounds


@dataclass
class _Layers:
    """What layers allow of swaps.

    Attributes:
        floors: Layers of which so many weights are kept at least.
        spare: How many each keeps beyond that, (layers + 1,); the last entry, of all other weights, is never used up.
        number: Of the layer of each candidate, (m,), where there are some.
    """

    floors: Floors
    spare: Tensor
    number: Tensor

    @classmethod
    def of(cls, kept: Tensor, floors: Floors) -> _Layers:
        """Look at a kept set, (p,), boolean."""
        spare = [int(kept[place].sum()) - least for place, least in floors]
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        return cls(floors, torch.tensor([*spare, len(kept)], device="cpu"), none)

    def spared(self, kept: Tensor) -> Tensor:
        """Return which of the kept weights are of no layer at its floor, (p,), boolean."""
        free = kept.clone()
        for (place, _), spare in zip(self.floors, self.spare.tolist(), strict=False):  # all but the last
            free[place] &= spare > 0
        return free

    def among(self, index: Tensor) -> _Layers:
        """Return the same for candidates, by their indices."""
        number = torch.full((len(index),), len(self.floors), device="cpu")
        for layer, (place, _) in enumerate(self.floors):
            number[((index >= place.start) & (index < place.stop)).cpu()] = layer
        return replace(self, number=number)

    def barred(self, change: Tensor, leaving: Tensor, entering: Tensor) -> Tensor:
        """Return what pairs change, (leaving, entering), infinity where a layer would keep fewer than its floor."""
        needed = self.spare[self.number[leaving]] < 1
        if not bool(needed.any()):
            return change
        less = needed[:, None] & (self.number[leaving][:, None] != self.number[entering])
        return change.masked_fill(less.to(change.device), torch.inf)

    def exchange(self, leaving: int, entering: int) -> None:
        """Count a swap."""
        self.spare[self.number[leaving]] -= 1
        self.spare[self.number[entering]] += 1


def _least(values: Tensor, among: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` least values of a set, fewer if it is smaller."""
    count = min(count, int(among.sum()))
    return torch.topk(values.masked_fill(~among, torch.inf), count, largest=False).indices


def _swap_among(
    cross: Tensor, own: Tensor, unit: Tensor, pull: Tensor, inside: int, layers: _Layers
) -> tuple[Tensor, int]:
    """Make the best swap among m candidates until none lowers S, m swaps at the most: rounding lowers S for ever.

    Args:
        cross: ``w_i w_j g_i . g_j / n``, (m, m).
        own: S of each alone, (m,).
        unit: ``c w_j^2``, (m,).
        pull: ``w_j g_j . r / n``, (m,).
        inside: Number of candidates that are kept; they come first.
        layers: What floors allow; it counts the swaps.

    Returns:
        Which are kept now, (m,), boolean, and the number of swaps.
    """
    removed, kept = torch.arange(inside, len(own), device="cpu"), torch.arange(inside, device="cpu")
    least = -_LEAST_GAIN * float(own.sum())
    swaps = 0
    while len(removed) and len(kept) and swaps < len(own):
        change = (own + pull)[kept, None] + (own - pull - unit)[removed] - cross[kept][:, removed]
        change = layers.barred(change, kept, removed)
        best = int(change.argmin())
        a, b = divmod(best, len(removed))
        if not float(change[a, b]) < least:
            break
        i, j = int(kept[a]), int(removed[b])
        pull = pull + cross[:, i] - cross[:, j]
        kept[a], removed[b] = j, i
        layers.exchange(i, j)
        swaps += 1
    return chosen(kept.to(own.device), own), swaps
