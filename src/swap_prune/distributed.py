"""Several processes that prune one network together, through ``torch.distributed``.

``torchrun`` starts the processes, and ``torch.distributed`` carries what they say: gloo on CPUs, NCCL on GPUs. Each
process (rank) holds the model and all vectors of p; G alone is shared out. So that sums have the same bits whatever the
number of processes, they always run over the same ``PARTS`` parts, each of which one process owns, and the parts are
added up in their order by everyone.

A process that fails closes its connections on the way out, which ends the others where they next wait for it; one that
neither answers nor ends is waited for as long as ``SWAP_PRUNE_TIMEOUT`` says, in seconds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from swap_prune.process_memory import is_out_of_memory, pass_on_shortage
from swap_prune.samples.batches import map_tensors

__all__ = [
    "PARTS",
    "EndedByAnother",
    "Team",
    "check_alone",
    "is_first",
    "launched",
    "local_count",
    "lost",
    "own_device",
    "patience",
    "process_count",
    "team_of",
]

PARTS = 8  # of every sum over the columns of G, and of the calibration batches; as many processes at the most
_TIMEOUT = 25.0  # seconds; torchrun takes 30 more to end what does not end by itself
_PIECE_BYTES = 32 * 2**20  # of what is gathered at once
_ROUNDING = 1e-6  # of losses, such as those of a network that is compared with itself
_STARTED = "TORCHELASTIC_RUN_ID"  # torchrun sets it
_FAILED = "swap-prune failed"  # key of the first failure in the store

_T = TypeVar("_T")


class EndedByAnother(SystemExit):
    """Ends a process quietly: another one has already reported the error."""


@dataclass(frozen=True)
class Team:
    """The processes of one run, and how they speak. Every method is to be called by all of them, in the same order.

    Attributes:
        rank: Which of them this is.
        size: How many there are.
        device: Where what is sent has to lie.
        group: Their connections.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup

    def owned(self, parts: int = PARTS, rank: int | None = None) -> range:
        """Return the parts that belong to this rank, or another one, one after the other; there may be none."""
        rank = self.rank if rank is None else rank
        return range(rank * parts // self.size, (rank + 1) * parts // self.size)

    def add_up(self, own: Tensor, parts: int = PARTS) -> Tensor:
        """Return the sum of the parts of all ranks, added in their order.

        Args:
            own: The parts of this rank, stacked, (len(owned), *shape).
            parts: How many there are in all.

        Returns:
            The sum, (*shape), with the same bits on every rank and for every number of ranks.
        """
        shape, flat = own.shape[1:], own.reshape(len(own), own.shape[1:].numel())
        total = own.new_empty(flat.shape[1])
        width = max(1, _PIECE_BYTES // (parts * own.element_size()))
        for start in range(0, max(1, flat.shape[1]), width):
            piece = slice(start, start + width)
            rows = torch.cat(self._gathered(flat[:, piece], parts))
            total[piece] = rows[0]
            for row in rows[1:]:
                total[piece] += row
        return total.view(shape)

    def concatenate(self, own: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> Tensor:
        """Return the parts of all ranks one after the other.

        Args:
            own: The parts of this rank, flat.
            sizes: Length of each part, of all ranks.
            like: A tensor of their dtype and device.
        """
        rows = like.new_zeros(len(own), max(sizes))
        for row, part in zip(rows, own, strict=True):
            row[: len(part)] = part
        gathered = torch.cat(self._gathered(rows, len(sizes)))
        return torch.cat([row[:size] for row, size in zip(gathered, sizes, strict=True)])

    def overlay(self, own: Tensor) -> Tensor:
        """Sum tensors over ranks, in place; at each position at most one rank has an entry that is not zero.

        So nothing is rounded, in whatever order the sums are taken.
        """
        if self.size > 1:
            self._talk(lambda: dist.all_reduce(own, group=self.group))
        return own

    def agree(self, what: str, value: Any) -> None:
        """Check that all ranks have the same of something.

        Args:
            what: Its name.
            value: Text, or tensors in nested tuples, lists and mappings; what else is there is not looked at.

        Raises:
            ValueError: On every rank, if they have not.
        """
        numbers = list(_digest(value))
        seen = self.gather(torch.tensor(numbers, dtype=torch.int32, device=self.device))
        self._refuse(what, [rank for rank, one in enumerate(seen) if not torch.equal(one, seen[0])])

    def agree_within(self, what: str, own: Tensor, rtol: float = 1e-2) -> None:
        """Check that all ranks have nearly the same numbers: machines may round in their own ways.

        Args:
            what: Their name.
            own: Those of this rank; of one shape on all.
            rtol: How far they may be apart, as a share of the largest, beside what rounding alone may leave.

        Raises:
            ValueError: On every rank, if they have not.
        """
        seen = self.gather(own.detach().to(self.device, torch.float64))
        far = rtol * float(seen[0].nan_to_num(0, 0, 0).abs().max()) + _ROUNDING
        alike = [torch.allclose(one, seen[0], rtol=0, atol=far, equal_nan=True) for one in seen]
        self._refuse(what, [rank for rank, same in enumerate(alike) if not same])

    def _refuse(self, what: str, others: list[int]) -> None:
        """Raise an error if other ranks have not the same of something as the first."""
        if others:
            raise ValueError(
                f"the {self.size} processes must have the same {what}, but process {others[0]} differs from process 0; "
                "give them the same arguments, model and data (a Dataset, or a loader that neither shuffles nor has a "
                "DistributedSampler)"
            )

    def wait(self) -> None:
        """Wait for all ranks."""
        self.overlay(torch.zeros(1, device=self.device))

    def paced(self, function: Callable[..., _T]) -> Callable[..., _T]:
        """Return a function at whose calls all ranks wait for each other, so that none gets far ahead."""

        def called(*arguments: Any) -> _T:
            self.wait()
            return function(*arguments)

        return called

    def take_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of rank 0, to the bit; sparse ones are left."""
        if self.size == 1:
            return
        for tensor in filter(_is_strided, tensors):
            flat = tensor.detach().reshape(-1).view(torch.uint8).to(self.device)
            self._talk(partial(dist.broadcast, flat, group=self.group, group_src=0))
            if flat.data_ptr() != tensor.data_ptr():  # else it was received in its place
                tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))

    def gather(self, own: Tensor) -> list[Tensor]:
        """Return tensors of one shape, of all ranks."""
        if self.size == 1:
            return [own]
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        self._talk(lambda: dist.all_gather(everyone, own.contiguous(), group=self.group))
        return everyone

    def exchange(self, own: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send a piece of a vector to each rank, and return what came from each, one piece after the other.

        Args:
            own: The pieces, (sum(sent),).
            sent: Their lengths, rank by rank.
            received: Lengths of what comes from each rank.
        """
        if self.size == 1:
            return own
        result = own.new_empty(sum(received))
        self._talk(lambda: dist.all_to_all_single(result, own, received, sent, group=self.group))
        return result

    def _gathered(self, own: Tensor, parts: int) -> list[Tensor]:
        """Return the rows (parts of the rank, w) of all ranks."""
        counts = [len(self.owned(parts, rank)) for rank in range(self.size)]
        padded = own if len(own) == max(counts) else torch.cat([own, own.new_zeros(1, own.shape[1])])
        return [rows[:count] for rows, count in zip(self.gather(padded), counts, strict=True)]

    def _talk(self, speak: Callable[[], _T]) -> _T:
        try:
            return speak()
        except RuntimeError as error:
            pass_on_shortage(error)
            raise lost(self.rank, self.size, error) from error


def _digest(value: Any) -> bytes:
    """Return a digest of tensors and text."""
    digest = hashlib.blake2b(digest_size=32)

    def add(tensor: Tensor) -> None:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if not _is_strided(tensor):  # pruning changes none of them
            return
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)

    map_tensors(add, value)
    if isinstance(value, str):
        digest.update(value.encode())
    return digest.digest()


def _is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has a number for each of its entries, as a sparse one has not."""
    return tensor.layout == torch.strided


def lost(rank: int, size: int, error: Exception) -> ConnectionError:
    """Say that the others do not answer."""
    reason = " ".join(str(error).split())[:150]
    return ConnectionError(
        f"process {rank} of {size} lost the others: one of them failed, was ended, or did not answer for "
        f"{patience().total_seconds():.0f} s (SWAP_PRUNE_TIMEOUT); its own output has the cause. ({reason})"
    )


def process_count() -> int:
    """Return how many processes there are in the process group that was initialised; 0 where none was."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def local_count() -> int:
    """Return how many of them share this machine, as far as the launcher says; at least 1."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(count) if count.isdecimal() else process_count())


def is_first() -> bool:
    """Whether this process is the one that prints and writes; one that belongs to no group is, whatever RANK says."""
    if process_count() > 0:
        return dist.get_rank() == 0
    return _STARTED not in os.environ or os.environ.get("RANK", "0") == "0"


def check_alone(command: str) -> None:
    """Refuse a command that several processes would each run for itself.

    Raises:
        ValueError: If ``torchrun`` started more than this one; the others end in silence.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if _STARTED not in os.environ or size == "1":
        return
    if not is_first():
        raise EndedByAnother(2)
    raise ValueError(f"{command} runs in one process, and torchrun started {size}: call it without torchrun")


def own_device(name: str) -> str:
    """Return the device of this process for ``"cuda"``: each of those that were started together takes its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


@contextmanager
def team_of(device: torch.device) -> Iterator[Team]:
    """Give the processes of the initialised group connections of their own for one run, closed at its end.

    Args:
        device: Where the model lies: NCCL speaks for a CUDA device, gloo for all others.

    Raises:
        ValueError: If there is no process group, or it has too many processes.
        ConnectionError: If one of them does not answer.
    """
    size = process_count()
    if size == 0:
        raise ValueError(
            "storage 'sharded' needs several processes: start them with torchrun, or call "
            "torch.distributed.init_process_group first"
        )
    if size > PARTS:
        raise ValueError(f"storage 'sharded' is for {PARTS} processes at the most, got {size}; start fewer")
    rank, cuda = dist.get_rank(), device.type == "cuda" and dist.is_nccl_available()
    try:
        group = dist.new_group(timeout=patience(), backend="nccl" if cuda else "gloo")
    except RuntimeError as error:
        pass_on_shortage(error)
        raise lost(rank, size, error) from error
    try:
        yield Team(rank, size, device if cuda else torch.device("cpu"), group)
    finally:
        with suppress(RuntimeError, ValueError):  # what has failed may refuse to be ended
            dist.destroy_process_group(group)


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did; else do nothing.

    The first of them to fail says why, and the others end in silence.

    Raises:
        EndedByAnother: With status 2 on a process that ends because another one failed.
    """
    if _STARTED not in os.environ or process_count() > 0:
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # a build of torch may lack it

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun itself does for more than one process: sums must not depend on it
    store, rank, size = next(iter(rendezvous("env://")))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    except Exception as error:
        if not _fails_first(store, rank):
            raise EndedByAnother(2) from error
        short = is_out_of_memory(error)
        if (short or isinstance(error, ValueError)) and size > 1:
            raise (MemoryError if short else ValueError)(f"process {rank} of {size}: {error}") from error
        raise
    finally:
        dist.destroy_process_group()


def _fails_first(store: Any, rank: int) -> bool:
    """Whether no other process has failed before; without an answer, this one says what it knows."""
    try:
        return bool(store.compare_set(_FAILED, "", str(rank)) == str(rank).encode())
    except Exception:  # the process that held the store is gone
        return True


def patience() -> timedelta:
    """Return how long a process that does not answer is waited for."""
    text = os.environ.get("SWAP_PRUNE_TIMEOUT", str(_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"SWAP_PRUNE_TIMEOUT must be a number of seconds above 0, got {text!r}")
    return timedelta(seconds=seconds)
