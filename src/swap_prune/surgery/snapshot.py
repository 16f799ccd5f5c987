"""What a network had, to give it back: after an error, after a trial, after a call that changed its buffers.

Place in the pipeline: around all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from swap_prune.network.aliasing import unexpanded
from swap_prune.selection import Selection
from swap_prune.surgery.batchnorm import batchnorm_layers

__all__ = ["Snapshot", "bystanders_given_back", "restored_on_error", "statistics_restored_on_error"]


class _Buffers:
    """Buffers of some modules, and the values that they had: a module may write to one, replace it, or resize it.

    One that is None may be given values, and is None again.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.held: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._absent: list[tuple[nn.Module, str]] = []
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is None:
                    self._absent.append((module, name))
                else:
                    self.held.append((module, name, buffer, unexpanded(buffer).clone()))

    def restore(self) -> None:
        """Give them back."""
        with torch.no_grad():
            for module, name, buffer, values in self.held:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                place = unexpanded(buffer)
                if place.shape == values.shape:
                    place.copy_(values)
                else:
                    buffer.data = values.clone()
        for module, name in self._absent:
            setattr(module, name, None)


class Snapshot:
    """What a network has now, to give it back later.

    Args:
        model: The network.
        selection: Only these of the parameters will change; by default all may.
    """

    def __init__(self, model: nn.Module, selection: Selection | None = None) -> None:
        parameters = dict(model.named_parameters())
        chosen = parameters.values() if selection is None else (parameters[name] for name in selection.names)
        self._parameters = list(chosen)  # cuDNN may move the values of a recurrent layer's to another place
        self._values = [unexpanded(parameter).detach().clone() for parameter in self._parameters]
        self._statistics, self._bystanders = _Buffers(batchnorm_layers(model)), _Buffers(_bystanders(model))

    def restore(self) -> None:
        """Write it to the network."""
        with torch.no_grad():
            for parameter, values in zip(self._parameters, self._values, strict=True):
                unexpanded(parameter).copy_(values)
        self._statistics.restore()
        self.restore_bystanders()

    def restore_bystanders(self) -> None:
        """Write the buffers that are not BatchNorm's statistics: a network may change them whenever it is called."""
        self._bystanders.restore()

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Return the values that a parameter or a buffer has now: those held here, where they are the same."""
        values = self._copies.get(_identity(tensor)) if tensor.layout is torch.strided else None
        return values if values is not None and torch.equal(values, tensor) else tensor.detach().clone()

    @cached_property
    def _copies(self) -> dict[tuple[int, torch.Size, torch.dtype], Tensor]:
        """The copies by what they are copies of."""
        buffers = self._statistics.held + self._bystanders.held
        pairs = [
            *((own, values) for _, _, own, values in buffers),
            *zip(map(unexpanded, self._parameters), self._values, strict=True),
        ]
        return {_identity(own): values for own, values in pairs if own.layout is torch.strided}


def _identity(tensor: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    """Return what tells a tensor from others."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def _bystanders(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose buffers pruning does not change."""
    statistics = set(batchnorm_layers(model))
    return (module for module in model.modules() if module not in statistics)


@contextmanager
def bystanders_given_back(model: nn.Module) -> Iterator[None]:
    """Run a block that calls a network, then give back the buffers that are not BatchNorm's statistics."""
    before = _Buffers(_bystanders(model))
    try:
        yield
    finally:
        before.restore()


@contextmanager
def statistics_restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give a network BatchNorm's statistics back if the block does not end well."""
    before = _Buffers(batchnorm_layers(model))
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def restored_on_error(model: nn.Module, selection: Selection | None = None) -> Iterator[Snapshot]:
    """Give the model back what it had if the block does not end well.

    Args:
        model: The network.
        selection: As for :class:`Snapshot`.

    Yields:
        What it had.
    """
    before = Snapshot(model, selection)
    try:
        yield before
    except BaseException:
        before.restore()
        raise
