"""Calls of one layer put together, before gradients are made of them.

A recurrent layer multiplies its state by the same weight at each step. The gradients of the weight, one matrix a
sample, are large beside what went into a step and came back: they are made once, of many steps that lie side by side
as the tokens of a Linear layer do.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.hooks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.layers import as_samples, piece_bytes

__all__ = ["JoinedCalls", "Sink"]

Sink = Callable[[str, nn.Module, Tensor, Tensor], None]  # (parameter name, layer, inputs, gradient of its output)


class JoinedCalls:
    """Hands calls on during a backward pass; those of one Linear layer together, as many as a bounded piece holds.

    Args:
        sink: What takes them.
        size: Samples of the batch.
    """

    def __init__(self, sink: Sink, size: int) -> None:
        self._sink = sink
        self._size = size
        self._ahead: Counter[nn.Module] = Counter()  # calls of each layer that are still to come back
        self._held: dict[nn.Module, tuple[str, list[tuple[Tensor, Tensor]]]] = {}

    def expect(self, layer: nn.Module) -> None:
        """Count a call of the forward pass."""
        self._ahead[layer] += 1

    def add(self, name: str, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """Take a call whose gradient came back."""
        self._ahead[layer] -= 1
        if not isinstance(layer, nn.Linear):
            self._sink(name, layer, inputs, gradient)
            return
        parts = self._held.setdefault(layer, (name, []))[1]
        parts.append((inputs, gradient))
        held = sum(x.nbytes + d.nbytes for x, d in parts)
        if self._ahead[layer] == 0 or held >= piece_bytes(inputs.device):
            self._hand_on(layer)

    def finish(self) -> None:
        """Hand on what is left: of layers of which the losses do not depend on every call."""
        for layer in list(self._held):
            self._hand_on(layer)

    @torch.no_grad()
    def _hand_on(self, layer: nn.Module) -> None:
        name, parts = self._held.pop(layer)
        if len(parts) > 1:
            shaped = (as_samples(layer, inputs, gradient, self._size) for inputs, gradient in parts)
            inputs, gradient = (torch.cat(side, 1) for side in zip(*shaped, strict=True))
        else:
            inputs, gradient = parts[0]
        self._sink(name, layer, inputs, gradient)
