r"""SparseGPT: layer-wise optimal brain surgeon, column by column.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, algorithm 1.
A layer's output error is ``||(W - W') X||^2``, with the same Hessian ``H = mean(x x^T) + c I`` for every row. Columns
are passed from left to right. A pruned weight is compensated by those to its right, optimally given that all to its
left are fixed; the inverse Hessian of what is left of the columns is read off one Cholesky factor::

    H^-1 = U^T U,     E_j = W_j / U_jj where pruned, else 0,     W_{j:} <- W_{j:} - E_j U_{j,j:}

Which weights go is decided for a block of columns at a time, by ``W_ij^2 / U_jj^2``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from swap_prune.checks import positive_number, whole_number
from swap_prune.methods.scoring import check_scope, select_best
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.pattern import GroupPattern
from swap_prune.regression.top_k import chosen, top_k
from swap_prune.schedule import share_out
from swap_prune.selection import Layer

__all__ = ["SparseGPT"]


@dataclass(frozen=True)
class SparseGPT:
    """Layer-wise pruning with updates (Frantar and Alistarh, 2023). It uses no labels.

    Departure from the paper: every layer sees the inputs of the network before the stage, not those that the pruned
    layers before it give.

    Attributes:
        damping: Share of the mean diagonal added to the diagonal of H, > 0.
        block: Columns whose mask is chosen together, >= 1.
        scope: ``"layer"`` keeps the same share of every layer (the paper); ``"global"`` shares out the weights by a
            comparison of ``w^2 / [H^-1]_jj`` over all layers.
    """

    damping: float = 0.01
    block: int = 128
    scope: Literal["layer", "global"] = "layer"

    name: ClassVar[str] = "sparsegpt"
    needs_gradients: ClassVar[bool] = False
    needs_held_out: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive_number("damping", self.damping)
        whole_number("block", self.block)
        check_scope(self.scope, ("layer", "global"))

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Prune one layer after the other."""
        if problem.keep in (0, problem.reference.numel()):
            return problem.trivial_solution()
        moments = problem.layer_inputs().moments()
        layers = list(problem.layers())
        shares = self._shares(problem, layers, moments)
        weights, kept = problem.reference.clone(), torch.empty_like(problem.reference, dtype=torch.bool)
        for layer, share in zip(layers, shares, strict=True):
            moment = moments[layer.name]
            W = problem.reference[layer.place].view(len(moment), -1, moment.shape[-1])
            groups = None if problem.pattern is None else (problem.pattern, layer.shape[2:].numel())
            W, mask = prune_columns(W, damped(moment, self.damping), share, self.block, without_input(moment), groups)
            weights[layer.place], kept[layer.place] = W.flatten().to(weights.dtype), mask.flatten()
        return PruningSolution(weights, kept)

    def _shares(self, problem: PruningProblem, layers: list[Layer], moments: dict[str, Tensor]) -> list[int]:
        """Return the number of weights that each layer keeps."""
        if self.scope == "layer":
            return share_out(problem.keep, [layer.shape.numel() for layer in layers])
        scores = []
        for layer in layers:
            inverse = damped(moments[layer.name], self.damping).inverse().diagonal(dim1=1, dim2=2)
            W = problem.reference[layer.place].view(len(inverse), -1, inverse.shape[1])
            worth = W.square() / inverse.unsqueeze(1)
            scores.append(worth.masked_fill(without_input(moments[layer.name]).unsqueeze(1), 0).flatten())
        kept = select_best(problem, torch.cat(scores))
        return [int(kept[layer.place].sum()) for layer in layers]


def damped(moment: Tensor, damping: float) -> Tensor:
    """Return ``H = mean(x x^T) + damping mean(diagonal) I`` in float64, (groups, d, d); I where all inputs are zero."""
    H = moment.double()
    mean = H.diagonal(dim1=1, dim2=2).mean(1)
    shift = torch.where(mean > 0, damping * mean, 1.0)
    return H + torch.diag_embed(shift.unsqueeze(1).expand(H.shape[:2]))


def without_input(moment: Tensor) -> Tensor:
    """Return which columns never had an input, boolean, (groups, d); none where no column of the group had one."""
    squares = moment.diagonal(dim1=1, dim2=2)
    return (squares == 0) & (squares > 0).any(1, keepdim=True)


def prune_columns(
    W: Tensor,
    H: Tensor,
    keep: int,
    block: int,
    idle: Tensor | None = None,
    groups: tuple[GroupPattern, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune a layer by algorithm 1 of the paper, all groups at once.

    Args:
        W: Weights, (groups, rows, d).
        H: Hessian of each group, (groups, d, d), positive definite, in float64.
        keep: Number of weights to keep, of all groups together.
        block: Columns whose mask is chosen together; each block keeps the same share.
        idle: Columns that are worth nothing, (groups, d): their weights go before any other of the block.
        groups: What neighbours among the inputs are held to, and how many columns an input has; blocks hold whole
            groups of neighbours.

    Returns:
        The new weights in float64, and the kept set, both like W.
    """
    W = W.to(H.dtype, copy=True)
    kept = torch.ones_like(W, dtype=torch.bool)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    pivots = U.diagonal(dim1=1, dim2=2).unsqueeze(1)  # (groups, 1, d)
    pattern, unit = None, 1 if groups is None else groups[0].size * groups[1]
    block = max(1, block // unit) * unit
    starts = range(0, W.shape[2], block)
    shares = share_out(keep, [W[:, :, start : start + block].numel() for start in starts])
    for start, share in zip(starts, shares, strict=True):
        end = min(start + block, W.shape[2])
        scores = (W[:, :, start:end] / pivots[:, :, start:end]).square()
        if idle is not None:
            scores = scores.masked_fill(idle[:, None, start:end], 0).masked_fill(W[:, :, start:end] == 0, -1)
        if groups is not None:
            shape = torch.Size((W.shape[0] * W.shape[1], (end - start) // groups[1], groups[1]))
            pattern = replace(groups[0], shapes=(shape,))
        mask = chosen(top_k(scores.flatten(), share, pattern=pattern), scores.flatten())
        kept[:, :, start:end] = mask.view_as(scores)
        errors = torch.zeros_like(scores)
        for j in range(start, end):
            error = (W[:, :, j] / pivots[:, :, j]).masked_fill(kept[:, :, j], 0)
            W[:, :, j:end] -= error.unsqueeze(2) * U[:, j, None, j:end]
            errors[:, :, j - start] = error
        W[:, :, end:] -= errors @ U[:, start:end, end:]  # what the block owes to the columns behind it
    return W.masked_fill(~kept, 0), kept
