"""How long calls take, for the benchmarks beside this file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

__all__ = ["Stopwatch", "best_time", "best_times"]

_T = TypeVar("_T")


def best_time(function: Callable[[], object], repeats: int = 3, device: torch.device | None = None) -> float:
    """Return the seconds of the fastest of some calls, after one that warms up; on a GPU, until all of it is done."""
    return best_times([function], repeats, device)[0]


def best_times(
    functions: Sequence[Callable[[], object]],
    repeats: int = 3,
    device: torch.device | None = None,
    *,
    warm: bool = False,
) -> list[float]:
    """Return the same of functions that are compared, which take turns, since the pace of a machine changes.

    Args:
        functions: What is timed.
        repeats: Turns.
        device: Where they run.
        warm: Whether each has been called before, and need not warm up.
    """

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for function in () if warm else functions:
        seconds(function)
    rounds = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [min(times) for times in zip(*rounds, strict=True)]


class Stopwatch:
    """The seconds of those calls that are made through it, and of nothing between them.

    Attributes:
        seconds: So far.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, function: Callable[[], _T]) -> _T:
        """Call a function, and count the time it takes."""
        start = time.perf_counter()
        result = function()
        self.seconds += time.perf_counter() - start
        return result
