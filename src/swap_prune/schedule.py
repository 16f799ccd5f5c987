"""Sparsity over the stages of one pruning run.

Every schedule ends exactly at the target. Stage t of T is counted from 1, so that no stage is spent at
sparsity zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "keep_count", "sparsity_schedule"]


def _exponential(u: float, stages: int) -> float:
    # Halves the distance to the target at each stage (CHITA's "exp", without its first stage at zero).
    return float((1 - 2 ** (-u * stages)) / (1 - 2.0**-stages))


def _cubic(u: float, stages: int) -> float:
    return 1 - (1 - u) ** 3  # Zhu and Gupta, 2017; the paper's schedule


def _linear(u: float, stages: int) -> float:
    return u


def _constant(u: float, stages: int) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float, int], float]] = {
    "exponential": _exponential,
    "cubic": _cubic,
    "linear": _linear,
    "constant": _constant,
    "geometric": lambda u, stages: u,  # in log(1 - sparsity), see sparsity_schedule
}


def sparsity_schedule(target: float, stages: int, schedule: str = "exponential") -> tuple[float, ...]:
    """Return the sparsity of each stage.

    Args:
        target: Final sparsity in [0, 1).
        stages: T >= 1.
        schedule: ``exponential`` (the distance halves), ``cubic``, ``linear``, ``constant``, or
            ``geometric`` (each stage keeps the same fraction of what is left).

    Returns:
        T sparsities, non-decreasing, the last one exactly ``target``.

    Raises:
        ValueError: If an argument is out of range or the schedule is not known.
    """
    if not (isinstance(target, int | float) and 0 <= target < 1):
        raise ValueError(f"sparsity must lie in [0, 1), got {target!r}")
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages must be a whole number of at least 1, got {stages!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    progress = [SCHEDULES[schedule](t / stages, stages) for t in range(1, stages)]
    if schedule == "geometric":
        early = [1 - (1 - target) ** u for u in progress]
    else:
        early = [target * u for u in progress]
    return (*early, float(target))


def keep_count(total: int, sparsity: float) -> int:
    """Return k, the number of weights kept: ``floor(total * (1 - sparsity))``.

    Raises:
        ValueError: If the sparsity lies outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity!r}")
    return math.floor(total * (1 - sparsity))
