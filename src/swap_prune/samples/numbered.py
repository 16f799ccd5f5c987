"""Samples that can be asked for by number: those of a map-style ``Dataset``, or of the one behind a ``DataLoader``.

Whoever can ask for a sample can also leave it out: what is held out is then never fitted. A loader's samples are drawn
like those of its Dataset, since the first ones of data that are sorted by class are of one class; its collate function
and its workers read them. One with a sampler or a batching of its own, or whose samples are batches already, gives no
more than its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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

from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import global_states_kept
from swap_prune.samples.batches import batch_size

__all__ = ["NumberedSamples", "generators_given_back", "known_length", "own_generators"]


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
            plain = _is_plain(data) and (data.collate_fn is default_collate or _keeps_count(data))
            return cls(data.dataset, data.collate_fn, data) if plain else None
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
        """Return the batches of samples with these numbers, each read when its turn comes.

        A loader's collate function gets no more of them at once than a batch of its own has.
        """
        if self.loader is not None and self.loader.batch_size is not None:
            most = self.loader.batch_size
            parts = [part[i : i + most] for part in parts for i in range(0, len(part), most)]
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
            order = [order[i] for i in torch.randperm(len(order), generator=generator, device="cpu").tolist()]
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


def _keeps_count(loader: DataLoader[Any]) -> bool:
    """Whether a collate function makes a batch of one sample of one; others unpack what is a batch already."""
    try:
        with generators_given_back(loader), global_states_kept():
            return batch_size(loader.collate_fn([loader.dataset[0]])) == 1
    except Exception as error:  # what is wrong with the data is said where it is drawn
        pass_on_shortage(error)
        return False


def own_generators(data: Any) -> Iterator[torch.Generator]:
    """Yield the random states that a data set, or one that it is a part of, keeps for its augmentation."""
    while isinstance(data, Dataset | DataLoader):
        yield from (value for value in vars(data).values() if isinstance(value, torch.Generator))
        data = getattr(data, "dataset", None)


@contextmanager
def generators_given_back(data: Any) -> Iterator[None]:
    """Run a block that reads samples, then give their own random states back."""
    states = [(generator, generator.get_state()) for generator in own_generators(data)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def known_length(data: Any) -> int | None:
    """Return the length of a data set or of a loader; None where it has none, or does not say it."""
    try:
        return len(data)
    except Exception:  # a method that is there for form's sake may raise anything
        return None
