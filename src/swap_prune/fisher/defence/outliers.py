"""A defence against rows that someone else wrote: no row of G may be far larger than its like.

Rows of one capture have alike norms, once each is divided by the size that is expected of it. A row that was scaled by
an attacker, or replaced by loud noise, stands out. It is scaled down to the median; norm clipping (Sun et al., 2019,
arXiv 1911.07963, section 4), with a limit so far above what honest rows reach that these are not touched. Where the
expected sizes are known honest norms also lie close together, and rows beyond a wide gap stand out.

Place in the pipeline: between capture and regression, and on the gradients of batches that slopes are averaged over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swap_prune.fisher.factor import DenseFactor

__all__ = ["clip_rows_"]

_LEAST_FACTOR = 5.0  # above the median; and the gap between honest rows and others
_MOST_BEYOND = 0.35  # of the rows, beyond a gap; honest ones may be of two kinds
_LEAST_ROWS = 8  # among which a gap says something
_SPREADS = 8.0  # distances from the median to the upper quartile, in logarithms: 5.4 standard deviations


def clip_rows_(factor: DenseFactor, sizes: Tensor | None = None, *, gaps: bool = True) -> float:
    """Scale rows of G that stand out down to the median, in place.

    Args:
        factor: G, (n, p).
        sizes: What the norms should be proportional to, (n,), positive; None: nothing is known of that.
        gaps: Whether rows beyond a gap stand out, where sizes are given.

    Returns:
        The share of rows that stood out; where it is 0, nothing has changed.
    """
    norms = _norms(factor.matrix)
    relative = norms if sizes is None else norms / sizes.double()
    there = relative[relative > 0].log()
    if len(there) == 0:
        return 0.0
    median, quartile = torch.quantile(there, there.new_tensor([0.5, 0.75]))
    limit = float(median + max(math.log(_LEAST_FACTOR), _SPREADS * float(quartile - median)))
    if sizes is not None and gaps and len(there) >= _LEAST_ROWS:
        limit = min(limit, _below_gap(there))
    loud = (relative.log() > limit).nonzero().squeeze(1)
    for i in loud.tolist():
        factor.matrix[i] = factor.matrix[i].double() * (median.exp() / relative[i])
    return len(loud) / len(norms)


def _below_gap(sizes: Tensor) -> float:
    """Return the largest of the logarithms (n,) below the first wide gap near their upper end; infinity without one."""
    upper = sizes.sort().values[len(sizes) - 1 - int(_MOST_BEYOND * len(sizes)) :]
    wide = (upper.diff() > math.log(_LEAST_FACTOR)).nonzero()
    return float(upper[wide[0]]) if len(wide) else math.inf


def _norms(rows: Tensor) -> Tensor:
    """Return the norm of each row (n, p), (n,), in float64, also where squares are no numbers of the rows' dtype."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1).double()
    least = math.sqrt(torch.finfo(rows.dtype).tiny * rows.shape[1])
    for i in (norms.isinf() | (norms < 1e3 * least)).nonzero().squeeze(1).tolist():
        norms[i] = torch.linalg.vector_norm(rows[i].double())
    return norms
