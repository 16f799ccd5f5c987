"""The k largest scores, exactly: the k-th largest value, and what lies above it.

Nothing is sorted: many scores on a CPU are left to ``numpy.partition``, which works on a copy of them; few, and those
on a GPU, to ``torch.topk``. Of either the k-th value alone is used. Of scores equal to that, those of lowest index are
taken, everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swap_prune.regression.pattern import GroupPattern

__all__ = ["Floors", "top_k"]

Floors = Sequence[tuple[slice, int]]  # places of layers, and how many of each are kept at least

_SMALL = 2**18  # so many scores torch selects from as fast
_KNOWN = (torch.float32, torch.float64)  # to numpy, and in the order of the scores
_CHUNK = 2**20  # scores looked at together


def top_k(scores: Tensor, keep: int, floors: Floors = (), pattern: GroupPattern | None = None) -> Tensor:
    """Return the indices of the ``keep`` largest scores, (keep,), in increasing order.

    Args:
        scores: (p,), of any floating dtype. What is not a number counts as infinite.
        keep: k, ``0 <= k <= p``.
        floors: Layers, disjoint, of which so many are among them however small; at most k together. The sum of scores
            is the largest that this allows: the best of each layer come first, then the best of all that is left.
        pattern: What groups of neighbours are held to; it leaves room for k weights, and for the floors.

    Returns:
        Indices, (k,); of equal scores those that come first.
    """
    if pattern is not None:
        scores = pattern.bounded(scores, keep)
    if floors:
        return _with_floors(scores, keep, floors)
    if keep == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if bool(scores.sum().isnan()):
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if len(scores) <= _SMALL or scores.device.type != "cpu":
        return _take(scores, scores.topk(keep, sorted=False).values.min(), keep)
    return _take(scores, _kth_largest(scores, keep), keep)


def _with_floors(scores: Tensor, keep: int, floors: Floors) -> Tensor:
    """Return the indices of the largest scores, (keep,), the best of each layer with a floor taken first."""
    first = torch.cat([top_k(scores[place], least) + place.start for place, least in floors])
    lowest = torch.finfo(scores.dtype).min  # no other score is as low as those that are taken already
    rest = scores.clamp_min(lowest).index_fill_(0, first, -torch.inf)
    return torch.cat([first, top_k(rest, keep - len(first))]).sort().values


def _kth_largest(scores: Tensor, keep: int) -> Tensor:
    """Return the ``keep``-th largest score, a scalar."""
    values = scores.detach().numpy() if scores.dtype in _KNOWN else scores.detach().float().numpy()
    place = len(values) - keep
    return torch.from_numpy(np.partition(values, place)[place : place + 1].copy())[0]


def _take(scores: Tensor, least: Tensor, keep: int) -> Tensor:
    """Return the indices of all scores above the ``keep``-th largest, and of the first that equal it."""
    if scores.device.type != "cpu":
        reached: Tensor = (scores >= least).nonzero().squeeze(1)
        if len(reached) == keep:  # nothing else equals the last of them: one pass instead of three
            return reached
    chunks = scores.split(_CHUNK) if scores.device.type == "cpu" else (scores,)  # type: ignore[no-untyped-call]
    equal = keep - int(torch.stack([(chunk > least).sum() for chunk in chunks]).sum())
    parts, start = [], 0
    for chunk in chunks:
        chosen = chunk > least
        if equal > 0:
            ties = (chunk == least).nonzero().squeeze(1)[:equal]
            chosen[ties] = True
            equal -= len(ties)
        parts.append(chosen.nonzero().squeeze(1) + start)
        start += len(chunk)
    return torch.cat(parts)
