"""Two looks at the same gradients: whether noise is in them, and what is to be made of a layer's because of it.

Gradients of the same samples at the same weights, taken twice, are the same to rounding; where they are not, the
difference is noise. It also tells which treatment C is best. Where the noise in the second look b has mean zero, and
nothing to do with that in the first look a,

    E |C(a) - b|^2 = E |C(a) - true|^2 + E |b - true|^2,

so that the treatment which brings first looks nearest to second ones brings them nearest to the truth, which nobody
sees (Noise2Noise; Lehtinen et al., ICML 2018, arXiv 1803.04189). The leading outer products of a row, with singular
triples (s, u, v), are judged for all ranks r at once:

    |C_r(a) - b|^2 - |b|^2 = |C_r(a)|^2 - 2 <C_r(a), b> = sum over k <= r of  s_k^2 - 2 s_k u_k^T b v_k
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from statistics import median_low

import torch
from torch import Tensor

from swap_prune.fisher.defence.rank import leading_singular_triples
from swap_prune.fisher.defence.robust import column_scales, winsorised
from swap_prune.fisher.defence.treatment import AS_THEY_ARE, Average, Treatment

__all__ = ["choose_average", "choose_treatment", "noise_between"]

_RANKS = 16  # outer products of a row that are tried, at the most
_MOST = 0.75  # of the rows have to come nearer, or they are left as they are
_LEAST_SHARE = 0.01  # of a row's energy that a treatment takes away of its distance
_LEAST_GAIN = 1.02  # of the cosine with the second look, over the plain mean's
_AVERAGES = (
    *(Average(Treatment(winsorised, rank)) for winsorised, rank in ((True, None), *product((False, True), (1, 3)))),
    Average(kind="trimmed mean"),
    Average(kind="median of means"),
)


def noise_between(first: Tensor, second: Tensor) -> float:
    """Return the share of energy that noise makes up in two looks at the same rows, (m, q) each.

    Of the rows, the lower median: a few that were overwritten in one look do not make all of them noisy.
    """
    return median_low(map(_share_between, first, second))


def choose_treatment(first: Tensor, second: Tensor, shape: tuple[int, int]) -> Treatment:
    """Choose what is made of the rows of a layer.

    Args:
        first: One look at some rows, (m, a b).
        second: Another one at the same.
        shape: (a, b), of a row as a matrix.

    Returns:
        The one that brings the median row nearest to the truth, if it brings most of them nearer.
    """
    largest = first.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    first, second = first / scale, second / scale
    whole = _excess(first, second)
    unit = (torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)).clamp_min(1e-30)
    best, best_gain = AS_THEY_ARE, _LEAST_SHARE
    for limited in (False, True):
        rows = winsorised(first, column_scales(first)) if limited else first
        excesses = {Treatment(limited): _excess(rows, second)} if limited else {}
        excesses |= {Treatment(limited, rank): excess for rank, excess in _excess_of_ranks(rows, second, shape)}
        for treatment, excess in excesses.items():
            gains = (whole - excess) / unit
            if float(gains.median()) > best_gain and float((gains > 0).double().mean()) >= _MOST:
                best, best_gain = treatment, float(gains.median())
    return best


def choose_average(rows: Tensor, again: Tensor, shape: tuple[int, int]) -> tuple[Average, Tensor]:
    """Choose how the gradients of a layer are averaged.

    By direction; by distance, whatever makes a mean smaller would win where noise is loud. Then it is scaled to come
    nearest to the second look, so that layers with more noise do not outweigh those with less.

    Args:
        rows: Gradients, (n, a b).
        again: The plain mean of a second look at the same, (a b,).
        shape: (a, b), of a row as a matrix.

    Returns:
        The average that is best aligned with the second look, and what it gives, (a b,).
    """
    plain = Average()
    best, chosen = plain, plain.of(rows, shape)
    most = _LEAST_GAIN * max(0.0, _cosine(chosen, again))
    for average in _AVERAGES:
        found = average.of(rows, shape)
        if (alignment := _cosine(found, again)) > most:
            best, chosen, most = average, found, alignment
    scale = _scale_to(chosen, again)
    return replace(best, scale=scale), chosen * scale


def _scale_to(one: Tensor, other: Tensor) -> float:
    """Return the number, at least 0, that brings one vector nearest to another when it is multiplied by it."""
    one, other = one.double(), other.double()  # or squares of small ones would be zero
    energy = float(one.square().sum())
    return max(0.0, float(torch.dot(one, other)) / energy) if energy > 0 else 1.0


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine between two vectors; 0 where one is zero."""
    one, other = one.double(), other.double()
    norms = float(torch.linalg.vector_norm(one)) * float(torch.linalg.vector_norm(other))
    return float(torch.dot(one, other)) / norms if norms > 0 else 0.0


def _share_between(one: Tensor, other: Tensor) -> float:
    """Return the energy of the difference of two vectors in units of both energies together, 1 at the most."""
    one, other = one.double(), other.double()
    energy = float(one.square().sum() + other.square().sum())
    return min(1.0, float((one - other).square().sum()) / energy) if energy > 0 else 0.0


def _excess(rows: Tensor, second: Tensor) -> Tensor:
    """Return ``|c - b|^2 - |b|^2`` of each row, (m,)."""
    return (rows * (rows - 2 * second)).sum(1)


def _excess_of_ranks(first: Tensor, second: Tensor, shape: tuple[int, int]) -> list[tuple[int, Tensor]]:
    """Return ``|C(a) - b|^2 - |b|^2`` of each row, C the leading outer products, for each number of them."""
    ranks = min(_RANKS, min(shape) - 1)
    if ranks < 1:
        return []
    u, s, v = leading_singular_triples(first.reshape(-1, *shape), ranks)
    along = torch.einsum("mar,mab,mbr->mr", u, second.reshape(-1, *shape), v)
    return list(enumerate((s * (s - 2 * along)).cumsum(1).unbind(1), start=1))
