"""Calls side by side, each in a process of its own with one thread: for runs that know nothing of each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

__all__ = ["side_by_side"]

_Shared = TypeVar("_Shared")
_Result = TypeVar("_Result")
_GRACE = 5.0  # seconds in which a call that is ended may clear up
_ENDED = 128 + signal.SIGTERM  # exit status
_make: Callable[[], Any] | None = None  # of the process
_made: list[Any] = []  # what it made, once it was asked for
_calling = False  # whether the process is in a call


@contextmanager
def side_by_side(
    function: Callable[..., _Result],
    tasks: Sequence[tuple[Any, ...]],
    processes: int,
    share: Callable[[], _Shared],
) -> Iterator[Iterator[_Result]]:
    """Call a function for each of some tasks; the block reads what it returns, as it comes.

    Results do not depend on the number of processes. All end with the block, or with this process, whatever ends it; an
    interruption from the keyboard is this one's to handle. What they print goes to standard error.

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
        with _signals_later(), _keyboard_blocked():
            calls = [pool.submit(_call, function, task) for task in tasks]
        yield (call.result() for call in as_completed(calls))
    except BaseException as error:
        with _signals_later():
            _end(set(multiprocessing.active_children()) - before)
            pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise MemoryError(
                f"one of {workers} processes was ended from outside, most likely because memory ran out: "
                "let fewer run side by side"
            ) from error
        raise
    with _signals_later():
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Let signals that would end this process half-way through a block wait for its end."""
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return
    seen: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: own for number, own in handlers.items() if own not in (None, signal.SIG_IGN)}
    for number in handled:
        signal.signal(number, lambda number, _frame: seen.append(number))
    try:
        yield
    finally:
        for number, own in handled.items():
            signal.signal(number, own)
        if seen:
            signal.raise_signal(seen[0])


@contextmanager
def _keyboard_blocked() -> Iterator[None]:
    """Let processes that are begun in a block never see Ctrl-C, from their first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(children: set[BaseProcess]) -> None:
    """End processes: they may clear up, for a while."""
    for child in children:
        child.terminate()
    latest = time.monotonic() + _GRACE
    for child in children:
        if not wait([child.sentinel], max(0.0, latest - time.monotonic())):
            child.kill()


def _begin(share: Callable[[], Any]) -> None:
    """Prepare a process: it has one thread, prints no results, and ends when it is told to, or with its parent."""
    global _make
    torch.set_num_threads(1)
    try:
        os.dup2(2, 1)
    except OSError:  # there is no standard error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGTERM, _end_call)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _make = share


class _Ended(BaseException):
    """The call is to clear up, and to end."""


def _end_call(_number: int, _frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _calling:
        raise _Ended
    os._exit(_ENDED)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was begun by another"
    parent.join()
    os._exit(_ENDED)


def _call(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    global _calling
    try:
        _calling = True
        if not _made:
            assert _make is not None, "the process has begun"
            _made.append(_make())
        return function(_made[0], *task)
    except _Ended:
        os._exit(_ENDED)
    finally:
        _calling = False
