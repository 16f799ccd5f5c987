"""How long a call takes, for the benchmarks beside this file."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["best_time"]


def best_time(function: Callable[[], object], repeats: int = 3, device: torch.device | None = None) -> float:
    """Return the seconds of the fastest of some calls, after one that warms up; on a GPU, until all of it is done."""

    def call() -> None:
        function()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
