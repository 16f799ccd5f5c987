"""The selected weights of a model, written for good at the end of a stage, or for a while.

Place in the pipeline: the end of a stage; around capture, where noise acts on the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from swap_prune.selection import Selection

__all__ = ["fill_lost", "temporary_weights", "write_weights"]


def write_weights(model: nn.Module, selection: Selection, weights: Tensor, kept: Tensor) -> None:
    """Write w to the selected parameters; what is not kept becomes exactly zero.

    A kept weight that the parameter's dtype would round to zero becomes its smallest normal number, so that
    storing in half precision does not change the sparsity; one that it would round to infinity the largest.

    Args:
        model: The network, changed in place.
        selection: Where the p weights lie.
        weights: w, (p,).
        kept: Kept set, (p,), boolean.
    """
    parameters = dict(model.named_parameters())
    masks = selection.split(kept)
    with torch.no_grad():
        for name, values in selection.split(weights).items():
            parameter = parameters[name]
            largest = torch.finfo(parameter.dtype).max
            stored = values.clamp(-largest, largest).to(parameter)
            if stored.dtype != values.dtype:
                lost = (stored == 0) & (values.to(parameter.device) != 0)
                least = torch.finfo(parameter.dtype).smallest_normal
                stored = torch.where(lost, values.sign().to(parameter) * least, stored)
            parameter.copy_(stored.masked_fill(~masks[name].to(parameter.device), 0))


def fill_lost(parameter: nn.Parameter, kept: Tensor) -> None:
    """Give kept weights that became exactly zero, as training in half precision may have it, a smallest normal number.

    Args:
        parameter: Changed in place.
        kept: Mask of its shape, boolean.
    """
    with torch.no_grad():
        parameter.masked_fill_((parameter == 0) & kept, torch.finfo(parameter.dtype).smallest_normal)


@contextmanager
def temporary_weights(model: nn.Module, selection: Selection, weights: Tensor) -> Iterator[None]:
    """Run a block with other selected weights, then give the model its own back, bit by bit, whatever happened.

    Args:
        model: The network.
        selection: Where the p weights lie.
        weights: The weights meanwhile, (p,).
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in selection.names}
    try:
        with torch.no_grad():
            for name, values in selection.split(weights).items():
                parameters[name].copy_(values)
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                parameters[name].copy_(values)
