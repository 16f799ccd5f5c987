"""What the rows of G are gradients of, apart from how they are held.

A source is a function ``(model, batch) -> (m,)`` and the batches that it takes. Row i of G is the gradient of its i-th
value; or, where BatchNorm works on the statistics of mini-batches, row b is the gradient of the sum over batch b, over
the root of its size. Whoever computes rows, or products with them, at different times gets the same G from it: what is
random (the signs of a sketch) was drawn when it was made.

Place in the pipeline: between the samples and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.losses import LossFn
from swap_prune.network.bound import Bound, flat_gradient
from swap_prune.network.modes import batch_statistics, eval_mode
from swap_prune.samples.batches import batch_size
from swap_prune.selection import Selection

__all__ = ["RowSource", "joined_gradients"]


@dataclass(frozen=True)
class RowSource:
    """What G is made of.

    Attributes:
        function: ``(model, batch) -> (m,)``.
        batches: What it is called with, on the model's device.
        joined: Whether a batch makes one row, with BatchNorm on its own statistics.
        losses: Loss of each sample, where that was found on the way; None: the values of the function are losses.
    """

    function: LossFn
    batches: Sequence[Any]
    joined: bool = False
    losses: Tensor | None = None

    def mode(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the mode in which the network is asked."""
        return batch_statistics(model) if self.joined else eval_mode(model)


def joined_gradients(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    function: LossFn,
    room: Callable[[], Tensor],
    weights: Tensor | None = None,
) -> Iterator[Any]:
    """Write one row a batch, and yield the batch when its row is written.

    Args:
        model: The network, in the mode that is wanted.
        selection: The p weights.
        batches: Mini-batches.
        function: ``(model, batch) -> (m,)``; the row is the gradient of its sum over the root of m.
        room: Returns where the next row goes, (p,).
        weights: Weights (p,) in place of the model's.
    """
    bound = Bound(model, function)
    for batch in batches:
        with torch.enable_grad():
            values, leaves = bound.with_leaves(selection, batch, weights)
            total = values.sum() / batch_size(batch) ** 0.5
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        flat_gradient(room(), gradients, selection)
        yield batch
