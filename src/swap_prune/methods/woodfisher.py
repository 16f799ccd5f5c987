r"""WoodFisher: optimal brain surgeon with the inverse of the empirical Fisher.

Singh and Alistarh, "WoodFisher: Efficient Second-Order Approximation for Neural Network Compression", NeurIPS 2020.
With ``F = G^T G/n + c I``, removing weight q alone costs, and is best compensated by::

    rho_q = w_q^2 / (2 [F^-1]_qq),     dw = -w_q F^-1 e_q / [F^-1]_qq

The weights of least rho go at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from swap_prune.checks import positive_number, whole_number
from swap_prune.fisher.factor import of_columns
from swap_prune.fisher.inverse import WHOLE, BlockFisher
from swap_prune.methods.scoring import select_best
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.objective import WeightedRidge

__all__ = ["WoodFisher", "joint_update"]

_BLOCK = 2_000  # the paper's block size for ResNet50


@dataclass(frozen=True)
class WoodFisher:
    """One-shot WoodFisher (Singh and Alistarh, 2020).

    Attributes:
        damping: c > 0.
        update: ``"independent"`` adds up the updates of the single weights (the paper), ``"joint"`` takes the update
            that is best for all of them together.
        block: Side of the Fisher's diagonal blocks, which never reach over two layers; or ``"auto"``: the whole Fisher
            for 50,000 weights or fewer, blocks of 2,000 for more.
    """

    damping: float = 1e-5
    update: Literal["independent", "joint"] = "independent"
    block: int | Literal["auto"] = "auto"

    name: ClassVar[str] = "woodfisher"
    needs_gradients: ClassVar[bool] = True
    needs_held_out: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive_number("damping", self.damping)
        if self.update not in ("independent", "joint"):
            raise ValueError(f"update must be 'independent' or 'joint', got {self.update!r}")
        if self.block != "auto":
            whole_number("block, if not 'auto',", self.block)

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Remove the weights of least cost and compensate for them."""
        if problem.keep in (0, problem.reference.numel()):
            return problem.trivial_solution()
        w = problem.reference
        fisher = BlockFisher(problem.fisher(), self.damping, tuple(self._blocks(problem)))
        inverse = fisher.diagonal()
        kept = select_best(problem, w.double().square() / inverse)
        if self.update == "joint":
            weights = torch.cat([joint_update(problem, kept, self.damping, index) for index in fisher.members])
        else:
            weights = w - fisher.solve((w / inverse).masked_fill(kept, 0)).to(w.dtype)
        return PruningSolution(weights.masked_fill(~kept, 0), kept)

    def columns_at_once(self, p: int) -> int:
        """Return the side of the largest diagonal block of p weights, at the most: for the memory forecast."""
        if self.block == "auto":
            return p if p <= WHOLE else _BLOCK
        return min(p, int(self.block))

    def _blocks(self, problem: PruningProblem) -> Iterator[Tensor]:
        every = torch.arange(problem.reference.numel(), device=problem.reference.device)
        if self.block == "auto" and len(every) <= WHOLE:
            yield every
            return
        for layer in problem.layers():
            yield from torch.split(every[layer.place], self.columns_at_once(len(every)))


def joint_update(problem: PruningProblem, kept: Tensor, damping: float, index: Tensor | None = None) -> Tensor:
    """Minimise ``1/2 d^T F d`` subject to ``w_bar + d = 0`` on the removed weights, F damped.

    Substituting the condition leaves a ridge regression on the kept weights, which is never larger than n x n.

    Args:
        problem: The pruning problem.
        kept: Kept set, (p,), boolean.
        damping: c > 0.
        index: The weights of one diagonal block; by default all.

    Returns:
        The weights of the block, (len(index),), zero where removed.
    """
    factor, w_bar = problem.fisher(), problem.reference
    if index is not None and len(index) < len(w_bar):
        factor = of_columns(factor, index)
        w_bar, kept = w_bar[index], kept[index]
    support = kept.nonzero().squeeze(1)
    if len(support) == 0:
        return torch.zeros_like(w_bar)
    regression = WeightedRidge(factor, factor.matvec(w_bar), w_bar, damping, torch.ones_like(w_bar))
    return regression.refit(support).weights
