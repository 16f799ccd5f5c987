"""The memory budget: how much a run will need, known before any work is done."""

from __future__ import annotations

import math
import os
import re

__all__ = ["check_memory", "parse_memory"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OVERHEAD = 2**29  # interpreter, network, activations of a chunk and the solver's blocks of columns
_VECTORS = 24  # p-sized arrays that the solver and the pipeline hold at once
_SQUARES = 6  # n x n arrays in float64: Gram matrices, factors, plans


def parse_memory(budget: str | int) -> int:
    """Return a budget in bytes, from bytes or text such as ``"4GB"`` or ``"512MiB"``.

    Raises:
        ValueError: If it is not a positive amount of memory.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(budget).strip().upper())
    if isinstance(budget, bool) or match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"memory must be bytes or an amount such as '4GB' or '512MiB', got {budget!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def check_memory(budget: str | int | None, n: int, p: int, itemsize: int = 4) -> None:
    """Refuse a run whose Fisher factor would not fit.

    Args:
        budget: As for :func:`parse_memory`; None takes nine tenths of what the machine has free.
        n: Calibration samples a stage.
        p: Selected weights.
        itemsize: Bytes a weight.

    Raises:
        ValueError: If the predicted need exceeds the budget.
    """
    limit = parse_memory(budget) if budget is not None else _free_memory()
    if limit is None:
        return
    column, square = itemsize * p, _SQUARES * 8
    need = column * (n + _VECTORS) + square * n * n + _OVERHEAD
    if need > limit:
        spare = limit - _OVERHEAD - column * _VECTORS
        fits = int((math.sqrt(column**2 + 4 * square * spare) - column) / (2 * square)) if spare > 0 else 0
        raise ValueError(
            f"{n} samples of {p} weights need about {need / 1e9:.1f} GB, and memory allows {limit / 1e9:.1f} GB; "
            + (f"use samples={fits} or fewer" if fits else "give more memory or select fewer weights")
        )


def _free_memory() -> int | None:
    """Return nine tenths of the memory that is free, where the system says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024 * 9 // 10
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10
        except (AttributeError, OSError, ValueError):
            return None
