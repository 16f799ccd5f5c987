"""How much memory a run will need, known before any work is done, and how G is to be held.

Every storage has a forecast (:mod:`swap_prune.memory.forecast`): the bytes that the process will hold in each phase,
what it holds already included. The fastest one whose largest phase fits the limit is taken; one that changes what G is,
beyond rounding, only if it is asked for.

Place in the pipeline: before everything.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from swap_prune.checks import user_path
from swap_prune.fisher.storage import AT_ONCE, HOLDING_NO_ROWS, Storage, StorageKind
from swap_prune.memory.forecast import Workload, held_of_g, memory_phases
from swap_prune.samples.spill import Spilled

__all__ = [
    "Forecast",
    "MemoryPlan",
    "Workload",
    "check_storage",
    "plan_memory",
]

_NAMES = ("auto", *get_args(StorageKind))

_ORDER: tuple[tuple[StorageKind, bool], ...] = (  # fastest first; (kind, lean)
    ("float32", False),
    ("float32", True),
    ("float16", True),
    ("bfloat16", True),
    ("mapped", True),
    ("matrix-free", True),
    ("low-rank", True),
    ("sharded", True),  # never by itself: the pipeline asks for it where there are processes
)
_SPARING: tuple[tuple[int, Spilled], ...] = (  # samples at once, and what is spilled: the first that fits
    (AT_ONCE, "nothing"),
    (AT_ONCE, "samples"),
    (AT_ONCE // 2, "nothing"),
    (AT_ONCE // 2, "samples"),
    (AT_ONCE // 4, "nothing"),
    (AT_ONCE // 4, "samples"),
    (AT_ONCE // 4, "activations"),
    (AT_ONCE // 8, "activations"),
)
_OFFERED = 0.98  # of the memory, that samples are offered for: what a process holds grows a little from call to call
_AT_MOST = 0.99  # of it, where these would be few
_SHRINK = 0.97  # from one number of samples that is tried to the next
_FEW, _LEAST = 100, 16  # samples
_BY_NAME = "approximates G, and is taken only where it is asked for"


@dataclass(frozen=True)
class Forecast:
    """The need of one storage.

    Attributes:
        storage: Which.
        phases: Phase to bytes held in it.
        gradients: Bytes of G itself, of one kind of rows, that are held in memory.
        disk: Bytes of files.
        obstacle: Why it cannot be taken, or empty.
    """

    storage: Storage
    phases: dict[str, int]
    gradients: int
    disk: int
    obstacle: str

    @property
    def name(self) -> str:
        """The storage in a word or two."""
        dense = self.storage.kind == "float32"
        return "float32 (no copies)" if dense and self.storage.lean else self.storage.kind

    @property
    def exact(self) -> bool:
        """Whether G is the same up to rounding."""
        return self.storage.kind != "low-rank"

    @property
    def need(self) -> int:
        """Bytes held in the phase that needs most."""
        return max(self.phases.values())


@dataclass(frozen=True)
class MemoryPlan:
    """All forecasts, and which one is taken.

    Attributes:
        limit: Bytes that the process may hold on the device where it computes; None where nobody knows.
        forecasts: The candidates, fastest first.
        chosen: The one taken.
        why: The reason, in words.
        samples: Calibration samples a stage that it is for.
        fitting: How many would fit, where so many do not; 0: few or none, or memory is not what stands in the way.
    """

    limit: int | None
    forecasts: tuple[Forecast, ...]
    chosen: Forecast | None
    why: str
    samples: int = 0
    fitting: int = 0

    @property
    def place(self) -> int:
        """The place of what is taken among the forecasts: the lower the faster."""
        return next(place for place, forecast in enumerate(self.forecasts) if forecast is self.chosen)

    def without_comparing(self) -> MemoryPlan:
        """Return the plan of a run that takes one kind of rows alone."""
        forecasts = tuple(replace(f, storage=replace(f.storage, compares_rows=False)) for f in self.forecasts)
        chosen = None if self.chosen is None else forecasts[self.place]
        return replace(self, forecasts=forecasts, chosen=chosen)

    def __str__(self) -> str:
        """Return the need of each storage and why one is taken, in a line each."""
        lines = [
            f"{forecast.name:<20} {_shown(forecast.need):>10}{'  taken' if forecast is self.chosen else ''}"
            for forecast in self.forecasts
        ]
        return "\n".join([*lines, self.why])

    def require(self) -> Forecast:
        """Return the forecast taken.

        Raises:
            ValueError: If nothing fits.
        """
        if self.chosen is None:
            raise ValueError(self.why)
        return self.chosen

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        rows = [
            {
                "storage": f.name,
                "at_once": f.storage.at_once,
                "spilled": f.storage.spilled,
                "need": f.need,
                "phases": f.phases,
                "gradients": f.gradients,
                "disk": f.disk,
                "obstacle": f.obstacle,
            }
            for f in self.forecasts
        ]
        chosen = None if self.chosen is None else self.chosen.name
        plain = {"limit": self.limit, "storage": chosen, "samples": self.samples, "why": self.why}
        return plain | {"forecasts": rows}


def check_storage(storage: str) -> None:
    """Refuse a storage that does not exist.

    Raises:
        ValueError: If it is none of the known ones.
    """
    if storage not in _NAMES:
        raise ValueError(f"storage must be one of {', '.join(_NAMES)}, got {storage!r}")


def plan_memory(
    load: Workload,
    limit: int | None,
    storage: str = "auto",
    scratch: str | Path | None = None,
    kept: Storage | None = None,
) -> MemoryPlan:
    """Choose how G is held.

    Args:
        load: The run.
        limit: Bytes that the process may hold; None: no limit is known, and the fastest storage is taken.
        storage: One that must be taken, or ``"auto"``.
        scratch: Directory of a file; by default the system's for temporary files.
        kept: One that the first stages of the same run were held in; it is taken where it fits.
    """
    check_storage(storage)
    directory = _temporary() if scratch is None else user_path(scratch)
    if kept is not None and storage in ("auto", kept.kind):
        own = load if kept.compares_rows else replace(load, compared=0)
        again = _attempt(own, replace(kept, scratch=directory), limit, directory)
        if not again.obstacle:
            others = _forecasts(own, limit, storage, directory)
            same = (kept.kind, kept.lean)
            forecasts = tuple(again if (f.storage.kind, f.storage.lean) == same else f for f in others)
            return MemoryPlan(limit, forecasts, again, "the same as in the finished stages", load.samples)
    plan = _choose(load, limit, storage, directory)
    if load.compared and (plan.chosen is None or plan.place > 0):  # a faster storage is worth more than to compare rows
        alone = _choose(replace(load, compared=0), limit, storage, directory).without_comparing()
        if plan.chosen is None or (alone.chosen is not None and alone.place < plan.place):
            return alone
    return plan


def _temporary() -> Path:
    """Return the system's directory for temporary files, or where it would be: whoever needs it is told."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return Path("/tmp")


def _forecasts(load: Workload, limit: int | None, storage: str, directory: Path) -> tuple[Forecast, ...]:
    return tuple(
        _forecast(load, kind, lean, limit, directory)
        for kind, lean in _ORDER
        if storage == kind or (storage == "auto" and kind != "sharded")
    )


def _choose(load: Workload, limit: int | None, storage: str, directory: Path) -> MemoryPlan:
    """Choose the fastest storage that fits."""
    forecasts = _forecasts(load, limit, storage, directory)
    chosen = next((f for f in forecasts if not f.obstacle and (storage != "auto" or f.exact)), None)
    if storage == "auto":
        forecasts = tuple(f if f.exact or f.obstacle else replace(f, obstacle=_BY_NAME) for f in forecasts)
    if chosen is None:
        why, fitting = _refusal(load, limit, storage, directory, forecasts)
        return MemoryPlan(limit, forecasts, None, why, load.samples, fitting)
    if chosen is forecasts[0]:
        why = "asked for" if storage != "auto" else "the fastest, and it fits"
    else:
        passed = [f for f in forecasts[: forecasts.index(chosen)] if f.exact]
        why = "; ".join(f"{f.name}: {f.obstacle}" for f in passed)
    return MemoryPlan(limit, forecasts, chosen, why, load.samples)


def _forecast(load: Workload, kind: StorageKind, lean: bool, limit: int | None, directory: Path) -> Forecast:
    """Return the need of a storage with as little spared as fits; else of the way that comes nearest to it."""
    ways = [
        Storage(kind, lean, directory, at_once=n, spilled=spilled)
        for n, spilled in _SPARING
        if spilled == "nothing" or (load.can_spill and kind != "sharded")
    ]
    if load.device.type == "cuda" and kind not in HOLDING_NO_ROWS and not load.in_batches:
        ways.insert(0, replace(ways[0], roomy=True))
    tried = [_attempt(load, way, limit, directory) for way in ways]
    fitting = [one for one in tried if limit is None or one.need <= limit]
    usable = [one for one in fitting if not one.obstacle]
    return (usable or fitting or [min(tried, key=lambda one: one.need)])[0]


def _attempt(load: Workload, storage: Storage, limit: int | None, directory: Path) -> Forecast:
    """Return the need of a storage that spares as much as it says, and what stands in its way."""
    kind = storage.kind
    phases = memory_phases(load, storage)
    disk = (load.rows + load.compared) * load.weights * load.itemsize if kind == "mapped" else 0
    if storage.spilled != "nothing":
        disk += (load.samples + load.spare + load.judged) * load.sample_bytes
    if storage.spilled == "activations":
        disk += max(storage.at_once, load.mini_batch) * load.kept_bytes
    forecast = Forecast(storage, phases, held_of_g(load, kind), disk, "")
    if load.row_noise and kind != "float32":
        remedy = ", which storage='float32' holds whole in each process" if kind == "sharded" else ""
        return replace(forecast, obstacle=f"noise on gradients needs them in float32{remedy}")
    if load.unsuited and kind == "low-rank":
        return replace(forecast, obstacle=f"{load.unsuited}; use another storage, such as 'matrix-free'")
    if limit is not None and forecast.need > limit:
        phase = max(phases, key=phases.__getitem__)
        return replace(
            forecast,
            obstacle=f"{phase} needs about {_shown(forecast.need)}, and memory allows {_shown(limit)}",
        )
    if disk:
        try:
            free = shutil.disk_usage(directory).free
        except OSError as error:
            return replace(forecast, obstacle=f"{directory} cannot be used ({error.strerror}); name another scratch=")
        if disk > free:
            text = f"its file needs {disk / 1e9:.1f} GB, and {directory} has {free / 1e9:.1f} GB free"
            return replace(forecast, obstacle=f"{text}; name another scratch=")
    return forecast


def _fitting(load: Workload, limit: int, directory: Path, forecasts: Sequence[Forecast]) -> int:
    """Return how many samples fit in one of some storages, within a few per cent; 0 where none do.

    Fewer need not need less: of few samples signs are drawn more often.
    """
    samples = load.samples
    while samples > 0:
        tried = [_forecast(load.of(samples), f.storage.kind, f.storage.lean, limit, directory) for f in forecasts]
        if any(not f.obstacle for f in tried):
            return samples
        samples = int(_SHRINK * samples)
    return 0


def _fewer(load: Workload, limit: int, directory: Path, forecasts: Sequence[Forecast]) -> tuple[str, int]:
    """Say how many samples would fit, in words and as a number, 0 where they would be few."""
    fitting = _fitting(load, int(_OFFERED * limit), directory, forecasts)
    if fitting >= _FEW:
        return f"use samples={fitting}", fitting
    fitting = _fitting(load, int(_AT_MOST * limit), directory, forecasts)
    if fitting >= _FEW:
        return f"use samples={fitting}", fitting
    more = "give more memory or select fewer weights; magnitude, wanda and sparsegpt hold no gradients"
    return f"use samples={fitting}, which are few, or {more}" if fitting >= _LEAST else more, 0


def _shown(size: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB" if size >= 1e4 else f"{size} bytes"


def _refusal(
    load: Workload, limit: int | None, storage: str, directory: Path, forecasts: tuple[Forecast, ...]
) -> tuple[str, int]:
    """Say that nothing fits, and how many samples would; see :class:`MemoryPlan`."""
    offer = next((f for f in forecasts if f.obstacle == _BY_NAME), None)
    forecasts = tuple(f for f in forecasts if f is not offer and (storage != "auto" or f.exact))
    least = min(forecasts, key=lambda f: f.need)
    reason = least.obstacle if len(forecasts) == 1 else "; ".join(f"{f.name}: {f.obstacle}" for f in forecasts)
    asked = "" if storage == "auto" else f" in storage {storage!r}"
    offered = "" if offer is None else "; or storage='low-rank', which fits, and approximates G"
    if limit is None or any(f.need <= limit for f in forecasts):  # memory is not what stands in the way
        return f"G cannot be held{asked}: {reason}{offered}", 0
    if max(least.phases, key=least.phases.__getitem__) == "finetune":
        remedy = f"lower its batch_size (now {load.trained}), or give more memory"
        return f"fine-tuning does not fit: {least.obstacle}; {remedy}", 0
    remedy, fitting = "give more than that", 0
    if load.held < limit:
        remedy, fitting = _fewer(load, limit, directory, forecasts)
    held = f" ({_shown(load.held)} are held already)"
    why = f"{load.samples} samples of {load.weights} weights do not fit{asked}: {reason}{held}; {remedy}{offered}"
    return why, fitting
