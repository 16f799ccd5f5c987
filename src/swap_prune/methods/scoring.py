"""Keep the weights of largest score, unchanged: compared over all layers, within a layer, or within an output row."""

from __future__ import annotations

import torch
from torch import Tensor

from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression.top_k import chosen, top_k
from swap_prune.schedule import share_out

__all__ = ["check_scope", "keep_unchanged", "select_best"]


def select_best(problem: PruningProblem, scores: Tensor, scope: str = "global") -> Tensor:
    """Choose which weights to keep.

    Args:
        problem: The pruning problem.
        scores: What each weight is worth, (p,), >= 0.
        scope: ``"global"`` compares all weights. ``"layer"`` keeps the same share of each layer, ``"row"`` also of
            each of its rows (outputs).

    Returns:
        Kept set, (p,), boolean with exactly k entries true. A weight that is zero already goes before any other.
    """
    scores = scores.masked_fill(problem.reference == 0, -1.0)
    if scope == "global":
        return chosen(top_k(scores, problem.keep, problem.floors, problem.pattern), scores)
    if problem.pattern is not None:
        scores = problem.pattern.bounded(scores, problem.keep)
    layers = list(problem.layers())
    shares = share_out(problem.keep, [layer.shape.numel() for layer in layers])
    parts = [
        _best_of_rows(scores[layer.place].view(layer.rows if scope == "row" else 1, -1), share)
        for layer, share in zip(layers, shares, strict=True)
    ]
    return torch.cat(parts)


def _best_of_rows(scores: Tensor, keep: int) -> Tensor:
    """Keep the best of each row of scores (rows, d), the same number up to one: (rows * d,)."""
    rows, width = scores.shape
    counts = torch.tensor(share_out(keep, [width] * rows), device=scores.device)
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(width, device=scores.device) < counts.unsqueeze(1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, chosen).flatten()


def keep_unchanged(problem: PruningProblem, kept: Tensor) -> PruningSolution:
    """Return the solution that zeroes what is not kept and changes nothing else."""
    return PruningSolution(problem.reference.masked_fill(~kept, 0), kept)


def check_scope(scope: str, known: tuple[str, ...]) -> None:
    """Refuse a scope that a method does not have.

    Raises:
        ValueError: If it is not among ``known``.
    """
    if scope not in known:
        raise ValueError(f"scope must be one of {', '.join(known)}, got {scope!r}")
