"""How many bytes a network takes for a sample: measured on one, so that it is the same each time.

Place in the pipeline: before capture, and beneath the forecasts of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["SavedBytes", "saved_bytes", "trainable"]


class SavedBytes(NamedTuple):
    """What a forward pass keeps for its backward pass.

    Attributes:
        total: Bytes of all tensors.
        largest: Bytes of the largest.
    """

    total: int
    largest: int


def saved_bytes(run: Callable[[], object], own: Iterable[Tensor]) -> SavedBytes:
    """Count what a forward pass keeps for its backward pass.

    Args:
        run: The forward pass.
        own: Tensors that are there anyway and do not count.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own if tensor.layout is torch.strided}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:  # what a sparse one takes is not asked
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the node that holds it for ever

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return SavedBytes(sum(kept.values()), max(kept.values(), default=0))


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Run a block in which all parameters of a network require gradients, as those that are asked for one will."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
