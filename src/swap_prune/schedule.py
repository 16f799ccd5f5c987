"""Sparsity over the stages of one pruning run.

Every schedule ends exactly at the target. Stage t of T is counted from 1, so that no stage is spent at
sparsity zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "keep_count", "sparsity_schedule"]


def _exponential(t: int, stages: int, target: float) -> float:
    # The distance to the target halves (CHITA's "exp", without its first stage at zero).
    return target * (1 - 2.0**-t) / (1 - 2.0**-stages)


def _cubic(t: int, stages: int, target: float) -> float:
    return target * (1 - (1 - t / stages) ** 3)  # Zhu and Gupta, 2017; the paper's schedule


def _linear(t: int, stages: int, target: float) -> float:
    return target * t / stages


def _geometric(t: int, stages: int, target: float) -> float:
    return 1.0 - math.pow(1 - target, t / stages)


def _constant(t: int, stages: int, target: float) -> float:
    return target


SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "exponential": _exponential,
    "cubic": _cubic,
    "linear": _linear,
    "geometric": _geometric,
    "constant": _constant,
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
    early = (SCHEDULES[schedule](t, stages, float(target)) for t in range(1, stages))
    return (*early, float(target))


def keep_count(total: int, sparsity: float) -> int:
    """Return k, the number of weights kept: ``floor(total * (1 - sparsity))``.

    Raises:
        ValueError: If the sparsity lies outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity!r}")
    return math.floor(total * (1 - sparsity))
