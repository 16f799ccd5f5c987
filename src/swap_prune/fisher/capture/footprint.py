"""How many bytes a network takes for a sample: measured on one, so that it is the same each time.

Place in the pipeline: before capture, and beneath the forecasts of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from swap_prune.samples.batches import map_tensors

__all__ = ["SavedBytes", "allocated_bytes", "saved_bytes", "trainable", "unrolls"]

_EVERY = 16  # operations, after which what was freed is seen


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


def allocated_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that the results of the operations of a run hold together at a time, nearly."""
    seen = _Allocations()
    with seen:
        run()
    return seen.most


class _Allocations(TorchDispatchMode):
    """Adds up the memory that operations return and that is still held, looking every few operations what is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._held: dict[int, tuple[Any, int]] = {}  # by address: a weak reference and bytes
        self._operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        map_tensors(self._note, results)
        self._operations += 1
        if self._operations % _EVERY == 0:
            self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return results

    def _note(self, tensor: Tensor) -> None:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._held[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]


def unrolls(model: nn.Module) -> bool:
    """Whether vmap takes a network apart: of a recurrent layer's weights each step then has a gradient a sample."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())
