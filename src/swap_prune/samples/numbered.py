"""Samples that can be asked for by number: those of a map-style ``Dataset``, or of the one behind a ``DataLoader``.

Whoever can ask for a sample can also leave it out: what is held out is then never fitted. A loader's samples are drawn
like those of its Dataset, since the first ones of data that are sorted by class are of one class; its collate function
and its workers read them. One with a sampler or a batching of its own gives no more than its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

__all__ = ["NumberedSamples", "known_length"]


@dataclass(frozen=True)
class NumberedSamples:
    """Samples by number.

    Attributes:
        dataset: Gives them.
        collate: Makes a batch of a list of them.
        loader: Whose workers read them, and that says how training goes through them; None: in a new order, here.
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any] = default_collate
    loader: DataLoader[Any] | None = None

    @classmethod
    def of(cls, data: Any) -> NumberedSamples | None:
        """Return the samples of data, or None where they cannot be asked for by number."""
        if isinstance(data, DataLoader):
            return cls(data.dataset, data.collate_fn, data) if _is_plain(data) else None
        return cls(data) if isinstance(data, Dataset) and not isinstance(data, IterableDataset) else None

    def count(self) -> int:
        """Return how many there are.

        Raises:
            ValueError: If there are none, or the Dataset does not say.
        """
        size = known_length(self.dataset)
        if size is None:
            raise ValueError(f"a Dataset needs a length (__len__), and {type(self.dataset).__name__} has none")
        if size == 0:
            raise ValueError("the calibration data set is empty: at least one sample is needed")
        return size

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterable[Any]:
        """Return the batches of samples with these numbers, each read when its turn comes."""
        if self.loader is None or self.loader.num_workers == 0:
            return (self.collate(self._fetch(part)) for part in parts)
        return DataLoader(
            self.dataset,
            batch_sampler=parts,  # type: ignore[arg-type]  # any iterable of lists does
            num_workers=self.loader.num_workers,
            collate_fn=self.collate,
            timeout=self.loader.timeout,
            worker_init_fn=self.loader.worker_init_fn,
            multiprocessing_context=self.loader.multiprocessing_context,
            prefetch_factor=self.loader.prefetch_factor,
        )

    def _fetch(self, numbers: Sequence[int]) -> list[Any]:
        several = getattr(self.dataset, "__getitems__", None)
        found: list[Any] = [self.dataset[i] for i in numbers] if several is None else several(list(numbers))
        return found

    def training_parts(self, numbers: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Yield the batches of one pass of training: as the loader has them, or in a new order.

        Args:
            numbers: Of the samples, in increasing order.
            size: Samples a batch, at the most.
            generator: Random state of the order (CPU).
        """
        order, dropped = list(numbers), False
        if self.loader is None or isinstance(self.loader.sampler, RandomSampler):
            order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        if self.loader is not None:
            size, dropped = min(size, self.loader.batch_size or size), self.loader.drop_last
        for start in range(0, len(order), size):
            part = order[start : start + size]
            if not dropped or start == 0 or len(part) == size:
                yield part


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives every sample of a Dataset once in a pass, in order or shuffled, in batches of one size."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        return False  # one that moves or changes batches is asked for them
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        return False  # its batches are somebody else's
    sampler = loader.sampler
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == known_length(loader.dataset)
    return type(sampler) is SequentialSampler


def known_length(data: Any) -> int | None:
    """Return the length of a data set or of a loader; None where it has none, or does not say it."""
    try:
        return len(data)
    except Exception:  # a method that is there for form's sake may raise anything
        return None
