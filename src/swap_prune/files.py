"""Files that appear whole or not at all: written under a temporary name, then renamed.

A temporary name says which process of which machine it is of, so that what a killed one left can be told and deleted.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from swap_prune.checks import user_path

__all__ = [
    "check_output_directory",
    "delete_abandoned",
    "force_to_disk",
    "is_abandoned",
    "replaced_name",
    "replacing",
    "write_directory",
    "write_tensors",
]


_SCRATCH = re.compile(r"\.(?P<machine>.+)-(?P<process>\d+)-[0-9a-f]{32}\.(?P<name>.+)")


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a file to write to, which takes another one's place when the block ends well.

    It lies in a directory of its own beside the other: what writes it may have temporary files too.

    Args:
        path: The file that is replaced, or made.
        durable: Whether it is forced to the disk before it takes its place, and its name after that.
    """
    own = path.with_name(_scratch_name(path.name))
    own.mkdir()
    scratch = own / path.name
    try:
        yield scratch
        if durable:
            force_to_disk(scratch)
        os.replace(scratch, path)
        if durable:
            force_to_disk(path.parent)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _scratch_name(name: str) -> str:
    """Return a name to write to meanwhile; two processes may write the same file at once."""
    return f".{platform.node()}-{os.getpid()}-{uuid4().hex}.{name}"


def force_to_disk(path: Path) -> None:
    """Force what a file holds, or the names of a directory's files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replaced_name(path: Path) -> str | None:
    """Return the name of the file that a directory of :func:`replacing` is for; None of any other."""
    match = _SCRATCH.fullmatch(path.name)
    return None if match is None else match["name"]


def is_abandoned(path: Path) -> bool:
    """Whether a directory is one of :func:`replacing` whose process, on this machine, is gone."""
    match = _SCRATCH.fullmatch(path.name)
    if match is None or match["machine"] != platform.node():
        return False
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is somebody else's, or no process at all
        return False
    return False


def delete_abandoned(directory: Path) -> None:
    """Delete what processes that are gone have left of :func:`replacing` in a directory."""
    for entry in filter(is_abandoned, directory.iterdir()):
        shutil.rmtree(entry, ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may read what the process writes can read.

    Raises:
        OSError: If it cannot be written.
        KeyError, SafetensorError: If the format cannot hold such tensors.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that the user alone can read
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        said = str(error).split("I/O error: ")
        if len(said) > 1:
            raise OSError(said[-1]) from error
        raise
    path.chmod(stat.S_IMODE(mode))


def write_directory(target: Path, files: Mapping[str, bytes | Callable[[Path], object]]) -> Path:
    """Write files to a directory: a new one appears whole or not at all.

    In an empty one that is there already the files appear one after the other, in their order.

    Args:
        target: The directory, as :func:`check_output_directory` gave it before the work.
        files: By name, in the order in which they are written and appear: what they hold, or what writes it to a path.

    Raises:
        ValueError: If it cannot be written, or something has come into it meanwhile.
    """
    target = check_output_directory(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(target)
        made = _beside(target) / _scratch_name(target.name)
        try:
            made.mkdir()
            for name, content in files.items():
                if isinstance(content, bytes):
                    (made / name).write_bytes(content)
                else:
                    content(made / name)
                force_to_disk(made / name)
            if target.is_dir():  # maybe a mount point: it stays
                _move_all(files, made, target)
            else:
                os.replace(made, target)
            for names in (target, target.parent):
                force_to_disk(names)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _move_all(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files to a directory one after the other; where one cannot be, none is left there."""
    moved: list[Path] = []
    try:
        for name in names:
            os.replace(source / name, target / name)
            moved.append(target / name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def check_output_directory(directory: str | Path, *filled: str | Path | None) -> Path:
    """Check that a new directory can be written, before any work is done; makes nothing that stays.

    Args:
        directory: The directory.
        filled: Others that the work will leave files in.

    Returns:
        Its absolute path.

    Raises:
        ValueError: If it exists and is not an empty directory, will hold the other one, or cannot be written.
    """
    target = user_path(directory).absolute()
    for other in filled:
        if other is not None and user_path(other).resolve().is_relative_to(target.resolve()):
            raise ValueError(f"output directory {target} would hold {other}, which the run fills; choose another")
    try:
        target = target.resolve() if target.is_dir() else target
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise ValueError(f"output {target} exists and is not a directory; choose another")
        if target.is_dir() and any(replaced_name(entry) != target.name for entry in target.iterdir()):  # another's
            raise ValueError(f"output directory {target} is not empty; choose another or remove it")
        there = next(path for path in (target, *target.parents) if os.path.lexists(path))
        tried = there / _scratch_name(target.name)
        try:
            (tried / target.relative_to(there)).mkdir(parents=True)  # its names may be refused
        finally:
            shutil.rmtree(tried, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"output directory {target} cannot be written: {error.strerror or error}") from error
    return target


def _delete_abandoned(target: Path) -> None:
    """Delete what processes that are gone have left of the same directory."""
    for entry in _beside(target).iterdir():
        if replaced_name(entry) == target.name and is_abandoned(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _beside(target: Path) -> Path:
    """Return where files for a directory are prepared: in it, where it is there already."""
    return target if target.is_dir() else target.parent
