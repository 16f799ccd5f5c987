"""How much memory a run will need, known before any work is done, and how G is to be held.

Every storage has a forecast: the bytes that the process will hold in each phase, what it holds already included. The
fastest one whose largest phase fits the limit is taken. Forecasts come from counts (rows, weights, samples) and from
the bytes that one sample keeps for its backward pass; they are meant to lie above what is then measured.

Place in the pipeline: before everything.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from swap_prune.distributed import PARTS
from swap_prune.fisher.blocked import BLOCK_BYTES
from swap_prune.fisher.capture import saved_bytes
from swap_prune.fisher.storage import Storage, StorageKind
from swap_prune.losses import LossFn
from swap_prune.modes import eval_mode

__all__ = [
    "Forecast",
    "MemoryPlan",
    "StorageName",
    "Workload",
    "check_storage",
    "plan_memory",
    "sample_bytes",
    "scratch_directory",
]

StorageName = Literal["auto", "float32", "bfloat16", "float16", "mapped", "sharded"]

_ORDER: tuple[tuple[StorageKind, bool], ...] = (  # fastest first; (kind, lean)
    ("float32", False),
    ("float32", True),
    ("float16", True),
    ("bfloat16", True),
    ("mapped", True),
    ("sharded", True),  # never by itself: the pipeline asks for it where there are processes
)
_LIBRARIES = 200 * 2**20  # code and heaps that torch touches only once it computes
_CHUNK = 512 * 2**20  # of samples at capture; a quarter of a GiB of columns is copied beside it by a Gram matrix
_GRAM = 512 * 2**20  # two copies of a block of columns
_VECTORS = 24  # p-sized arrays that the solver and the pipeline hold at once
_SQUARES = 6  # n x n arrays in float64: Gram matrices, factors, plans
_BACKWARD = 2  # what a backward pass holds, in units of what was kept for it
_FORWARD = 0.5  # what a forward pass alone holds, in the same unit
_BATCH, _SLOPE_BATCH, _MINI_BATCH = 128, 64, 16  # samples: of a batch drawn, of a slope, of a row with statistics
_PROBE = 32  # rows that the defence looks at
_EXCHANGE = 0.08 * 28  # swaps copy so many bytes a row and kept weight: 4 x 2 % of the columns, in float64 thrice
_COUPLING_ROWS = 256  # copied by the choice of a coupling
_WHOLE = 50_000  # WoodFisher inverts up to so many weights together


@dataclass(frozen=True)
class Workload:
    """What the need of a run depends on.

    Attributes:
        rows: n, rows of G.
        samples: Calibration samples a stage.
        weights: p.
        kept: k of the stage that keeps most.
        method: Name of the method.
        itemsize: Bytes of an entry of a gradient.
        kept_bytes: Bytes that one sample keeps for its backward pass.
        mini_batches: Whether a row is the gradient of a mini-batch.
        row_noise: Whether a noise model changes the rows of G.
        held: Bytes that the process holds already, the model included.
        processes: How many share G, in storage ``sharded``.
    """

    rows: int
    samples: int
    weights: int
    kept: int
    method: str
    itemsize: int = 4
    kept_bytes: int = 0
    mini_batches: bool = False
    row_noise: bool = False
    held: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Forecast:
    """The need of one storage.

    Attributes:
        storage: Which.
        phases: Phase to bytes held in it.
        disk: Bytes of a file.
        obstacle: Why it cannot be taken, or empty.
    """

    storage: Storage
    phases: dict[str, int]
    disk: int
    obstacle: str

    @property
    def name(self) -> str:
        """The storage in a word or two."""
        dense = self.storage.kind == "float32"
        return "float32 (no copies)" if dense and self.storage.lean else self.storage.kind

    @property
    def need(self) -> int:
        """Bytes held in the phase that needs most."""
        return max(self.phases.values())


@dataclass(frozen=True)
class MemoryPlan:
    """All forecasts, and which one is taken.

    Attributes:
        limit: Bytes that the process may hold; None where nobody knows.
        forecasts: The candidates, fastest first.
        chosen: The one taken.
        why: The reason, in words.
    """

    limit: int | None
    forecasts: tuple[Forecast, ...]
    chosen: Forecast | None
    why: str

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
            {"storage": f.name, "need": f.need, "phases": f.phases, "disk": f.disk, "obstacle": f.obstacle}
            for f in self.forecasts
        ]
        chosen = None if self.chosen is None else self.chosen.name
        return {"limit": self.limit, "storage": chosen, "why": self.why, "forecasts": rows}


def check_storage(storage: str) -> None:
    """Refuse a storage that does not exist.

    Raises:
        ValueError: If it is none of the known ones.
    """
    if storage not in get_args(StorageName):
        raise ValueError(f"storage must be one of {', '.join(get_args(StorageName))}, got {storage!r}")


def sample_bytes(model: nn.Module, loss_fn: LossFn, sample: Any) -> int:
    """Return the bytes that a batch of one sample keeps for its backward pass, parameters apart.

    What cannot be run counts as nothing: the run itself will say what is wrong.
    """
    own = (*model.parameters(), *model.buffers())
    try:
        with eval_mode(model):
            return saved_bytes(lambda: loss_fn(model, sample), own)
    except Exception:  # whatever the caller's model or loss raises
        return 0


@contextmanager
def scratch_directory(storage: Storage) -> Iterator[Storage]:
    """Give a storage that needs it a directory of its own, deleted at the end.

    Raises:
        ValueError: If it cannot be made.
    """
    if storage.kind != "mapped":
        yield storage
        return
    try:
        directory = tempfile.TemporaryDirectory(prefix="swap-prune-", dir=storage.scratch)
    except OSError as error:
        raise ValueError(f"scratch must be a directory to write to, got {str(storage.scratch)!r}: {error}") from error
    with directory as path:
        yield replace(storage, scratch=Path(path))


def plan_memory(
    load: Workload, limit: int | None, storage: str = "auto", scratch: str | Path | None = None
) -> MemoryPlan:
    """Choose how G is held.

    Args:
        load: The run.
        limit: Bytes that the process may hold; None: no limit is known, and the fastest storage is taken.
        storage: One that must be taken, or ``"auto"``.
        scratch: Directory of a file; by default the system's for temporary files.
    """
    check_storage(storage)
    directory = Path(tempfile.gettempdir() if scratch is None else scratch)
    forecasts = tuple(
        _forecast(load, kind, lean, limit, directory)
        for kind, lean in _ORDER
        if storage == kind or (storage == "auto" and kind != "sharded")
    )
    chosen = next((f for f in forecasts if not f.obstacle), None)
    if chosen is None:
        return MemoryPlan(limit, forecasts, None, _refusal(load, limit, storage, directory, forecasts))
    if chosen is forecasts[0]:
        why = "asked for" if storage != "auto" else "the fastest, and it fits"
    else:
        passed = forecasts[: forecasts.index(chosen)]
        why = "; ".join(f"{f.name}: {f.obstacle}" for f in passed)
    return MemoryPlan(limit, forecasts, chosen, why)


def _forecast(load: Workload, kind: StorageKind, lean: bool, limit: int | None, directory: Path) -> Forecast:
    disk = load.rows * load.weights * load.itemsize if kind == "mapped" else 0
    forecast = Forecast(Storage(kind, lean, directory), _phases(load, kind, lean), disk, "")
    if load.row_noise and kind != "float32":
        return replace(forecast, obstacle="noise on gradients needs them in float32")
    if limit is not None and forecast.need > limit:
        phase = max(forecast.phases, key=forecast.phases.__getitem__)
        return replace(
            forecast,
            obstacle=f"{phase} needs about {forecast.need / 1e9:.1f} GB, and memory allows {limit / 1e9:.1f} GB",
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


def _phases(load: Workload, kind: StorageKind, lean: bool) -> dict[str, int]:
    """Return the bytes that the process holds in each phase."""
    vector, n = load.itemsize * load.weights, load.rows
    own = min(load.weights, -(-PARTS // load.processes) * -(-load.weights // PARTS))  # of the columns
    factors = {"float32": n * vector, "mapped": 0, "sharded": n * load.itemsize * own}
    factor = factors.get(kind, 2 * n * load.weights)
    common = load.held + _LIBRARIES + 3 * vector + factor  # copies of the model's weights: to restore, and to teach
    probe = min(_PROBE, n) * vector
    blocks = 4 * BLOCK_BYTES if lean else min(_GRAM, 2 * n * load.kept * load.itemsize)
    solve = common + _VECTORS * vector + _SQUARES * 8 * n * n + blocks
    copies, slopes = 0, (2 if kind != "sharded" else 3 + -(-PARTS // load.processes)) * vector
    if not lean:
        copies = _column_copies(load)
        slopes = -(-load.samples // _SLOPE_BATCH) * vector
    step = min(copies, n * load.kept * load.itemsize)  # a natural-gradient step keeps its columns during trials
    forward = int(_FORWARD * min(_BATCH, load.samples) * load.kept_bytes)
    backward = _BACKWARD * min(_SLOPE_BATCH, load.samples) * load.kept_bytes
    return {
        "capture": common + _capture(load, kind, lean) + forward,
        "defend": common + 6 * probe,
        "solve": solve + copies,
        "trials": solve - blocks + step + slopes + max(forward, backward),
    }


def _capture(load: Workload, kind: StorageKind, lean: bool) -> int:
    """Return what capture holds beside the rows that are done."""
    vector = load.itemsize * load.weights
    if load.mini_batches:
        return _BACKWARD * _MINI_BATCH * load.kept_bytes + 3 * vector
    budget = _CHUNK // 8 if lean else _CHUNK
    chunk = max(1, min(_BATCH, load.rows, budget // (load.kept_bytes + vector)))
    buffered = 1 if kind != "float32" else 0
    return chunk * (_BACKWARD * load.kept_bytes + (1 + buffered) * vector) + 2 * vector


def _column_copies(load: Workload) -> int:
    """Return the bytes of columns of G that the method copies at once, where nothing holds it back."""
    n, k, p = load.rows, load.kept, load.weights
    if load.method in ("lr", "ewr"):
        coupled = min(n, _COUPLING_ROWS) * p * load.itemsize if load.method == "ewr" else 0
        return max(2 * n * k * load.itemsize, int(_EXCHANGE * n * k), coupled)
    if load.method == "chita":
        return int(1.5 * n * k) * load.itemsize
    return 4 * 8 * n * min(p, _WHOLE) if load.method == "woodfisher" else 0


def _refusal(load: Workload, limit: int | None, storage: str, directory: Path, forecasts: tuple[Forecast, ...]) -> str:
    """Say that nothing fits, and how many samples would."""
    least = min(forecasts, key=lambda f: f.need)
    reason = least.obstacle if len(forecasts) == 1 else "; ".join(f"{f.name}: {f.obstacle}" for f in forecasts)
    asked = "" if storage == "auto" else f" in storage {storage!r}"
    if limit is None or any(f.need <= limit for f in forecasts):  # memory is not what stands in the way
        return f"G cannot be held{asked}: {reason}"
    per_row = max(1, load.samples // load.rows)
    low, high = 0, load.rows  # most rows that fit: the need grows with them
    while high - low > 1:
        middle = (low + high) // 2
        fewer = replace(load, rows=middle, samples=middle * per_row)
        tried = [_forecast(fewer, f.storage.kind, f.storage.lean, limit, directory) for f in forecasts]
        low, high = (middle, high) if any(not f.obstacle for f in tried) else (low, middle)
    remedy = f"use samples={low * per_row} or fewer" if low else "give more memory or select fewer weights"
    held = f" ({load.held / 1e9:.1f} GB of it are held already)" if limit is not None else ""
    return f"{load.samples} samples of {load.weights} weights do not fit{asked}: {reason}{held}; {remedy}"
