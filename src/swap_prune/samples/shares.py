"""How many of the samples there are get fitted, and how many choose settings and the number of stages."""

from __future__ import annotations

__all__ = ["HELD_OUT", "JUDGED", "share_out_samples"]

HELD_OUT = 512  # samples held out for a method that chooses by them, at most as many as are captured
JUDGED = 1024  # samples that numbers of stages are compared on, at the most; the fewer, the sooner the search ends

_LEAST_HELD_OUT = 4  # fewer choose worse than nothing: steps run away along what one or two of them say


def share_out_samples(size: int, samples: int, held_out: int) -> tuple[int, int]:
    """Return how many of the samples that there are get fitted, and how many are held out.

    Where there are fewer than are asked for, a fifth is held out, or what is left beside ``samples``, if that is more;
    none, where that is less than four.

    Args:
        size: Samples that there are.
        samples: To fit, at the most.
        held_out: To hold out, at the most.
    """
    spare = held_out if size >= samples + held_out else max(min(held_out, size // 5), size - samples)
    return (min(samples, size - spare), spare) if spare >= _LEAST_HELD_OUT else (min(size, samples), 0)
