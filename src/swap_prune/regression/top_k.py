"""The k largest scores, exactly: the k-th largest value, and what lies above it.

Nothing is sorted. Of many scores on a CPU a sample says between which two values the k-th must lie (Floyd and Rivest,
1975); those between them, which are few, are left to ``numpy.partition``. Few scores, and those on a GPU, are left to
``torch.topk``. Of either the k-th value alone is used. Of scores equal to that, those of lowest index are taken,
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swap_prune.regression.pattern import GroupPattern

__all__ = ["Floors", "chosen", "kept_beyond", "top_k"]

Floors = Sequence[tuple[slice, int]]  # places of layers, in order, and how many of each are kept at least

_SMALL = 2**18  # so many scores torch selects from as fast
_KNOWN = (torch.float32, torch.float64)  # to numpy, and in the order of the scores
_CHUNK = 2**20  # scores looked at together
_STRIDE = 61  # every so many of them is in the sample; prime, so that it is in step with no layer
_DEVIATIONS = 4.0  # of the sample's rank, in which the k-th value must lie


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


def chosen(index: Tensor, like: Tensor) -> Tensor:
    """Return which entries indices stand for, a boolean vector as long as another."""
    return torch.zeros_like(like, dtype=torch.bool).index_fill_(0, index, True)


def kept_beyond(support: Tensor, floors: Floors) -> Tensor:
    """Return how many weights of each layer a support keeps beyond its floor, (layers,); negative where it has fewer.

    Args:
        support: Indices, in increasing order.
        floors: At least one.
    """
    bounds = torch.tensor([(place.start, place.stop) for place, _ in floors], device=support.device)
    counts = torch.searchsorted(support, bounds).diff(dim=1).squeeze(1)
    return counts - torch.tensor([least for _, least in floors], device=support.device)


def _with_floors(scores: Tensor, keep: int, floors: Floors) -> Tensor:
    """Return the indices of the largest scores, (keep,), the best of each layer with a floor taken first."""
    first = torch.cat([top_k(scores[place], least) + place.start for place, least in floors])
    lowest = torch.finfo(scores.dtype).min  # no other score is as low as those that are taken already
    rest = scores.clamp_min(lowest).index_fill_(0, first, -torch.inf)
    return torch.cat([first, top_k(rest, keep - len(first))]).sort().values


def _kth_largest(scores: Tensor, keep: int) -> Tensor:
    """Return the ``keep``-th largest score, a scalar."""
    values = scores.detach().numpy() if scores.dtype in _KNOWN else scores.detach().float().numpy()
    low, high = _bracket(values[::_STRIDE], keep / len(values))
    above, between = 0, []
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        higher = chunk > high
        above += int(np.count_nonzero(higher))
        between.append(chunk[(chunk >= low) & ~higher])
    left = np.concatenate(between)
    if not 0 < keep - above <= len(left):  # the sample was unlike the others
        above, left = 0, values
    place = len(left) - (keep - above)
    return torch.from_numpy(np.partition(left, place)[place : place + 1].copy())[0]


def _bracket(sample: NDArray[Any], share: float) -> tuple[float, float]:
    """Return two values between which that lies which a share of all values reaches, but for bad luck."""
    count = len(sample)
    spread = _DEVIATIONS * math.sqrt(count * share * (1 - share)) + 1
    first, last = math.floor(count * (1 - share) - spread), math.ceil(count * (1 - share) + spread)
    ordered = np.partition(sample, [max(first, 0), min(last, count - 1)])
    return ordered[first] if first >= 0 else -math.inf, ordered[last] if last < count else math.inf


def _take(scores: Tensor, least: Tensor, keep: int) -> Tensor:
    """Return the indices of all scores above the ``keep``-th largest, and of the first that equal it."""
    chunks = scores.split(_CHUNK) if scores.device.type == "cpu" else (scores,)  # type: ignore[no-untyped-call]
    reached = int(torch.stack([(chunk >= least).count_nonzero() for chunk in chunks]).sum())
    if reached == keep:  # nothing else equals the last of them
        return _indices(chunk >= least for chunk in chunks)
    equal = keep - int(torch.stack([(chunk > least).count_nonzero() for chunk in chunks]).sum())

    def chosen() -> Iterator[Tensor]:
        wanted = equal
        for chunk in chunks:
            found = chunk > least
            if wanted > 0:
                ties = (chunk == least).nonzero().squeeze(1)[:wanted]
                found[ties] = True
                wanted -= len(ties)
            yield found

    return _indices(chosen())


def _indices(masks: Iterable[Tensor]) -> Tensor:
    """Return where a boolean vector is true that is given in parts."""
    parts, start = [], 0
    for mask in masks:
        parts.append(mask.nonzero().squeeze(1).add_(start))
        start += len(mask)
    return torch.cat(parts)
