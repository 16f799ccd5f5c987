"""A look at one sample of the calibration data, before any is drawn; digests of samples; and data that fail."""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import seeded
from swap_prune.samples.batches import is_sliceable, map_tensors, slice_batch
from swap_prune.samples.numbered import NumberedSamples, generators_given_back

__all__ = ["digest_of", "peek", "report_failure"]

_TOLD_BY = 256  # numbers of a tensor


def peek(data: Any, device: torch.device | str = "cpu") -> Any:
    """Return one sample as a batch, or None; reads nothing away, and leaves torch's random state.

    A Dataset and a sequence of batches can be looked at, a DataLoader through its Dataset. Iterators are left alone.

    Args:
        data: As for :class:`~swap_prune.samples.calibration.CalibrationStream`.
        device: Where the sample is put.
    """
    with generators_given_back(data):
        return map_tensors(lambda t: t.to(device, copy=True), _first(data))  # a network may write to it


def digest_of(batch: Any, digest: hashlib._Hash) -> hashlib._Hash:
    """Add the shapes and the first numbers of a batch's tensors to a digest, and return it."""

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized):
            few = tensor.detach().reshape(-1)[:_TOLD_BY].cpu().contiguous()
            digest.update(few.view(torch.uint8).numpy().tobytes())
        return tensor

    map_tensors(add, batch)
    return digest


def _first(data: Any) -> Any:
    try:
        with seeded(0):
            if isinstance(data, DataLoader) and data.collate_fn is not None:
                item = data.dataset[0]
                found = data.collate_fn(item if data.batch_sampler is None else [item])  # which may be a whole batch
                return slice_batch(found, 0, 1) if is_sliceable(found) else found
            samples = NumberedSamples.of(data)
            if samples is not None:
                return next(iter(samples.batches([[0]])))
        if isinstance(data, list | tuple) and data and is_sliceable(data[0]):
            return slice_batch(data[0], 0, 1)
    except Exception as error:  # what is wrong with the data is said where it is drawn
        pass_on_shortage(error)
        return None
    return None


def report_failure(error: Exception) -> NoReturn:
    """Raise what data that fail are reported by: a ValueError of one line, or their own."""
    pass_on_shortage(error)
    lines = str(error).splitlines() or [""]
    if lines[0].startswith("Caught ") and " DataLoader worker " in lines[0]:  # then a traceback, and what it was
        raise ValueError(f"the calibration data failed in a worker of the DataLoader: {lines[-1]}") from error
    if isinstance(error, ValueError | InterruptedError):
        raise error
    raise ValueError(f"the calibration data failed: {type(error).__name__}: {lines[0]}") from error
