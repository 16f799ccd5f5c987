"""Robust statistics of rows of gradients: entries that stand out, and means that do not follow them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["column_scales", "median_of_means", "middle_mean", "winsorised"]

_LIMIT = 4.5  # medians: three standard deviations of normal entries
_TYPICAL = 64  # rows that the scale of a column is the median of
_TRIMMED = 0.375  # of the rows, at either side of a middle mean
_GROUPS = 16  # of rows, for a median of means
_SORTED = 2**20  # entries that are sorted at once


def column_scales(rows: Tensor) -> Tensor:
    """Return ``c_j``, (q,): the median over rows (n, q) of an entry's size in units of its row's mean size.

    With the mean size ``r_i`` of row i, ``r_i c_j`` is what is expected of the entry: rows differ in size as samples
    do, columns as weights do. Of a column that is zero in half of the rows nothing is expected.
    """
    some = rows[:_TYPICAL]
    sizes = (torch.linalg.vector_norm(some, ord=1, dim=1, keepdim=True) / some.shape[1]).clamp_min(
        torch.finfo(some.dtype).tiny
    )
    blocks = torch.split(some, _columns_at_once(len(some)), dim=1)
    return torch.cat([(block.abs() / sizes).median(0).values for block in blocks])


def winsorised(rows: Tensor, scales: Tensor) -> Tensor:
    """Return rows (n, q) with the entries beyond ``_LIMIT r_i c_j`` brought back to that, c being the scales (q,)."""
    limits = _LIMIT * rows.abs().mean(1, keepdim=True) * scales
    return torch.minimum(torch.maximum(rows, -limits), limits)


def middle_mean(rows: Tensor) -> Tensor:
    """Return the mean of the middle quarter of each entry over rows (n, p), (p,).

    What noise makes of an entry in fewer than three eighths of the rows, to either side, is left out, however loud it
    is (the coordinate-wise trimmed mean; Yin et al., ICML 2018, arXiv 1803.01498).

    Args:
        rows: Gradients of samples, or of batches that are about as large; they count alike.
    """
    cut = int(_TRIMMED * len(rows))
    blocks = torch.split(rows, _columns_at_once(len(rows)), dim=1)
    return torch.cat([_sorted(block)[cut : len(rows) - cut].mean(0) for block in blocks])


def median_of_means(rows: Tensor) -> Tensor:
    """Return the median of each entry over the means of ``_GROUPS`` groups of rows (n, p), (p,).

    Noise in fewer than half of the groups does not move it far, however loud it is (Minsker, Bernoulli 21(4), 2015;
    coordinate-wise as in Yin et al., ICML 2018).

    Args:
        rows: As for :func:`middle_mean`; every ``_GROUPS``-th belongs to the same group.
    """
    groups = min(_GROUPS, len(rows))
    means = torch.stack([rows[start::groups].mean(0) for start in range(groups)])
    middle = (groups - 1) // 2, groups // 2
    blocks = torch.split(means, _columns_at_once(groups), dim=1)
    return torch.cat([_sorted(block)[middle, :].mean(0) for block in blocks])


def _sorted(rows: Tensor) -> Tensor:
    """Return the entries of each column of rows (n, q) in increasing order; on a CPU NumPy sorts far faster."""
    if rows.device.type != "cpu":
        return rows.sort(dim=0).values
    return torch.from_numpy(np.sort(rows.numpy(), axis=0))


def _columns_at_once(rows: int) -> int:
    return max(1, _SORTED // rows)
