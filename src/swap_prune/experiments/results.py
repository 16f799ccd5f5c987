"""The results of an experiment on disk: one JSON line a run, that no interruption can damage.

A directory holds ``config.json``, what was asked for; ``results.jsonl``; and ``.lock``, held by the one process that
writes. Every line is forced to the disk before the next run starts. A line that an interruption tore is cut off when
the experiment is resumed, and its run is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from swap_prune.checks import user_path
from swap_prune.experiments.config import comparable
from swap_prune.files import force_to_disk, replacing

__all__ = ["Results", "RunResult", "check_directory", "open_results", "read_results", "shortest"]

_CONFIG, _RESULTS, _LOCK, _SCRATCH = "config.json", "results.jsonl", ".lock", ".config.json"


_Percent = Annotated[float, Field(ge=0, le=100)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Seconds = Annotated[float, Field(ge=0, lt=1e10)]
_Bytes = Annotated[int, Field(ge=0, lt=2**63)]


class _Settings(BaseModel):
    """What reports read of a run's settings."""

    model_config = ConfigDict(strict=True)

    model: str
    data: str
    samples: int
    schedule: str
    recalibrate_batchnorm: bool
    sparsity: float = Field(ge=0, lt=1)
    stages: int | str
    noise: str
    targets: list[str] = []
    finetune: dict[str, Any] = {}


class RunResult(BaseModel):
    """One line of ``results.jsonl``. What was not measured is None; so is all of it for a run that failed.

    Attributes:
        id: Hash of ``settings`` and ``seed``.
        label: The method's name in tables.
        seed: Seed of the run.
        settings: All else that the result depends on.
        error: Why the run failed; None if it did not.
        accuracy: Of the pruned network on the test images, in percent.
        loss: Its mean cross-entropy.
        accuracy_before: Accuracy with the dense network's BatchNorm statistics, where that was asked for.
        loss_before: Loss with them.
        dense_accuracy: Accuracy of the dense network.
        test_samples: Number of test images.
        kept: Non-zero weights among those selected.
        total: Selected weights.
        layers: Parameter name to its sparsity.
        evidence: What the method chose and why, one table a stage.
        notes: What a reader should know.
        converged: Whether the method came to an end by itself in every stage, and not by a limit.
        versions: Of Python, torch and swap-prune.
        seconds: Wall-clock seconds of ``prune``.
        peak_memory: Largest memory of the process while it ran, in bytes; on a GPU, what its tensors took there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str
    label: str
    seed: int
    settings: dict[str, Any]
    error: str | None = None
    accuracy: _Percent | None = None
    loss: float | None = None
    accuracy_before: _Percent | None = None
    loss_before: float | None = None
    dense_accuracy: _Percent | None = None
    test_samples: int | None = None
    kept: int | None = None
    total: int | None = None
    layers: dict[str, _Share] = {}
    evidence: list[dict[str, Any]] = []
    notes: list[str] = []
    converged: bool | None = None
    versions: dict[str, str] = {}
    seconds: _Seconds | None = None
    peak_memory: _Bytes | None = None

    @field_validator("settings")
    @classmethod
    def _readable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        _Settings.model_validate(settings)
        return settings


class Results:
    """The results of one experiment, open for writing; :func:`open_results` makes it.

    Args:
        path: The file.
        records: What it held when it was opened.
        lock: The directory's lock, open.
    """

    def __init__(self, path: Path, records: list[RunResult], lock: IO[str]) -> None:
        self.path = path
        self.records = records
        self._lock = lock

    def append(self, record: RunResult) -> None:
        """Add a line and force it to the disk.

        Raises:
            ValueError: If the directory is not the one that was opened.
        """
        try:
            own = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path.with_name(_LOCK)))
        except OSError:
            own = False
        if not own or not self.path.exists():
            raise ValueError(
                f"{self.path.parent} was deleted, moved or replaced while the experiment was running, and this result "
                "is not written; go on with --resume where the others are"
            )
        with _in_words(self.path, "; what is there is whole, and --resume goes on"), self.path.open("ab") as file:
            file.write(record.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def put_in_order(self, ids: Sequence[str]) -> None:
        """Put the lines in the order of some runs, those of one run as they follow each other."""
        place = {one: number for number, one in enumerate(ids)}
        order = sorted(range(len(self.records)), key=lambda number: place[self.records[number].id])
        if order == sorted(order):
            return
        with _in_words(self.path, "; all lines are there, in the order in which runs ended"):
            lines = self.path.read_bytes().splitlines(keepends=True)
            with replacing(self.path, durable=True) as scratch:
                scratch.write_bytes(b"".join(lines[number] for number in order))
        self.records = [self.records[number] for number in order]


def check_directory(directory: str | Path, *, resume: bool) -> Path:
    """Check that an experiment can be written to a directory; writes nothing.

    Returns:
        Its absolute path.

    Raises:
        ValueError: If it is not a directory, or holds what it should not.
    """
    target = user_path(directory).absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"output {target} exists and is not a directory; choose another")
    present = {path.name for path in target.iterdir()} - {_LOCK, _SCRATCH} if target.exists() else set()
    if present and not resume:
        raise ValueError(f"output directory {target} is not empty; go on with --resume, or choose another")
    if present and _CONFIG not in present:
        raise ValueError(f"{target} holds no experiment to resume ({_CONFIG} is missing); choose another directory")
    return target


@contextmanager
def open_results(directory: str | Path, config: Mapping[str, Any], *, resume: bool) -> Iterator[Results]:
    """Hold an experiment's directory for writing; it is made, if it is not there.

    Args:
        directory: The directory.
        config: What was asked for, as JSON types; kept in the directory, and compared on resuming.
        resume: Whether the directory may hold results of this experiment.

    Raises:
        ValueError: If another process holds it, it belongs to another experiment, or it cannot be written.
    """
    target = check_directory(directory, resume=resume)
    with _in_words(f"output directory {target}"):
        target.mkdir(parents=True, exist_ok=True)
        lock = (target / _LOCK).open("a")
    with lock:
        with _in_words(f"output directory {target}"):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is writing to {target}; wait for it, or end it") from error
            check_directory(target, resume=resume)  # again: another may have been faster
            _keep_config(target, config)
            records = _recover(target / _RESULTS)
        yield Results(target / _RESULTS, records, lock)


@contextmanager
def _in_words(what: str | Path, then: str = "") -> Iterator[None]:
    """Run a block that writes files; a ValueError says where it failed.

    Args:
        what: What is written.
        then: What more is to be said.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{what} cannot be written: {reason}{then}") from error


def read_results(directory: str | Path) -> list[RunResult]:
    """Read an experiment's results, also while it is running.

    Returns:
        The last line of every run, in the order of the file.

    Raises:
        ValueError: If there are none, or the file is damaged.
    """
    path = Path(directory) / _RESULTS
    try:
        records, _ = _parse(path, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{directory} holds no results of an experiment: {path}: {error.strerror}") from error
    if not records:
        raise ValueError(f"{path} holds no finished run yet")
    return list({record.id: record for record in records}.values())


def shortest(sparsity: float) -> str:
    """Return a sparsity in as few digits as tell it from every other one: 0.9, and 0 for 0.0."""
    return repr(float(sparsity)).removesuffix(".0")


def _keep_config(target: Path, config: Mapping[str, Any]) -> None:
    """Write the configuration, or compare it with the one that is there."""
    path = target / _CONFIG
    wanted = json.loads(json.dumps(config))
    if not path.exists():
        with (target / _SCRATCH).open("w", encoding="utf-8") as file:
            file.write(json.dumps(wanted, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(target / _SCRATCH, path)
        force_to_disk(target)
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(key for key in kept.keys() | wanted.keys() if _text(kept.get(key)) != _text(wanted.get(key)))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; choose another directory") from error
    if differ:
        raise ValueError(
            f"{target} holds another experiment: {', '.join(differ)} differ from {path}; restore them, or choose "
            "another directory"
        )


def _text(value: Any) -> str:
    return json.dumps(comparable(value), sort_keys=True)


def _recover(path: Path) -> list[RunResult]:
    """Read the results and cut a torn last line off; make the file, if there is none."""
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        records, whole = _parse(path, content)
        if whole < len(content):
            file.truncate(whole)
        os.fsync(file.fileno())
    force_to_disk(path.parent)
    return records


def _parse(path: Path, content: bytes) -> tuple[list[RunResult], int]:
    """Return the records of whole lines, and how many bytes these take; only the last line may be torn."""
    lines = content.split(b"\n")
    lines, torn = lines[:-1], lines[-1]
    records: list[RunResult] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(RunResult.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            if number == len(lines) and not torn and first["type"] == "json_invalid":
                return records, len(content) - len(line) - 1  # the disk kept the end of a line, not its beginning
            place = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{path}, line {number}, is not a result ({place}{': ' * bool(place)}{first['msg']}): the file was "
                "altered or damaged; mend or remove the line"
            ) from error
    return records, len(content) - len(torn)
