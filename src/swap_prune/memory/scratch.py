"""A directory for the file of G, deleted at the end; and those of killed processes, deleted by the next run.

Beside a directory ``swap-prune-XXXX`` lies a file ``swap-prune-XXXX.lock``, which its process holds locked. The system
takes the lock away when the process ends, however it ends. The file says which boot of which machine it is of: locks
may not be seen from another one.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from swap_prune.checks import user_path
from swap_prune.fisher.storage import Storage

__all__ = ["delete_abandoned", "scratch_directory"]

_PREFIX, _SUFFIX = "swap-prune-", ".lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


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
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=storage.scratch))
    except OSError as error:
        raise ValueError(f"scratch must be a directory to write to, got {str(storage.scratch)!r}: {error}") from error
    try:
        with ExitStack() as held:
            try:
                held.enter_context(_locked(path))
            except OSError as error:
                raise ValueError(f"scratch {str(storage.scratch)!r} cannot be written to: {error.strerror}") from error
            held.callback(shutil.rmtree, path, ignore_errors=True)
            yield replace(storage, scratch=path)
    finally:  # also where there was no room for the lock
        shutil.rmtree(path, ignore_errors=True)


def delete_abandoned(scratch: str | Path | None) -> None:
    """Delete the directories in a place whose processes are gone: the caller's own, of this boot of this machine.

    Args:
        scratch: The place; by default the system's for temporary files.
    """
    with suppress(OSError):  # there may be no place at all
        parent = Path(tempfile.gettempdir()) if scratch is None else user_path(scratch)
        for lock in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
            with suppress(OSError):
                _delete_if_abandoned(lock)


def _delete_if_abandoned(lock: Path) -> None:
    """Delete a lock and its directory, unless the lock is held, or says that it is another's."""
    with open(os.open(lock, os.O_RDWR | os.O_NOFOLLOW), "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.getuid() or file.read() != _mark():
            return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. It has its name only when it is held, and loses it before: nobody finds it free."""
    lock, unnamed = directory.with_suffix(_SUFFIX), directory.with_name(f".{directory.name}{_SUFFIX}")
    with unnamed.open("xb") as file:
        try:
            file.write(_mark())
            file.flush()
        except BaseException:
            unnamed.unlink()
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(lock)
        except OSError:  # a file system without locks: without a lock by its name, nobody deletes the directory
            unnamed.unlink(missing_ok=True)
        try:
            yield
        finally:
            with suppress(OSError):  # the work is done, and the next run deletes what stays
                lock.unlink(missing_ok=True)


def _mark() -> bytes:
    """Return what a lock says: what it is, and which boot of which machine it is of."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return f"swap-prune scratch\n{platform.node()}\n{boot}\n".encode()
