"""Calls of one layer put together, before gradients are made of them.

A recurrent layer multiplies its state by the same weight at each step. The gradients of the weight, one matrix a
sample, are large beside what went into a step and came back: they are made once, of many steps that lie side by side
as the tokens of a Linear layer do.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.hooks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swap_prune.fisher.capture.layers import Layer, Linear, as_samples, piece_bytes

__all__ = ["JoinedCalls", "Sink"]

_Key = tuple[str, Layer]  # the parameter, and how it is used: an embedding and its head may share one
Sink = Callable[[str, Layer, Tensor, Tensor], None]  # (parameter name, layer, inputs, gradient of its output)


class JoinedCalls:
    """Hands calls on during a backward pass; those of one Linear layer together, as many as a bounded piece holds.

    Args:
        sink: What takes them; None: nothing.
        size: Samples of the batch.
    """

    def __init__(self, sink: Sink | None, size: int) -> None:
        self._sink = sink
        self.size = size
        self._ahead: Counter[_Key] = Counter()  # calls of each layer that are still to come back
        self._held: dict[_Key, _Held] = {}
        self._bytes = 0  # of all that is held

    def expect(self, name: str, layer: Layer) -> None:
        """Count a call of the forward pass."""
        self._ahead[name, layer] += 1

    def add(self, name: str, layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        """Take a call whose gradient came back."""
        if self._sink is None:
            return
        self._ahead[name, layer] -= 1
        if not isinstance(layer, Linear):
            self._sink(name, layer, inputs, gradient)
            return
        held = self._held.setdefault((name, layer), _Held())
        held.calls.append((inputs, gradient))
        held.bytes += inputs.nbytes + gradient.nbytes
        self._bytes += inputs.nbytes + gradient.nbytes
        if self._ahead[name, layer] == 0:
            self._hand_on((name, layer))
        elif self._bytes >= piece_bytes(inputs.device):
            self._hand_on(max(self._held, key=lambda one: self._held[one].bytes))

    def finish(self) -> None:
        """Hand on what is left: of layers of which the losses do not depend on every call."""
        for key in list(self._held):
            self._hand_on(key)

    @torch.no_grad()
    def _hand_on(self, key: _Key) -> None:
        assert self._sink is not None
        held, (name, layer) = self._held.pop(key), key
        self._bytes -= held.bytes
        inputs, gradient = held.calls[0]
        if len(held.calls) > 1:
            shaped = (as_samples(layer, *call, self.size) for call in held.calls)
            inputs, gradient = (torch.cat(side, 1) for side in zip(*shaped, strict=True))
        self._sink(name, layer, inputs, gradient)


@dataclass
class _Held:
    """Calls of one layer."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    bytes: int = 0
