r"""The Combinatorial Brain Surgeon: choose the removed weights together, by swaps, then update the others jointly.

Yu, Serra, Ramalingam and Zhe, "The Combinatorial Brain Surgeon: Pruning Weights That Cancel One Another in Neural
Networks", ICML 2022. With ``F = G^T G/n + c I``, the selection problem (CBS-S) is to find the removed set R of least ::

    S(R) = 1/2 sum_{i, j in R} w_i F_ij w_j = 1/2n ||r||^2 + c/2 sum_{j in R} w_j^2,     r = sum_{j in R} w_j g_j

and the update problem (CBS-U) is the joint optimal-brain-surgeon update. S knows of pairs that cancel each other.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        inside = _least(removal, kept, candidates)
        if floors:
            inside = torch.cat([inside, _least(removal, _spared(kept, floors), candidates)]).unique()  # type: ignore[no-untyped-call]
        outside = _least(comeback, ~kept, candidates)
        index = torch.cat([inside, outside])
        scaled = (factor.columns(index) * w[index]).double()
        layers = _Layers.of(index, kept, floors)
        chosen, made = _swap_among(scaled.T @ scaled / n, own[index], unit[index], pull[index], len(inside), layers)
        if made == 0:
            return kept, swaps, done
        kept[index] = chosen
        swaps += made
    return kept, swaps, rounds


@dataclass
class _Layers:
    """What layers allow of swaps among m candidates.

    Attributes:
        number: Of the layer of each candidate, (m,); 0 for those without a floor.
        spare: How many weights each layer keeps beyond its floor; the first entry is never used up.
    """

    number: Tensor
    spare: Tensor

    @classmethod
    def of(cls, index: Tensor, kept: Tensor, floors: Floors) -> _Layers:
        """Look at candidates, by their indices."""
        number, spare = torch.zeros(len(index), dtype=torch.int64, device="cpu"), [len(kept)]
        for layer, (place, least) in enumerate(floors, start=1):
            number[((index >= place.start) & (index < place.stop)).cpu()] = layer
            spare.append(int(kept[place].sum()) - least)
        return cls(number, torch.tensor(spare, device="cpu"))

    def refuse(self, leaving: Tensor, entering: Tensor) -> Tensor:
        """Return which pairs would leave a layer fewer weights than its floor, (leaving, entering), boolean."""
        needed = self.spare[self.number[leaving]] < 1
        return needed[:, None] & (self.number[leaving][:, None] != self.number[entering])

    def exchange(self, leaving: int, entering: int) -> None:
        """Count a swap."""
        self.spare[self.number[leaving]] -= 1
        self.spare[self.number[entering]] += 1


def _spared(kept: Tensor, floors: Floors) -> Tensor:
    """Return which of the kept weights are of no layer at its floor, (p,), boolean."""
    free = kept.clone()
    for place, least in floors:
        if int(kept[place].sum()) <= least:
            free[place] = False
    return free


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
        change = change.masked_fill(layers.refuse(kept, removed).to(change.device), torch.inf)
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
