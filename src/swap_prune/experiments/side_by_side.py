"""Calls side by side, each in a process of its own with one thread: for runs that know nothing of each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ["side_by_side"]

_Shared = TypeVar("_Shared")
_Result = TypeVar("_Result")
_make: Callable[[], Any] | None = None  # of the process
_made: list[Any] = []  # what it made, once it was asked for


@contextmanager
def side_by_side(
    function: Callable[..., _Result],
    tasks: Sequence[tuple[Any, ...]],
    processes: int,
    share: Callable[[], _Shared],
) -> Iterator[Iterator[_Result]]:
    """Call a function for each of some tasks; the block reads what it returns, as it comes.

    Results do not depend on the number of processes. All end with the block, or with this process, whatever ends it; an
    interruption from the keyboard is this one's to handle.

    Args:
        function: Called with what is shared and the parts of a task. All of them, and what it returns, go through a
            pipe (:mod:`pickle`), the function by its name.
        tasks: The first ones are begun first.
        processes: As many at once, at the most.
        share: Called once in each process: what all its calls share.

    Raises:
        MemoryError: If a process is gone: that is what it looks like where memory ran out.
        Exception: What a call raises.
    """
    before = set(multiprocessing.active_children())
    workers = max(1, min(processes, len(tasks)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (share,))
    try:
        with _unhurt_by_keyboard():
            calls = [pool.submit(_call, function, task) for task in tasks]
        yield (call.result() for call in as_completed(calls))
    except BrokenProcessPool as error:
        raise MemoryError(
            f"one of {workers} processes was ended from outside, most likely because memory ran out: "
            "let fewer run side by side"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
            child.join()


@contextmanager
def _unhurt_by_keyboard() -> Iterator[None]:
    """Let processes that are begun in a block never see an interruption; that of this one comes after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(share: Callable[[], Any]) -> None:
    """Prepare a process: it has one thread, and ends with the one that began it."""
    global _make
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _make = share


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was begun by another"
    parent.join()
    os._exit(1)


def _call(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    if not _made:
        assert _make is not None, "the process has begun"
        _made.append(_make())
    return function(_made[0], *task)
