"""Tensors spilled to files that are mapped to memory: where memory is short, samples and what backward passes need.

They stay tensors that everything works on. Mapped pages count as resident memory once they are touched. So whenever the
network is called all of them are let go, and those that are looked at again come back from the file, or rather from
what the system caches of it. Files have no names: what a killed process leaves is nothing.

Place in the pipeline: beneath the drawing of samples, and around the network.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swap_prune.memory.process import return_free_memory
from swap_prune.samples.batches import map_tensors

__all__ = ["Spill", "Spilled", "can_spill"]

Spilled = Literal["nothing", "samples", "activations"]  # each with those before it

_ALIGNED = 64  # bytes: where a tensor of any dtype may begin
_LEAST = 2**18  # bytes of an activation that is worth a file


def can_spill(device: torch.device) -> bool:
    """Whether tensors of a device can be spilled: on a CPU, where the system lets pages go when told to."""
    return device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fallocate")


class Spill:
    """Keeps tensors in files without a name, as long as any of them is used.

    Args:
        directory: Where the files are made; None: the system's for temporary files.
        activations: Whether what a forward pass keeps for its backward pass is spilled too.
    """

    def __init__(self, directory: Path | None = None, *, activations: bool = False) -> None:
        self._directory, self._activations = directory, activations
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, range] = weakref.WeakKeyDictionary()  # to their addresses

    def keep(self, batch: Any) -> Any:
        """Return a batch with the same tensors in one file; what lies in a file already stays where it is.

        Strides are kept. Tensors that are sparse, or of a class of their own, stay in memory.

        Raises:
            ValueError: If the file cannot be written, as on a full disk.
        """
        places: dict[int, int] = {}  # of tensors, by id: where they begin
        size = 0

        def place(tensor: Tensor) -> None:
            nonlocal size
            if id(tensor) not in places and self._can_be_mapped(tensor):
                places[id(tensor)] = size
                size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED

        map_tensors(place, batch)
        if not places:
            return batch
        mapped = self._map(size)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        self._maps[mapped] = range(whole.data_ptr(), whole.data_ptr() + size)

        def written(tensor: Tensor) -> Tensor:
            start = places.get(id(tensor))
            if start is None:
                return tensor
            strides = torch.empty_like(tensor, device="meta").stride()
            flat = whole[start : start + tensor.nbytes].view(tensor.dtype)
            return flat.as_strided(tensor.shape, strides, flat.storage_offset()).copy_(tensor.detach())

        kept = map_tensors(written, batch)
        mapped.madvise(mmap.MADV_DONTNEED)
        return kept

    def let_go(self) -> None:
        """Let all pages go, and memory that is free; what is touched again is read from the files."""
        for mapped in list(self._maps):
            mapped.madvise(mmap.MADV_DONTNEED)
        return_free_memory()

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Run a block in which all pages are let go whenever a network is called, and activations spilled if asked."""
        calls: list[ExitStack] = []

        def before(_module: nn.Module, _arguments: Any) -> None:
            self.let_go()
            calls.append(ExitStack())
            if self._activations and not torch._C._are_functorch_transforms_active():  # which know no such hooks
                calls[-1].enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))

        def after(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            calls.pop().close()

        hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pack(self, tensor: Tensor) -> Tensor:
        return self.keep(tensor) if tensor.nbytes >= _LEAST else tensor

    def _can_be_mapped(self, tensor: Tensor) -> bool:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
        return plain and tensor.numel() > 0 and not any(tensor.data_ptr() in own for own in self._maps.values())

    def _map(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(prefix="swap-prune-", dir=self._directory) as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found out now, not by a signal
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    file.truncate(size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            where = tempfile.gettempdir() if self._directory is None else self._directory
            raise ValueError(
                f"memory is short, and no file of {size / 1e6:.0f} MB could be made in {where} instead "
                f"({error.strerror}); give scratch= another directory, fewer samples, or more memory"
            ) from error
