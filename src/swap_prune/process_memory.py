"""The memory of the process, on the device where it computes: what a budget says, what is free, what is held."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from swap_prune.checks import first_line

__all__ = [
    "held_memory",
    "is_out_of_memory",
    "memory_limit",
    "parse_memory",
    "pass_on_shortage",
    "peak_memory",
    "reset_peak_memory",
    "return_free_memory",
    "shortage_named",
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SHARE = 0.9  # of what is free, taken by default
_GROUP_2 = ("memory.max", "memory.current", "inactive_file")  # limit, use, and what of that can be dropped
_GROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_NO_MEMORY = re.compile(  # words of allocators whose errors have no type of their own
    r"can't allocate memory|not enough memory|cannot allocate memory|std::bad_alloc|out of memory|_ALLOC_FAILED", re.I
)


def parse_memory(budget: str | int) -> int:
    """Return a budget in bytes, from bytes or text such as ``"4GB"`` or ``"512MiB"``.

    Raises:
        ValueError: If it is not a positive amount of memory.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(budget).strip().upper())
    size = 0.0 if match is None else float(match[1]) * _UNITS.get(match[2], 0)
    if isinstance(budget, bool) or not 1 <= size < 2**63:
        raise ValueError(f"memory must be bytes or an amount such as '4GB' or '512MiB', got {budget!r}")
    return int(size)


def memory_limit(budget: str | int | None, processes: int = 1, device: torch.device | None = None) -> int | None:
    """Return how many bytes the process may hold, what it holds already included.

    Args:
        budget: As for :func:`parse_memory`; None takes what is held and nine tenths of what is free.
        processes: How many share what is free on this machine; a GPU is taken to be one process's own.
        device: Whose memory is meant; by default the machine's.

    Returns:
        The limit; None where no budget was given and the system does not say what is free.
    """
    if budget is not None:
        return parse_memory(budget)
    free = _free_memory(device)
    if free is None:
        return None
    return held_memory(device) + int(_SHARE * free / (1 if _is_gpu(device) else processes))


def share_of_free_memory(processes: int) -> int | None:
    """Return the bytes that each of several processes may hold, none of which has begun; None where nobody knows."""
    free = _free_memory(None)
    return None if free is None else int(_SHARE * free / processes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory. Then it says nothing of the network or the data."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def pass_on_shortage(error: BaseException) -> None:
    """Raise an error again if memory ran out: handlers of all errors pass what they caught through here first."""
    if is_out_of_memory(error):
        raise error


@contextmanager
def shortage_named() -> Iterator[None]:
    """Run a block; where there is no memory it ends with what can be done.

    Raises:
        MemoryError: If there was none.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise MemoryError(
            f"there was not enough memory ({reason}): say with memory= how much there is, or use fewer samples, "
            "storage='mapped' or 'matrix-free'"
        ) from error


def held_memory(device: torch.device | None = None) -> int:
    """Return the bytes that the process holds.

    Args:
        device: A GPU, whose tensors are counted; by default all that the process holds in the machine's memory:
            interpreter, libraries, the model and whatever else was loaded.
    """
    if _is_gpu(device):
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as line:
            return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # no Linux: the largest so far is a bound
        return _largest_so_far()


def return_free_memory() -> None:
    """Give memory back that was freed and that the C library keeps for later, where it can be told to (glibc)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Forget the largest memory so far; of the machine's, only Linux can."""
    if _is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device | None = None) -> int:
    """Return the most bytes that were held since the reset, or by the whole process where there is no reset.

    Args:
        device: As for :func:`held_memory`.
    """
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None, "Linux always states it"
        return int(found[1]) * 1024
    except OSError:
        return _largest_so_far()


def _largest_so_far() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _free_memory(device: torch.device | None) -> int | None:
    """Return the memory that is free, where the system says; on a GPU, with what torch keeps there for later.

    Neither what a container may take, nor what the process may, is more than that.
    """
    if _is_gpu(device):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = [_free_on_machine(), _free_in_group(), _free_to_process()]
    return min((one for one in found if one is not None), default=None)


def _free_to_process() -> int | None:
    """Return the addresses that are left to the process, where they are limited (``ulimit -v``)."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    try:
        with open("/proc/self/statm", encoding="ascii") as line:
            return max(0, most - int(line.read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError):
        return None


def _free_in_group(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return what the process's control groups leave it, as those of containers; pages of files can be dropped.

    Args:
        root: Where the groups are mounted, of the second version, or of the first.
        own: What says which of them is the process's.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError):
        return None
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _GROUP_1) if controllers else (root, _GROUP_2)
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                found += _left_in(folder, *names)
    return min(found, default=None)


def _left_in(folder: Path, limit: str, used: str, droppable: str) -> list[int]:
    """Return what is left in a control group, where it has a limit."""
    try:
        most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
        fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return [max(0, most - now + int(fields.get(droppable, 0)))]
    except (OSError, ValueError):  # none, or "max"
        return []


def _free_on_machine() -> int | None:
    """Return the memory of the machine that is free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
