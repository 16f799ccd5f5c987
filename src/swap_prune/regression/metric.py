"""The metric m of the ridge, of the gradient step and of the selection: the scale of each weight as the loss sees it.

    m_j = f_j + c b_j,      f the diagonal of the Fisher, c the damping

Multiplying a layer's weights by s and dividing its inputs by s leaves the network as it is, and ``f_j w_j^2`` too. The
diagonal of a single weight is an estimate from n rows, and may be zero. So it is drawn towards what b_j says of weights
like it:

- ``diagonal``: the mean of f over all weights. Its unit is that of no layer in particular: with a large c, m tends to a
  constant.
- ``layer``: the mean over the weight's own layer.
- ``factored``: the mean over its output times that over its input, over that of its layer: the best guess where a
  gradient is the product of an output's and an input's (Shazeer and Stern, Adafactor, ICML 2018). Rescaling any
  output or input of a layer is seen by it.
- ``identity``: m = 1, the paper's.

Means over all weights compare layers in the units that they are in. These are alike in most networks, and tell
something. A layer whose gain, the root of its squared weights over its number of outputs, is far from that of the
others is in a unit of its own, such as a last layer whose targets are thousandths. It is measured as if its gain were
the usual one. (Outputs are the first dimension of a weight.)

No b_j is less than a small share of the mean over all weights: a layer further from the others than that loses the
invariance, and a layer without influence on the outputs is not blown up.

Place in the pipeline: before the regression.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from swap_prune.selection import Layer

__all__ = ["Metric", "damped_metric", "diagonal_metric"]

Metric = Literal["diagonal", "layer", "factored", "identity"]

_LEAST = 1e-4  # of the mean over all weights: no b_j is less, so that weights without influence have a price too
_UNUSUAL = 20.0  # times the usual gain, or that part of it: further away a layer is in a unit of its own,
_MOST_UNUSUAL = 1e12  # of so many times at the most, whose square is still a number in single precision
_LAYER_SHARE = 0.01  # of the layer's mean in the factored b_j: an output or input without gradients may get some


def damped_metric(
    fisher_diagonal: Tensor,
    damping: float,
    metric: Metric,
    layers: Iterable[Layer],
    groups: Mapping[str, int] = MappingProxyType({}),
    reference: Tensor | None = None,
) -> Tensor:
    """Return m, (p,).

    Args:
        fisher_diagonal: f, (p,).
        damping: c > 0.
        metric: What b is.
        layers: Where the p weights lie.
        groups: Number of groups of those that are of grouped convolutions, by name.
        reference: w_bar, (p,), which tells the units of layers; None: these are alike.
    """
    if metric == "identity":
        return torch.ones_like(fisher_diagonal)
    layers = list(layers)
    units = [] if reference is None else _units_of_their_own(layers, reference)
    if units:
        in_usual_units = fisher_diagonal.clone()
        for place, unit in units:
            in_usual_units[place] *= unit**2
        m = damped_metric(in_usual_units, damping, metric, layers, groups)
        for place, unit in units:
            m[place] /= unit**2
        return m
    mean = float(fisher_diagonal.mean())
    if metric == "diagonal" or mean == 0:
        return diagonal_metric(fisher_diagonal, damping)
    m = torch.empty_like(fisher_diagonal)
    for layer in layers:
        own = fisher_diagonal[layer.place]
        alike = own.mean() if metric == "layer" else _factored(own, layer.shape, groups.get(layer.name, 1))
        m[layer.place] = own + damping * alike.clamp_min(_LEAST * mean)
    return m


def diagonal_metric(fisher_diagonal: Tensor, damping: float) -> Tensor:
    """Return ``m = f + damping * mean(f)``, (p,); 1 where there are no gradients at all."""
    mean = fisher_diagonal.mean()
    if float(mean) == 0:
        return torch.ones_like(fisher_diagonal)
    return fisher_diagonal + damping * mean


def _units_of_their_own(layers: Sequence[Layer], reference: Tensor) -> list[tuple[slice, float]]:
    """Return where layers of unusual gain lie, and how many times the usual one theirs is."""
    matrices = [layer for layer in layers if len(layer.shape) > 1]
    norms = [float(torch.linalg.vector_norm(reference[layer.place].double())) for layer in matrices]
    gains = [norm / max(1, layer.shape[0]) ** 0.5 for norm, layer in zip(norms, matrices, strict=True)]
    usual = median([gain for gain in gains if gain > 0] or [1.0])
    ratios = [min(max(gain / usual, 1 / _MOST_UNUSUAL), _MOST_UNUSUAL) if gain > 0 else 1.0 for gain in gains]
    found = zip(matrices, ratios, strict=True)
    return [(layer.place, ratio) for layer, ratio in found if not 1 / _UNUSUAL <= ratio <= _UNUSUAL]


def _factored(f: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Return b of one layer, flat or of one element; a vector has no inputs to tell apart.

    Groups of a convolution are layers of their own here, but for the least that b may be.
    """
    if len(shape) < 2:
        return f.mean()
    table = f.view(groups, shape[0] // groups, shape[1], -1)
    outputs, inputs = table.mean((2, 3), keepdim=True), table.mean((1, 3), keepdim=True)
    mean = table.mean((1, 2, 3), keepdim=True)
    product = outputs * (inputs / mean.clamp_min(torch.finfo(f.dtype).tiny))  # that of two means may be no number
    return (product + _LAYER_SHARE * table.mean()).expand_as(table).reshape(-1)
