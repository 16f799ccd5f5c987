"""Calibration data: an endless, reproducible stream of samples drawn from what the caller has.

Second step of the pipeline. ``data`` may be a map-style ``Dataset`` (samples are drawn at random, without
repetition until all were seen), an iterable of batches such as a ``DataLoader`` or a list (read in order,
each stage going on where the last one stopped, from the start again at the end), or a one-shot iterator
(remembered as it is read). A draw larger than the data returns all of it, once. One that the rest of a pass of a
``DataLoader`` that shuffles is too short for starts a new pass, so that no sample is in it twice.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from swap_prune.batches import (
    batch_size,
    in_own_containers,
    is_sliceable,
    join_batches,
    map_tensors,
    slice_batch,
    split_batches,
)

__all__ = ["BATCH", "HELD_OUT", "JUDGED", "CalibrationStream", "known_length", "peek", "share_out_samples"]

HELD_OUT = 512  # samples held out for a method that chooses by them, at most as many as are captured
JUDGED = 1024  # samples that the number of stages is found by, at the most; the fewer, the sooner the search ends
BATCH = 128  # samples, where the stream makes the batches itself
_END = object()  # of a pass over the data


class CalibrationStream:
    """Draws calibration batches; the only object of the package that remembers where it is.

    Args:
        data: Dataset, iterable of batches, or iterator of batches.
        generator: Random state for drawing from a Dataset (CPU).
        device: Where the drawn batches are put.
        size: Samples of a batch, at the most, but for single ones that would be left alone: batches that the data bring
            are joined and split.

    Raises:
        ValueError: If ``data`` is neither.
    """

    def __init__(
        self, data: Any, generator: torch.Generator, device: torch.device | str = "cpu", size: int = BATCH
    ) -> None:
        if isinstance(data, Tensor | str | bytes | Mapping) or not (
            isinstance(data, Dataset | Iterable) or hasattr(data, "__getitem__")
        ):
            raise ValueError(
                f"data must be a Dataset or an iterable of batches (inputs, targets), got a {type(data).__name__}"
            )
        if isinstance(data, IterableDataset):
            data = DataLoader(data, batch_size=size)
        self._data = data
        self._generator = generator
        self._device = device
        self._size = size
        self._indexed = isinstance(data, Dataset)
        self._reading = torch.Generator().manual_seed(generator.initial_seed()).get_state()  # global while data is read
        self._gradients = torch.is_grad_enabled()  # the caller's mode; data may be read in the midst of a computation
        self._order: list[int] = []  # indices of a Dataset that were not drawn yet
        self._reserved: list[int] = []  # indices of a Dataset that are held out of what is fitted
        self._barred: frozenset[int] = frozenset()  # indices of a Dataset that are never drawn again
        self._passes = iter(()) if self._indexed else self._read_passes()
        self._shuffled = _shuffled_samples(data)
        self._position = 0  # samples of the current pass that were drawn
        self._pass_size: int | None = None  # samples in one pass, once one was completed
        self._read = 0  # samples read in the first pass
        self._rest: Any = None  # what a draw left of its last batch

    def draw(self, samples: int) -> list[Any]:
        """Return batches with ``samples`` samples together, or all the data if it holds fewer.

        Raises:
            ValueError: If the data is empty or exhausted.
        """
        return list(self.read(samples))

    def read(self, samples: int) -> Iterator[Any]:
        """Yield the batches of such a draw one after the other, each read when it is asked for.

        Raises:
            ValueError: If the data is empty or exhausted.
        """
        if self._indexed:
            return self._in_batches(self._take(samples))
        parts = (part for batch in self._draw_iterated(samples) for part in split_batches([batch], self._size, least=2))
        return map(self._placed, join_batches(parts, self._size))

    def read_pass(self, size: int, generator: torch.Generator) -> Iterator[tuple[float, Any]]:
        """Yield as many samples as the data holds, batch by batch, to train on.

        A Dataset is read in a new order. Other data goes on where it was, in batches as they come, split where they
        hold more than ``size`` samples.

        Args:
            size: Samples a batch.
            generator: Random state for the order of a Dataset (CPU). What ``draw`` draws does not depend on it.

        Yields:
            How much of the pass came before a batch, in [0, 1], and the batch. For data of unknown length it is 0.

        Raises:
            ValueError: If the data is empty or exhausted.
        """
        if self._indexed:
            order = torch.randperm(self._count(), generator=generator).tolist()
            order = [i for i in order if i not in self._barred]
            for start in range(0, len(order), size):
                yield start / len(order), self._placed(self._collate(order[start : start + size]))
            return
        length = known_length(self._data) or float("inf")
        for number, batch in enumerate(self._draw_iterated(sys.maxsize)):
            parts = split_batches([batch], size)
            for place, part in enumerate(parts):
                yield min((number + place / len(parts)) / length, 1.0), self._placed(part)

    def draw_apart(self, samples: int, held_out: int, draws: int = 1) -> tuple[list[Any], list[Any]]:
        """Draw ``samples`` samples, and ``held_out`` more that are not among them.

        Data that hold fewer are shared out (:func:`share_out_samples`). A Dataset too small for all the draws holds the
        same samples out in each of them, so that what is chosen by them was never fitted before.

        Args:
            samples: To fit.
            held_out: To choose by, at the most.
            draws: How many such draws there will be.

        Returns:
            Both as batches.
        """
        if self._indexed and held_out > 0 and self._left() < draws * (samples + held_out):
            return self._draw_reserving(samples, held_out)
        drawn = self.draw(samples + held_out)
        missing, _ = share_out_samples(sum(map(batch_size, drawn)), samples, held_out)
        fitting: list[Any] = []
        apart: list[Any] = []
        for batch in drawn:
            size = batch_size(batch)
            if missing >= size or not is_sliceable(batch):
                (fitting if missing > 0 else apart).append(batch)
            else:
                fitting += [slice_batch(batch, 0, missing)] if missing > 0 else []
                apart.append(slice_batch(batch, max(missing, 0), size))
            missing -= size
        return list(join_batches(fitting, self._size)), list(join_batches(apart, self._size))

    def _draw_reserving(self, samples: int, held_out: int) -> tuple[list[Any], list[Any]]:
        """Do the same from a Dataset; what is held out is drawn once and never fitted."""
        if not self._reserved:
            _, spare = share_out_samples(self._left(), samples, held_out)
            self._reserved = self._permuted()[:spare]
        fitting = self._take(samples, frozenset(self._reserved))
        return list(self._in_batches(fitting)), list(self._in_batches(self._reserved))

    def hold_out(self, samples: int) -> list[Any]:
        """Draw samples that will not be drawn again: a fifth of a Dataset at the most.

        Other data is read from its start again, where it ends, and then gives them again.

        Raises:
            ValueError: If a Dataset holds fewer than five samples.
        """
        if not self._indexed:
            return self.draw(samples)
        if self._left() < 5:
            raise ValueError(f"a fifth of the data is held out: at least five samples are needed, got {self._left()}")
        own = self._permuted()[: min(samples, self._left() // 5)]
        self._barred |= set(own)
        return list(self._in_batches(own))

    def _permuted(self) -> list[int]:
        """Return the indices of a Dataset that may be drawn, in a new order."""
        order: list[int] = torch.randperm(self._count(), generator=self._generator).tolist()
        return [i for i in order if i not in self._barred]

    def _left(self) -> int:
        return self._count() - len(self._barred)

    def _placed(self, batch: Any) -> Any:
        return map_tensors(lambda t: t.to(self._device, copy=t.is_inference()), batch)

    def _count(self) -> int:
        size = known_length(self._data)
        if size is None:
            raise ValueError(f"a Dataset needs a length (__len__), and {type(self._data).__name__} has none")
        if size == 0:
            raise ValueError("the calibration data set is empty: at least one sample is needed")
        return size

    def _collate(self, indices: list[int]) -> Any:
        fetch = getattr(self._data, "__getitems__", None) or (lambda part: [self._data[i] for i in part])
        try:
            with self._own_randomness():
                return default_collate(fetch(indices))
        except (ValueError, OSError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"the data set failed to give a batch of samples: {reason}") from error

    def _take(self, samples: int, barred: Set[int] = frozenset()) -> list[int]:
        """Return the next indices of a Dataset, but for some."""
        barred = barred | self._barred
        take = min(samples, self._count() - len(barred))
        self._order = [i for i in self._order if i not in barred]
        if len(self._order) < take:  # a new permutation; nothing is drawn twice within one draw
            held = set(self._order)
            fresh = [i for i in self._permuted() if i not in barred]
            self._order += [i for i in fresh if i not in held] + [i for i in fresh if i in held]
        indices, self._order = self._order[:take], self._order[take:]
        return indices

    def _in_batches(self, indices: Sequence[int]) -> Iterator[Any]:
        """Yield the samples of a Dataset at some indices, batch by batch."""
        parts = (self._collate(list(indices[i : i + self._size])) for i in range(0, len(indices), self._size))
        return map(self._placed, join_batches(parts, self._size))

    def _draw_iterated(self, samples: int) -> Iterator[Any]:
        if self._shuffled is not None and self._position > 0 and self._position + samples > self._shuffled:
            self._passes, self._rest, self._position, self._read = self._read_passes(), None, 0, 0
        got = 0
        while got < min(samples, self._pass_size or samples):
            batch, self._rest = self._rest if self._rest is not None else next(self._passes), None
            if batch is _END:
                self._pass_size, self._position = self._read, 0
                if self._pass_size == 0:
                    raise ValueError(
                        "the calibration data is empty or exhausted: it gave no sample (a generator can be "
                        "read only once: pass a list, a DataLoader or a Dataset; with drop_last=True no batch may be "
                        "larger than the data)"
                    )
                continue
            size = batch_size(batch)
            surplus = got + size - min(samples, self._pass_size or samples)
            if surplus > 0 and is_sliceable(batch):
                self._rest = slice_batch(batch, size - surplus, size)
                batch = slice_batch(batch, 0, size - surplus)
            taken = min(size, size - surplus) if is_sliceable(batch) else size
            self._position += taken
            got += taken
            yield batch

    def _read_passes(self) -> Iterator[Any]:
        """Yield batch after batch for ever, ``_END`` at the end of each pass."""
        one_shot = isinstance(self._data, Iterator)
        source, remembered = self._data, []
        for passes in itertools.count():
            for batch in self._guarded(source):
                if batch is None:
                    raise ValueError("the calibration data gave None for a batch; leave it out in the loader")
                if batch_size(batch) == 0:
                    continue
                if passes == 0:
                    self._read += batch_size(batch)
                    if one_shot:
                        remembered.append(batch)
                yield in_own_containers(batch) if isinstance(batch, Mapping) else batch
            if one_shot:
                source = remembered
            yield _END

    def _guarded(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield what an iterable gives; loaders that shuffle draw from a random state of the stream's own."""
        with self._own_randomness():
            batches = iter(source)
        while True:
            with self._own_randomness():
                try:
                    batch = next(batches, _END)
                except (ValueError, OSError):
                    raise
                except Exception as error:
                    raise ValueError(f"the calibration data failed: {type(error).__name__}: {error}") from error
            if batch is _END:
                return
            yield batch

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Let what reads torch's global random state read one of the stream's own, and leave the global one.

        Gradients are on or off as they were where the stream was made.
        """
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(self._gradients):
            torch.set_rng_state(self._reading)
            yield
            self._reading = torch.get_rng_state()


def known_length(data: Any) -> int | None:
    """Return the length of a data set or of a loader; None where it has none, or does not say it."""
    try:
        return len(data)
    except Exception:  # a method that is there for form's sake may raise anything
        return None


def _shuffled_samples(data: Any) -> int | None:
    """Return how many samples a pass of a DataLoader has whose order is another each time; None for other data."""
    if not (isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler) and data.batch_size):
        return None
    size = len(data.sampler)
    return size - size % data.batch_size if data.drop_last else size


def share_out_samples(size: int, samples: int, held_out: int) -> tuple[int, int]:
    """Return how many of the samples that there are get fitted, and how many are held out.

    Where there are fewer than are asked for, a fifth is held out, or what is left beside ``samples``, if that is more.

    Args:
        size: Samples that there are.
        samples: To fit, at the most.
        held_out: To hold out, at the most.
    """
    if size >= samples + held_out:
        return samples, held_out
    spare = max(min(held_out, size // 5), size - samples)
    return size - spare, spare


def peek(data: Any, device: torch.device | str = "cpu") -> Any:
    """Return one sample as a batch, or None; reads nothing away, and leaves torch's random state.

    A Dataset and a sequence of batches can be looked at, a DataLoader through its Dataset. Iterators are left alone.

    Args:
        data: As for :class:`CalibrationStream`.
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
            if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
                return default_collate([data[0]])
        if isinstance(data, list | tuple) and data and is_sliceable(data[0]):
            return slice_batch(data[0], 0, 1)
    except Exception:  # what is wrong with the data is said where it is drawn
        return None
    return None
