"""Calibration data: an endless, reproducible stream of samples drawn from what the caller has.

``data`` may be a map-style ``Dataset`` or a ``DataLoader`` over one (samples are drawn at
random, without repetition until all were seen; :mod:`swap_prune.samples.numbered`), an iterable of batches such as a
list (read in order, each stage going on where the last one stopped, from the start again at the end), or a one-shot
iterator (remembered as it is read). A draw larger than the data returns all of it, once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from swap_prune.randomness import GlobalStates, global_states, global_states_kept, global_states_of, set_global_states
from swap_prune.samples.batches import (
    batch_size,
    in_own_containers,
    is_sliceable,
    join_batches,
    map_tensors,
    slice_batch,
    split_batches,
)
from swap_prune.samples.numbered import NumberedSamples, known_length, own_generators
from swap_prune.samples.peek import digest_of, peek, report_failure
from swap_prune.samples.shares import share_out_samples

__all__ = ["BATCH", "CalibrationStream", "check_data"]

BATCH = 128  # samples, where the stream makes the batches itself
_READING = "reading "  # before the names of states, among what is remembered
_END = object()  # of a pass over the data


def check_data(data: Any, name: str = "data") -> None:
    """Check that data are of a kind that batches can be read of.

    Raises:
        ValueError: If not.
    """
    if isinstance(data, Tensor | str | bytes | Mapping) or not (
        isinstance(data, Dataset | Iterable) or hasattr(data, "__getitem__")
    ):
        raise ValueError(
            f"{name} must be a Dataset or an iterable of batches (inputs, targets), got a {type(data).__name__}"
        )


class CalibrationStream:
    """Draws calibration batches, and remembers where it is in the data.

    Args:
        data: Dataset, DataLoader, iterable of batches, or iterator of batches.
        generator: Random state for drawing samples by number (CPU).
        device: Where the drawn batches are put.
        size: Samples of a batch, at the most, but that a few left over join the last: batches that the data bring are
            joined and split.
        keep: Puts a batch that stays for a while where it is to stay (:mod:`swap_prune.samples.spill`); None: it stays
            where it is.

    Raises:
        ValueError: If ``data`` is neither.
    """

    def __init__(
        self,
        data: Any,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        size: int = BATCH,
        keep: Callable[[Any], Any] | None = None,
    ) -> None:
        check_data(data)
        if isinstance(data, IterableDataset):
            data = DataLoader(data, batch_size=size)
        self._data = data
        self._generator = generator
        self._device = device
        self._size = size
        self._keep = keep
        self._samples = NumberedSamples.of(data)
        self._reading = global_states_of(generator.initial_seed())  # while data is read
        self._gradients = torch.is_grad_enabled()  # the caller's mode; data may be read in the midst of a computation
        self._order: list[int] = []  # numbers of samples that were not drawn yet
        self._reserved: list[int] = []  # numbers of samples that are held out of what is fitted
        self._barred: set[int] = set()  # numbers of samples that are never drawn again
        self._passes = self._read_passes() if self._samples is None else iter(())
        self._pass_size: int | None = None  # samples in one pass, once one was completed
        self._read = 0  # samples read in the first pass
        self._rest: Any = None  # what a draw left of its last batch
        self._taken = 0  # batches and ends of passes, where samples have no numbers
        self._seen = hashlib.sha256()  # of these batches
        self.is_altered = False  # whether data that were read again are not what they were

    def remembered(self) -> dict[str, Tensor]:
        """Return where the stream is, for :meth:`recall`."""
        numbers = {"order": self._order, "reserved": self._reserved, "barred": sorted(self._barred)}
        rest = 0 if self._rest is None else batch_size(self._rest)
        numbers |= {"taken": [self._taken], "rest": [rest], "size": [self._size_so_far()]}
        state = {name: torch.tensor(held, dtype=torch.int64, device="cpu") for name, held in numbers.items()}
        drawing = {f"own {i}": own.get_state() for i, own in enumerate(self._own_generators())}
        reading = {_READING + name: held for name, held in self._reading.tensors().items()}
        return state | drawing | reading | {"drawing": self._generator.get_state(), "digest": self._digest()}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Go to where a stream of the same data was; data that have no numbers are read again up to there.

        ``is_altered`` is true afterwards where they are others, as far as a few samples tell.

        Args:
            state: What :meth:`remembered` returned. The stream must not have gone further.

        Raises:
            ValueError: If there are not as many samples.
        """
        if self._samples is None:
            batch = self._rest
            while self._taken < int(state["taken"]):
                batch = self._next()
            rest = int(state["rest"])
            self._rest = slice_batch(batch, batch_size(batch) - rest, batch_size(batch)) if rest else None
        else:
            self._order, self._reserved = state["order"].tolist(), state["reserved"].tolist()
            self._barred.clear()  # another stream may share it
            self._barred.update(state["barred"].tolist())
            for i, own in enumerate(self._own_generators()):
                own.set_state(state.get(f"own {i}", own.get_state()))
        if self._size_so_far() != int(state["size"]):
            raise ValueError(
                f"the data have changed since the checkpoint: {self._size_so_far()} samples, {int(state['size'])} then"
            )
        self.is_altered = not torch.equal(self._digest(), state["digest"])
        self._generator.set_state(state["drawing"])
        reading = {k.removeprefix(_READING): held for k, held in state.items() if k.startswith(_READING)}
        self._reading = GlobalStates.of_tensors(reading)

    def _size_so_far(self) -> int:
        """Return how many samples there are, or were read in the first pass."""
        return self._read if self._samples is None else known_length(self._samples.dataset) or 0

    def _own_generators(self) -> list[torch.Generator]:
        """Return the random states of samples that have numbers; others are read again with theirs."""
        return [] if self._samples is None else list(own_generators(self._data))

    def _digest(self) -> Tensor:
        """Return a digest of one sample, or of a few numbers of each batch that was read."""
        digest = self._seen if self._samples is None else digest_of(peek(self._data), hashlib.sha256())
        return torch.tensor(list(digest.digest()), dtype=torch.uint8, device="cpu")

    @property
    def has_come_round(self) -> bool:
        """Whether data are read again that have no numbers: nobody knows which were seen."""
        return self._pass_size is not None

    @property
    def holds_out_anew(self) -> bool:
        """Whether what the last :meth:`draw_apart` held out will surely not be held out again by the next."""
        return self._samples is not None and not self._reserved

    def draw(self, samples: int) -> list[Any]:
        """Return batches with ``samples`` samples together, or all the data if it holds fewer.

        Raises:
            ValueError: If the data is empty or exhausted.
        """
        return self.kept(self.read(samples))

    def read(self, samples: int) -> Iterator[Any]:
        """Yield the batches of such a draw one after the other, each read when it is asked for.

        Raises:
            ValueError: If the data is empty or exhausted.
        """
        if self._samples is not None:
            return self._in_batches(self._take(samples))
        parts = (part for batch in self._draw_iterated(samples) for part in split_batches([batch], self._size))
        return map(self._placed, join_batches(parts, self._size))

    def read_pass(self, size: int, generator: torch.Generator) -> Iterator[tuple[float, Any]]:
        """Yield as many samples as the data holds, batch by batch, to train on.

        A Dataset is read in a new order, and so is a DataLoader that shuffles. Other data goes on where it was, in
        batches as they come. No batch has more than ``size`` samples.

        Args:
            size: Samples a batch.
            generator: Random state of a new order (CPU). What ``draw`` draws does not depend on it.

        Yields:
            How much of the pass came before a batch, in [0, 1], and the batch. For data of unknown length it is 0.

        Raises:
            ValueError: If the data is empty or exhausted.
        """
        if self._samples is not None:
            numbers = [i for i in range(self._samples.count()) if i not in self._barred]
            parts = list(self._samples.training_parts(numbers, size, generator))
            *starts, total = itertools.accumulate(map(len, parts), initial=0)
            for start, batch in zip(starts, self._guarded(self._samples.batches(parts)), strict=True):
                yield start / total, self._placed(batch)
            return
        length, done = known_length(self._data) or math.inf, 0
        for part in self._draw_iterated(sys.maxsize, size):
            whole = length if length == math.inf else self._pass_size or self._read / max(1, self._taken) * length
            yield min(done / whole, 1.0), self._placed(part)
            done += batch_size(part)

    def draw_apart(self, samples: int, held_out: int, draws: int = 1) -> tuple[list[Any], list[Any]]:
        """Draw ``samples`` samples, and ``held_out`` more that are not among them; return both as batches.

        Data that hold fewer are shared out (:func:`share_out_samples`). Numbered samples that are too few for all the
        draws are held out alike in each of them, so that what is chosen by them was never fitted before.

        Args:
            samples: To fit.
            held_out: To choose by, at the most.
            draws: How many such draws there will be.
        """
        if self._samples is not None and held_out > 0 and self._left() < draws * (samples + held_out):
            return self._draw_reserving(samples, held_out)
        drawn = self.draw(samples + held_out)
        missing, spare = share_out_samples(sum(map(batch_size, drawn)), samples, held_out)
        fitting, apart = list[Any](), list[Any]()
        for batch in drawn:
            size = batch_size(batch)
            if missing >= size or not is_sliceable(batch):
                (fitting if missing > 0 else apart).append(batch)
            else:
                fitting += [slice_batch(batch, 0, missing)] if missing > 0 else []
                apart.append(slice_batch(batch, max(missing, 0), size))
            missing -= size
        apart = apart if spare > 0 else []  # a few that are left over are too few
        return self.kept(join_batches(fitting, self._size)), self.kept(join_batches(apart, self._size))

    def _draw_reserving(self, samples: int, held_out: int) -> tuple[list[Any], list[Any]]:
        """Draw apart from numbered samples; what is held out is drawn once and never fitted."""
        if not self._reserved:
            _, spare = share_out_samples(self._left(), samples, held_out)
            self._reserved = self._permuted()[:spare]
        fitting = self._take(samples, frozenset(self._reserved))
        return self.kept(self._in_batches(fitting)), self.kept(self._in_batches(self._reserved))

    def hold_out(self, samples: int) -> list[Any]:
        """Draw samples that will not be drawn again: a fifth of a Dataset, or of that of a DataLoader, at the most.

        Other data is read from its start again, where it ends, and then gives them again.

        Raises:
            ValueError: If there are fewer than five samples.
        """
        if self._samples is None:
            return self.draw(samples)
        if self._left() < 5:
            raise ValueError(f"a fifth of the data is held out: at least five samples are needed, got {self._left()}")
        own = self._permuted()[: min(samples, self._left() // 5)]
        self._barred.update(own)
        return self.kept(self._in_batches(own))

    def kept(self, batches: Iterable[Any]) -> list[Any]:
        """Return batches that stay for a while; each is put in its place before the next is read."""
        return list(batches) if self._keep is None else list(map(self._keep, batches))

    def beside(self, data: Any, generator: torch.Generator) -> CalibrationStream:
        """Return a second stream, for BatchNorm's statistics or for training, which changes no draw of this one.

        What :meth:`hold_out` took is left out of it too; also of other data that has as many samples, which are taken
        to be the same ones in another form. What :meth:`draw_apart` holds out of a stage is not: fine-tuning trains on
        it.

        Args:
            data: Its data; None for those of this stream, which is then the stream itself where they have no numbers.
            generator: Random state for drawing (CPU).
        """
        if data is None and self._samples is None:
            return self
        other = CalibrationStream(self._data if data is None else data, generator, self._device, self._size, self._keep)
        if self._samples is not None and other._samples is not None:
            sizes = (known_length(one.dataset) for one in (self._samples, other._samples))
            if len(set(sizes)) == 1:
                other._barred = self._barred
        return other

    def _permuted(self) -> list[int]:
        """Return the numbers that may be drawn, in a new order."""
        order: list[int] = torch.randperm(self._count(), generator=self._generator, device="cpu").tolist()
        return [i for i in order if i not in self._barred]

    def _left(self) -> int:
        return self._count() - len(self._barred)

    def _placed(self, batch: Any) -> Any:
        return map_tensors(lambda t: t.to(self._device, copy=t.is_inference()), batch)

    def _count(self) -> int:
        assert self._samples is not None, "only they have numbers"
        return self._samples.count()

    def _take(self, samples: int, barred: Set[int] = frozenset()) -> list[int]:
        """Return the next numbers, but for some."""
        barred = barred | self._barred
        take = min(samples, self._count() - len(barred))
        self._order = [i for i in self._order if i not in barred]
        if len(self._order) < take:  # a new permutation; nothing is drawn twice within one draw
            held = set(self._order)
            fresh = [i for i in self._permuted() if i not in barred]
            self._order += [i for i in fresh if i not in held] + [i for i in fresh if i in held]
        numbers, self._order = self._order[:take], self._order[take:]
        return numbers

    def _in_batches(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Yield the samples with some numbers, batch by batch."""
        assert self._samples is not None, "only they have numbers"
        parts = [numbers[i : i + self._size] for i in range(0, len(numbers), self._size)]
        return map(self._placed, join_batches(self._guarded(self._samples.batches(parts)), self._size))

    def _draw_iterated(self, samples: int, most: int = sys.maxsize) -> Iterator[Any]:
        """Yield the next samples as they come, large batches in equal parts; what is not asked for stays for later."""
        got = 0
        while got < min(samples, self._pass_size or samples):
            batch, self._rest = self._rest if self._rest is not None else self._next(), None
            if batch is _END:
                continue
            size = batch_size(batch)
            taken = min(size, min(samples, self._pass_size or samples) - got)
            taken //= math.ceil(taken / most)
            if taken < size and is_sliceable(batch):
                self._rest = slice_batch(batch, taken, size)
                batch = slice_batch(batch, 0, taken)
            got += batch_size(batch)
            yield batch

    def _next(self) -> Any:
        """Return the next batch, or that a pass ended."""
        batch = next(self._passes)
        self._taken += 1
        if batch is not _END:
            digest_of(batch, self._seen)
        else:
            self._pass_size = self._read
            if self._pass_size == 0:
                raise ValueError(
                    "the calibration data is empty or exhausted: it gave no sample (a generator can be "
                    "read only once: pass a list, a DataLoader or a Dataset; with drop_last=True no batch may be "
                    "larger than the data)"
                )
        return batch

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
                        batch = self.kept([batch])[0]
                        remembered.append(batch)
                yield in_own_containers(batch) if isinstance(batch, Mapping) else batch
            if one_shot:
                source = remembered
            yield _END

    def _guarded(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield what an iterable gives, with random states of the stream's own in place of the global ones."""
        with self._own_randomness():
            batches = iter(source)
        while True:
            with self._own_randomness():
                try:
                    batch = next(batches, _END)
                except Exception as error:
                    report_failure(error)
            if batch is _END:
                return
            yield batch

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Let what reads the global random states read the stream's own, and leave the global ones.

        Gradients are on or off as they were where the stream was made.
        """
        with global_states_kept(), torch.set_grad_enabled(self._gradients):
            set_global_states(self._reading)
            yield
            self._reading = global_states()
