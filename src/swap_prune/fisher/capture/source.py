"""What the rows of G are gradients of, apart from how they are held.

A source is a function ``(model, batch) -> (m,)`` and the batches that it takes. Row i of G is the gradient of its i-th
value; or, where BatchNorm works on the statistics of mini-batches, row b is the gradient of the sum over batch b, over
the root of its size. Whoever computes rows, or products with them, at different times gets the same G from it: what is
random (the signs of a sketch) was drawn when it was made.

Place in the pipeline: between the samples and their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.bound import Bound, flat_gradient
from swap_prune.losses import LossFn
from swap_prune.network.modes import batch_statistics, eval_mode
from swap_prune.samples.batches import batch_size
from swap_prune.selection import Selection

__all__ = ["RowSource", "write_batch_gradient"]


@dataclass(frozen=True)
class RowSource:
    """What G is made of.

    Attributes:
        function: ``(model, batch) -> (m,)``.
        batches: What it is called with, on the model's device.
        in_batches: Whether a batch makes one row, with BatchNorm on its own statistics.
        losses: Loss of each sample, where that was found on the way; None: the values of the function are losses.
        draws: How often each sample is among the batches.
    """

    function: LossFn
    batches: Sequence[Any]
    in_batches: bool = False
    losses: Tensor | None = None
    draws: int = 1

    def mode(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the mode in which the network is asked."""
        return batch_statistics(model) if self.in_batches else eval_mode(model)


def write_batch_gradient(
    row: Tensor,
    model: nn.Module,
    selection: Selection,
    batch: Any,
    function: LossFn,
    weights: Tensor | None = None,
) -> None:
    """Write the row of a mini-batch.

    Args:
        row: Where it goes, (p,).
        model: The network, in the mode that is wanted.
        selection: The p weights.
        batch: The mini-batch.
        function: ``(model, batch) -> (m,)``; the row is the gradient of its sum over the root of m.
        weights: Weights (p,) in place of the model's.
    """
    with torch.enable_grad():
        values, leaves = Bound(model, function).with_leaves(selection, batch, weights)
        total = values.sum() / batch_size(batch) ** 0.5
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    flat_gradient(row, gradients, selection)
