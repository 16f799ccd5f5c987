"""``G_s^T S G_s`` for a support of at most n weights, in float64, and its change with the support.

It knows of no ridge and no metric, so that supports that differ in few weights share all but a few of its rows.

Place in the pipeline: under the exact refits (:mod:`swap_prune.regression.objective`) that solve for k weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor, add_gram_, mirror_lower_

__all__ = ["NormalMatrix"]


@dataclass(frozen=True)
class NormalMatrix:
    """``G_s^T S G_s``.

    Attributes:
        support: s, indices in increasing order, (k,).
        columns: ``G_s^T``, (k, n), float64.
        matrix: (k, k), float64.
        smoothing: S, (n, n), or None for the identity.
    """

    support: Tensor
    columns: Tensor
    matrix: Tensor
    smoothing: Tensor | None = None

    @classmethod
    def of(
        cls, factor: FisherFactor, support: Tensor, smoothing: Tensor | None, previous: NormalMatrix | None = None
    ) -> NormalMatrix:
        """Compute it; what another one of the same factor and smoothing shares with it is taken from there."""
        if previous is None or previous.smoothing is not smoothing or len(previous.support) == 0:
            columns = factor.columns(support).T.double().contiguous()
            return cls(support, columns, _products(columns, smoothing), smoothing)
        if torch.equal(support, previous.support):
            return previous
        place = torch.searchsorted(previous.support, support).clamp_(max=len(previous.support) - 1)
        shared = previous.support[place] == support
        old, new = shared.nonzero().squeeze(1), (~shared).nonzero().squeeze(1)
        place, k = place[old], len(support)
        columns = previous.columns.new_empty(k, previous.columns.shape[1])
        columns[old] = previous.columns[place]
        matrix = previous.matrix.new_empty(k, k)
        matrix[old[:, None], old] = previous.matrix[place[:, None], place]
        if len(new):
            columns[new] = factor.columns(support[new]).T.double()
            rows = smoothed(columns[new], smoothing) @ columns.T
            matrix[new] = rows
            matrix[:, new] = rows.T
        return cls(support, columns, matrix, smoothing)


def smoothed(rows: Tensor, smoothing: Tensor | None) -> Tensor:
    """Return ``R S`` for rows R, (r, n), float64; S is symmetric."""
    return rows if smoothing is None else rows @ smoothing.double()


def _products(columns: Tensor, smoothing: Tensor | None) -> Tensor:
    """Return ``C S C^T`` for C (k, n)."""
    if smoothing is not None:
        return smoothed(columns, smoothing) @ columns.T
    total = columns.new_zeros(len(columns), len(columns))
    add_gram_(total, columns, columns.new_ones(columns.shape[1]))
    return mirror_lower_(total)
