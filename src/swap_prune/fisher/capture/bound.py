"""A model and a function of it as one module, so that weights can be exchanged beneath the function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.selection import Selection

__all__ = ["Bound", "add_gradient", "dense", "flat_gradient", "functional_call"]


def functional_call(module: nn.Module, state: Mapping[str, Tensor], arguments: tuple[Any, ...]) -> Any:
    """Call a module with other parameters and buffers, also where one of its modules has two names.

    ``torch.func.functional_call`` exchanges such a module's tensors once for each of its names, and in the end gives
    back what was there before the last exchange, which is not its own. Here each place is exchanged once, and a tensor
    that several places share in all of them.

    Args:
        module: The module.
        state: Tensors by the first name of what they stand in for.
        arguments: What it is called with.
    """
    places = list(_places(module))
    given = {id(tensor): state[name] for name, tensor in places if name in state}
    whole = {name: given[id(tensor)] for name, tensor in places if id(tensor) in given}
    return torch.func.functional_call(module, whole, arguments, tie_weights=False)


def _places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each place of a parameter or a buffer, by its module's first name, and what it holds."""
    for prefix, part in module.named_modules():
        own = chain(
            part.named_parameters(recurse=False, remove_duplicate=False),
            part.named_buffers(recurse=False, remove_duplicate=False),
        )
        for name, tensor in own:
            yield f"{prefix}.{name}" if prefix else name, tensor


class Bound(nn.Module):
    """``function(model, batch)`` as ``bound(batch)``; parameters and buffers are called ``model.NAME``."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        """Return ``function(model, batch)``."""
        return self.function(self.model, batch)

    def with_leaves(
        self, selection: Selection, batch: Any, weights: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Call with the selected weights as leaves of their own, so that no ``.grad`` is touched.

        Args:
            selection: The p weights.
            batch: What the function takes.
            weights: Values (p,) to use in place of the model's.

        Returns:
            The value, and the selected weights in the order of the selection.
        """
        parameters = dict(self.model.named_parameters())
        values = {name: parameters[name].detach() for name in selection.names}
        if weights is not None:
            values = {name: part.to(values[name]) for name, part in selection.split(weights).items()}
        leaves = {f"model.{name}": values[name].requires_grad_() for name in selection.names}
        value: Tensor = functional_call(self, leaves, (batch,))
        return value, list(leaves.values())


def dense(gradient: Tensor) -> Tensor:
    """Return a gradient as a vector; that of an embedding may be sparse."""
    return (gradient if gradient.layout is torch.strided else gradient.to_dense()).reshape(-1)


def flat_gradient(out: Tensor, gradients: Iterable[Tensor | None], selection: Selection) -> None:
    """Write the gradients of the selected weights to one row, (p,); unused weights have gradient zero."""
    for place, gradient in zip(selection.slices().values(), gradients, strict=True):
        out[place] = 0 if gradient is None else dense(gradient).to(out.dtype)


def add_gradient(total: Tensor, gradients: Iterable[Tensor | None], selection: Selection, share: float = 1.0) -> None:
    """Add a share of the gradients of the selected weights to a vector, (p,)."""
    for place, gradient in zip(selection.slices().values(), gradients, strict=True):
        if gradient is not None:
            total[place].add_(dense(gradient).to(total.dtype), alpha=share)
