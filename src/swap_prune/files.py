"""Files that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from swap_prune.checks import user_path

__all__ = ["check_output_directory", "replacing", "write_directory"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside another one to write to, which takes its place when the block ends well."""
    scratch = path.with_name(f".{uuid4().hex}.{path.name}")  # two may write the same file at once
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_directory(target: Path, files: Mapping[str, bytes]) -> Path:
    """Write files to a directory: a new one appears whole or not at all.

    In an empty one that is there already the files appear one after the other, in their order.

    Args:
        target: The directory, as :func:`check_output_directory` gave it.
        files: Contents by name, in the order in which they appear.

    Raises:
        ValueError: If it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=_beside(target)) as scratch:
            made = Path(scratch, target.name)
            made.mkdir()
            for name, content in files.items():
                (made / name).write_bytes(content)
            if target.is_dir():  # maybe a mount point: it stays
                for name in files:
                    os.replace(made / name, target / name)
            else:
                os.replace(made, target)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def check_output_directory(directory: str | Path) -> Path:
    """Check that a new directory can be written, before any work is done; makes nothing that stays.

    Returns:
        Its absolute path.

    Raises:
        ValueError: If it exists and is not an empty directory, or cannot be written.
    """
    target = user_path(directory).absolute()
    try:
        target = target.resolve() if target.is_dir() else target
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise ValueError(f"output {target} exists and is not a directory; choose another")
        if target.is_dir() and any(target.iterdir()):
            raise ValueError(f"output directory {target} is not empty; choose another or remove it")
        there = next(path for path in (target, *target.parents) if os.path.lexists(path))
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=there) as scratch:
            Path(scratch, target.relative_to(there)).mkdir(parents=True, exist_ok=True)  # its names may be refused
    except OSError as error:
        raise ValueError(f"output directory {target} cannot be written: {error.strerror or error}") from error
    return target


def _beside(target: Path) -> Path:
    """Return where files for a directory are prepared: in it, where it is there already."""
    return target if target.is_dir() else target.parent
