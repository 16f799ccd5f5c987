"""Where the processes of a group meet before a run that they share: what one of them refuses, all refuse.

They leave word in the store through which the group found itself. Nothing is sent over the group: a process that does
not come to a run may be using it for something else.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from swap_prune.distributed import lost, patience, process_count

__all__ = ["Meeting", "all_or_none"]

_PREFIX = "swap-prune meeting"
_LOOK_EVERY = 0.05  # seconds, for those who are not there
_LIMIT = timedelta(minutes=30)  # where the store of the group has none
_GAVE_UP = "it gave up waiting for the others"

_T = TypeVar("_T")


@dataclass
class Meeting:
    """What a process has found out about a run by the time that it would meet the others.

    Attributes:
        shared: Whether they have a part in it; until that is known, they may.
    """

    shared: bool = True


@contextmanager
def all_or_none(possible: bool) -> Iterator[Meeting]:
    """Run a block that every process of a group runs, and that may fail in some of them; then it fails in all.

    Args:
        possible: Whether the others run it too, for all that is known before; else nothing is said or asked.

    Yields:
        The meeting, which the block tells whether they do.

    Raises:
        ValueError: If it failed in another process.
        ConnectionError: If another process does not come for as long as the group waits for its own, or the one that
            holds the store is gone.
    """
    meeting = Meeting()
    if not possible or process_count() < 2:
        yield meeting
        return
    try:
        yield meeting
    except Exception as error:
        if meeting.shared:
            with suppress(ConnectionError):  # the error itself says more
                _Board().say(str(error) or type(error).__name__)
        raise
    if meeting.shared:
        _Board().meet()


class _Board:
    """What the processes of a group say of one meeting. Each counts its own: the same number is the same meeting."""

    def __init__(self) -> None:
        from torch.distributed.distributed_c10d import _get_default_store  # a build of torch may lack it

        self._store = _get_default_store()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._number = self._heard(lambda: self._store.add(f"{_PREFIX} of {self._rank}", 1))

    def say(self, reason: str) -> None:
        """Say why this process does not come; nothing, that it does."""
        with suppress(RuntimeError):  # there may be nobody left to hear it
            self._store.set(self._key(self._rank), reason)

    def meet(self) -> None:
        """Say that this process comes, and wait until all have said so."""
        self.say("")
        try:
            self._wait()
        except BaseException:
            self.say(_GAVE_UP)
            raise

    def _wait(self) -> None:
        """Wait for all others; name those who let one wait."""
        others, warned = [rank for rank in range(self._size) if rank != self._rank], False
        began, limit = time.monotonic(), getattr(self._store, "timeout", _LIMIT).total_seconds()
        while absent := [rank for rank in others if not self._comes(rank)]:  # one that came may give up
            waited = time.monotonic() - began
            if waited > limit:
                raise ConnectionError(f"{self._waiting_for(absent)}; it gave up after {waited:.0f} s")
            if waited > patience().total_seconds() and not warned:
                warned = True
                warnings.warn(self._waiting_for(absent), stacklevel=2)
            time.sleep(_LOOK_EVERY)

    def _comes(self, rank: int) -> bool:
        """Whether a process has said that it comes.

        Raises:
            ValueError: If it has said why it does not.
        """
        if not self._heard(lambda: self._store.check([self._key(rank)])):
            return False
        if reason := self._heard(lambda: self._store.get(self._key(rank))).decode():
            raise ValueError(f"process {rank} of {self._size}: {reason}")
        return True

    def _key(self, rank: int) -> str:
        return f"{_PREFIX} {self._number} of {rank}"

    def _waiting_for(self, absent: list[int]) -> str:
        names = " and ".join(f"process {rank}" for rank in absent)
        return (
            f"process {self._rank} of {self._size} waits for {names} to call prune as well: every process of the group "
            "has to, with the same arguments (a storage by name, such as 'float32', prunes in one alone)"
        )

    def _heard(self, ask: Callable[[], _T]) -> _T:
        try:
            return ask()
        except RuntimeError as error:
            raise lost(self._rank, self._size, error) from error
