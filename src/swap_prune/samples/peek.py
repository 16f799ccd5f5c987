"""A look at one sample of the calibration data, before any is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from swap_prune.samples.batches import is_sliceable, map_tensors, slice_batch
from swap_prune.samples.numbered import NumberedSamples

__all__ = ["peek"]


def peek(data: Any, device: torch.device | str = "cpu") -> Any:
    """Return one sample as a batch, or None; reads nothing away, and leaves torch's random state.

    A Dataset and a sequence of batches can be looked at, a DataLoader through its Dataset. Iterators are left alone.

    Args:
        data: As for :class:`~swap_prune.samples.calibration.CalibrationStream`.
        device: Where the sample is put.
    """
    drawn_from = [(generator, generator.get_state()) for generator in _generators(data)]
    try:
        return map_tensors(lambda t: t.to(device), _first(data))
    finally:
        for generator, state in drawn_from:
            generator.set_state(state)


def _generators(data: Any) -> Iterator[torch.Generator]:
    """Yield the random states that a data set, or one that it is a part of, keeps for its augmentation."""
    while isinstance(data, Dataset | DataLoader):
        yield from (value for value in vars(data).values() if isinstance(value, torch.Generator))
        data = getattr(data, "dataset", None)


def _first(data: Any) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):
            if isinstance(data, DataLoader) and data.collate_fn is not None:
                return data.collate_fn([data.dataset[0]])
            samples = NumberedSamples.of(data)
            if samples is not None:
                return next(iter(samples.batches([[0]])))
        if isinstance(data, list | tuple) and data and is_sliceable(data[0]):
            return slice_batch(data[0], 0, 1)
    except Exception:  # what is wrong with the data is said where it is drawn
        return None
    return None
