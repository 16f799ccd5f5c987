"""Sparsity over the stages of one pruning run, and over layers that each keep the same share.

Every schedule ends exactly at the target. Stage t of T is counted from 1, so that no stage is spent at
sparsity zero.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from swap_prune.checks import is_number, whole_number

__all__ = [
    "MOST_STAGES",
    "SCHEDULES",
    "STAGE_COUNTS",
    "TRIED",
    "Course",
    "courses_of",
    "keep_count",
    "share_out",
    "sparsity_schedule",
]

MOST_STAGES = 10_000
STAGE_COUNTS = (1, 4, 16)  # tried in this order, where the number is to be found; from 1 to 2 little changes
TRIED = ("exponential", "cubic")  # where the schedule is to be found


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
        stages: T, from 1 to ``MOST_STAGES``.
        schedule: ``exponential`` (the distance halves), ``cubic``, ``linear``, ``constant``, or
            ``geometric`` (each stage keeps the same fraction of what is left).

    Returns:
        T sparsities, non-decreasing, the last one exactly ``target``.

    Raises:
        ValueError: If an argument is out of range or the schedule is not known.
    """
    if not (is_number(target) and 0 <= target < 1):
        share = f" ({target} % is {target / 100:g})" if is_number(target) and 2 <= target <= 99 else ""
        raise ValueError(f"sparsity must lie in [0, 1), got {target!r}{share}")
    stages = whole_number("stages", stages)
    if stages > MOST_STAGES:
        raise ValueError(f"stages must be {MOST_STAGES} at the most, got {stages}")
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or auto, got {schedule!r}")
    early = (SCHEDULES[schedule](t, stages, float(target)) for t in range(1, stages))
    return (*early, float(target))


class Course(NamedTuple):
    """A way to the target.

    Attributes:
        schedule: Its name.
        sparsities: After each stage.
    """

    schedule: str
    sparsities: tuple[float, ...]


def courses_of(target: float, stages: int | str, schedule: str = "exponential") -> tuple[Course, ...]:
    """Return the courses to choose from, in the order in which they are tried.

    Args:
        target: Final sparsity in [0, 1).
        stages: T; ``"auto"``: one course of each length in ``STAGE_COUNTS``.
        schedule: A name in ``SCHEDULES``; ``"auto"``: the first of ``TRIED``, and where there are stages on the way
            those of the others after them.

    Raises:
        ValueError: If an argument is out of range or the schedule is not known.
    """
    if isinstance(stages, str) and stages != "auto":
        raise ValueError(f"stages must be a whole number of at least 1 or 'auto', got {stages!r}")
    counts = STAGE_COUNTS if isinstance(stages, str) else (stages,)
    first, *others = TRIED if isinstance(schedule, str) and schedule == "auto" else (schedule,)
    own = [Course(first, sparsity_schedule(target, count, first)) for count in counts]
    several = [count for count in counts if count > 1]
    return (*own, *(Course(name, sparsity_schedule(target, count, name)) for name in others for count in several))


def keep_count(total: int, sparsity: float) -> int:
    """Return k, the number of weights kept: ``floor(total * (1 - sparsity))``.

    Raises:
        ValueError: If the sparsity lies outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity!r}")
    return math.floor(total * (1 - float(sparsity)))  # NumPy's half precision ends at 65504


def share_out(keep: int, sizes: Sequence[int]) -> list[int]:
    """Split ``keep`` over parts in proportion to their sizes, in whole numbers that add up exactly.

    Webster's rule: every share is ``size * keep / total``, rounded; what rounding gives too much or too little
    goes where it changes the proportions least. Unlike the rule of largest remainders it is monotone: keeping less
    never gives a part more, so that a later stage asks no layer for weights that an earlier one removed.

    Args:
        keep: Number to split, ``0 <= keep <= sum(sizes)``.
        sizes: Sizes of the parts, >= 0.

    Returns:
        The shares, each at most its part's size.

    Raises:
        ValueError: If there is not enough to keep.
    """
    total = sum(sizes)
    if not 0 <= keep <= total:
        raise ValueError(f"keep must lie in [0, {total}], the sum of the sizes, got {keep}")
    shares = [(2 * keep * size + total) // (2 * total) if total else 0 for size in sizes]
    excess = sum(shares) - keep
    sign = 1 if excess > 0 else -1

    def worth(i: int) -> tuple[Fraction, int, int]:  # the part whose share changes next has the least
        return sign * Fraction(sizes[i], 2 * shares[i] - sign), -sign * i, i

    queue = [worth(i) for i in range(len(sizes)) if shares[i] or sign < 0] if excess else []
    heapq.heapify(queue)
    for _ in range(abs(excess)):
        *_, i = heapq.heappop(queue)
        shares[i] -= sign
        if shares[i] or sign < 0:
            heapq.heappush(queue, worth(i))
    return shares
