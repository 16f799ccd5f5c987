"""A directory for the file of G, deleted at the end; and those of killed processes, deleted by the next run.

A process holds a lock in its directory as long as it lives. The system takes it away when the process ends, however it
ends, so that a directory whose lock is free has no owner any more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from swap_prune.fisher.storage import Storage

try:
    import fcntl
except ImportError:  # not on Windows: what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]

__all__ = ["scratch_directory"]

_PREFIX, _LOCK = "swap-prune-", "lock"


@contextmanager
def scratch_directory(storage: Storage) -> Iterator[Storage]:
    """Give a storage that needs it a directory of its own, deleted at the end.

    Those that killed processes left beside it are deleted first.

    Raises:
        ValueError: If it cannot be made.
    """
    if storage.kind != "mapped":
        yield storage
        return
    parent = Path(tempfile.gettempdir()) if storage.scratch is None else storage.scratch
    with suppress(OSError):
        _delete_abandoned(parent)
    try:
        directory = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)
    except OSError as error:
        raise ValueError(f"scratch must be a directory to write to, got {str(storage.scratch)!r}: {error}") from error
    with directory as path, _locked(Path(path)):
        yield replace(storage, scratch=Path(path))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. It has its name only when it is held: nobody finds it free before."""
    if fcntl is None:
        yield
        return
    unnamed = directory / f".{_LOCK}"
    with unnamed.open("wb") as file:
        with suppress(OSError):  # a file system without locks: without a lock by its name, nobody deletes it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(directory / _LOCK)
        yield


def _delete_abandoned(parent: Path) -> None:
    """Delete the directories whose owners are gone; those of other users stay."""
    if fcntl is None:
        return
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):
            handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(handle)
