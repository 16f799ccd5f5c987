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
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from swap_prune.process_memory import return_free_memory
from swap_prune.samples.batches import map_tensors

__all__ = ["Spill", "Spilled", "can_spill"]

Spilled = Literal["nothing", "samples", "activations"]  # each with those before it

_ALIGNED = 64  # bytes: where a tensor of any dtype may begin
_LEAST = 2**18  # bytes of an activation that is worth a place in a file
_SEGMENT = 2**26  # bytes of a file of activations, or one activation: files are few, for open ones are limited


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
        self._files: weakref.WeakKeyDictionary[mmap.mmap, range] = weakref.WeakKeyDictionary()  # to their addresses

    def keep(self, batch: Any) -> Any:
        """Return a batch with the same tensors in one file; what lies in a file already stays where it is.

        Strides are kept. Tensors that are sparse, or of a class of their own, stay in memory.

        Raises:
            ValueError: If the file cannot be written, as on a full disk.
        """
        found: dict[int, Tensor] = {}

        def look(tensor: Tensor) -> None:
            if self._can_be_mapped(tensor):
                found[id(tensor)] = tensor

        map_tensors(look, batch)
        if not found:
            return batch
        segment = self.segment(sum(map(_padded, found.values())))
        kept = {key: segment.add(tensor) for key, tensor in found.items()}
        return map_tensors(lambda tensor: kept.get(id(tensor), tensor), batch)

    def let_go(self) -> None:
        """Let all pages go, and memory that is free; what is touched again is read from the files."""
        for file in list(self._files):
            file.madvise(mmap.MADV_DONTNEED)
        return_free_memory()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Run a block in which all pages are let go whenever a network is called, and activations spilled if asked.

        A call is the outermost one of a module in this thread, whatever it is made of.
        """
        thread, calls = threading.get_ident(), list[_Activations | None]()

        def before(module: nn.Module, _arguments: Any) -> None:
            if threading.get_ident() != thread:
                return
            outermost = not calls
            calls.append(None)
            if outermost:
                self.let_go()
                if self._activations and not torch._C._are_functorch_transforms_active():  # they know no such hooks
                    calls[0] = _Activations(self, module)

        def after(_module: nn.Module, _arguments: Any, _output: Any) -> None:
            if threading.get_ident() == thread and calls:
                _leave(calls.pop())

        hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            while calls:  # an interrupted call has not run its last hook
                _leave(calls.pop())

    def segment(self, size: int) -> _Segment:
        """Make a file for so many bytes.

        Raises:
            ValueError: If it cannot be made.
        """
        try:
            with tempfile.TemporaryFile(prefix="swap-prune-", dir=self._directory) as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found out now, not by a signal
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    file.truncate(size)
                made = _Segment(mmap.mmap(file.fileno(), size))
        except OSError as error:
            where = tempfile.gettempdir() if self._directory is None else self._directory
            raise ValueError(
                f"memory is short, and no file of {size / 1e6:.0f} MB could be made in {where} instead "
                f"({error.strerror}); give scratch= another directory, fewer samples, or more memory"
            ) from error
        self._files[made.file] = range(made.start, made.start + size)
        return made

    def _can_be_mapped(self, tensor: Tensor) -> bool:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
        return plain and tensor.numel() > 0 and not any(tensor.data_ptr() in own for own in self._files.values())


class _Segment:
    """A mapped file that tensors are added to, one behind the other.

    Attributes:
        file: The mapping; the tensors hold it.
        start: Its first address.
    """

    def __init__(self, file: mmap.mmap) -> None:
        self.file = file
        self._whole = torch.frombuffer(file, dtype=torch.uint8)
        self.start, self._used = self._whole.data_ptr(), 0

    def has_room(self, tensor: Tensor) -> bool:
        """Whether a tensor fits behind the others."""
        return self._used + _padded(tensor) <= len(self._whole)

    def add(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in the file, whose pages are let go."""
        strides = torch.empty_like(tensor, device="meta").stride()
        flat = self._whole[self._used : self._used + tensor.nbytes].view(tensor.dtype)
        copied = flat.as_strided(tensor.shape, strides, flat.storage_offset()).copy_(tensor.detach())
        first = self._used // mmap.PAGESIZE * mmap.PAGESIZE
        self._used += _padded(tensor)
        self.file.madvise(mmap.MADV_DONTNEED, first, self._used - first)
        return copied


class _Activations:
    """What one call of a network keeps for its backward pass, spilled from now on until :meth:`leave`.

    Args:
        spill: Where to.
        module: What is called: its parameters and buffers, as they are now, stay in memory.
    """

    def __init__(self, spill: Spill, module: nn.Module) -> None:
        own = (*module.parameters(), *module.buffers())
        self._own = {t.untyped_storage().data_ptr() for t in own if t.layout is torch.strided}
        self._spill = spill
        self._segment: _Segment | None = None
        self._kept: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}  # with a weak reference to what it is a copy of
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def leave(self) -> None:
        """Spill no more."""
        self._hooks.__exit__(None, None, None)
        self._segment = None
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        """Return a tensor's copy: torch does not see any more whether the network changes it in place afterwards."""
        if not self._spill._can_be_mapped(tensor) or tensor.untyped_storage().data_ptr() in self._own:
            return tensor.detach()  # itself, it would hold the node that holds it for ever
        if tensor.nbytes < _LEAST:
            return tensor.detach().clone()
        key = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride())
        known = self._kept.get(key)
        if known is not None and not known[0].expired():  # else its memory may be another's by now
            return known[1]
        if self._segment is None or not self._segment.has_room(tensor):
            self._segment = self._spill.segment(max(_SEGMENT, _padded(tensor)))
        kept = self._segment.add(tensor)
        self._kept[key] = StorageWeakRef(tensor.untyped_storage()), kept  # type: ignore[no-untyped-call]
        return kept


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


def _leave(activations: _Activations | None) -> None:
    if activations is not None:
        activations.leave()
