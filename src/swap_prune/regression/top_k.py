"""The k largest scores, exactly: a search for the k-th largest value, and what lies above it.

Floating-point numbers are ordered as integers of the same bits are, once those of negative numbers are turned over. The
k-th largest is found digit by digit, 16 bits at a time: each pass counts, among the scores that share the digits found
so far, how many have each next digit. Two passes find a float32. Nothing is sorted, and what is held beside the scores
is a chunk of them. Few scores, and those on a GPU, are left to ``torch.topk``, of which the k-th value alone is used.
Of scores equal to that, those of lowest index are taken, everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Floors", "top_k"]

Floors = Sequence[tuple[slice, int]]  # places of layers, and how many of each are kept at least

_SMALL = 2**18  # so many scores torch selects from as fast
_CHUNK = 2**20  # scores looked at together
_DIGIT = 16  # bits
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def top_k(scores: Tensor, keep: int, floors: Floors = ()) -> Tensor:
    """Return the indices of the ``keep`` largest scores, (keep,), in increasing order.

    Args:
        scores: (p,), of any floating dtype. What is not a number counts as infinite.
        keep: k, ``0 <= k <= p``.
        floors: Layers, disjoint, of which so many are among them however small; at most k together. The sum of scores
            is the largest that this allows: the best of each layer come first, then the best of all that is left.

    Returns:
        Indices, (k,); of equal scores those that come first.
    """
    if floors:
        return _with_floors(scores, keep, floors)
    if keep == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if bool(scores.sum().isnan()):
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if len(scores) <= _SMALL or scores.device.type != "cpu":
        return _take(scores, scores.topk(keep, sorted=False).values.min(), keep)
    scores = scores if scores.dtype in _INTEGERS else scores.float()
    return _take(scores, _kth_largest(scores, keep), keep)


def _with_floors(scores: Tensor, keep: int, floors: Floors) -> Tensor:
    """Return the same with the best of each layer taken first."""
    first = torch.cat([top_k(scores[place], least) + place.start for place, least in floors])
    rest = scores.index_fill(0, first, -torch.inf)
    return torch.cat([first, top_k(rest, keep - len(first))]).sort().values


def _kth_largest(scores: Tensor, keep: int) -> Tensor:
    """Return the ``keep``-th largest score, a scalar."""
    kind = _INTEGERS[scores.dtype]
    found, above = 0, 0  # the leading digits of the answer, and how many scores lie above all that share them
    bits = 8 * scores.element_size()
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device="cpu")
        first = shift == bits - _DIGIT
        for chunk in scores.split(_CHUNK):  # type: ignore[no-untyped-call]
            keys = _ordered(chunk, kind)
            digits = (keys >> shift) + 2 ** (_DIGIT - 1) if first else keys[keys >> (shift + _DIGIT) == found] >> shift
            counts += torch.bincount(digits & (2**_DIGIT - 1), minlength=2**_DIGIT)
        reached = above + counts.flip(0).cumsum(0)  # scores with this digit or a larger one
        place = int(torch.searchsorted(reached, keep))
        above = int(reached[place - 1]) if place > 0 else above
        digit = 2**_DIGIT - 1 - place
        found = digit - 2 ** (_DIGIT - 1) if first else (found << _DIGIT) | digit
    return _turned(torch.tensor([found], dtype=kind, device="cpu")).view(scores.dtype)[0]


def _ordered(scores: Tensor, kind: torch.dtype) -> Tensor:
    """Return integers in the order of the scores; both zeros are the same."""
    return _turned((scores + 0.0).view(kind))


def _turned(bits: Tensor) -> Tensor:
    """Turn the bits of negative numbers over, except for the sign; twice is not at all."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & torch.iinfo(bits.dtype).max)


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
