"""G in a file, of which one block at a time is mapped to memory.

Mapped pages count as resident memory, so a block is mapped, used and unmapped again. The file::

    4096 bytes     magic, then JSON: format version, shape, dtype, byte order, CRC-32 of the rows; zeros behind
    n * p entries  rows one after the other

It is written under a temporary name. The header comes last, then the file takes its own name: what a killed process
leaves has neither.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from swap_prune.fisher.backends.blocked import BLOCK_BYTES, BlockedFactor

__all__ = ["MappedFactor", "MappedWriter"]

_MAGIC = b"swap-prune G\n"
_VERSION = 1
_HEADER = 4096
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_SUFFIX, _PARTIAL = ".fisher", ".partial"


class _Opened:
    """A file that is held open, so that it stays what it is whatever takes its name; until it is closed, or let go."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def file(self) -> BinaryIO:
        """Return it at its beginning; the caller's closing leaves it open."""
        if self._descriptor is None:
            raise ValueError("the file of G was deleted")
        file = open(self._descriptor, "rb", closefd=False)  # noqa: SIM115 (a descriptor, closed by the caller)
        file.seek(0)
        return file

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


@dataclass(frozen=True)
class MappedFactor(BlockedFactor):
    """G in a finished file.

    Attributes:
        path: The file.
        opened: The same, open: another one that is given its name later is not this one.
        size: (n, p).
        dtype: Of the entries and the products.
        device: Of the products.
        checksum: CRC-32 of the rows, as they were written.
    """

    path: Path
    opened: _Opened
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    checksum: int = 0

    @classmethod
    def open(cls, path: str | Path, device: torch.device | str = "cpu") -> MappedFactor:
        """Open a file that a :class:`MappedWriter` finished, and read it once, for its checksum.

        Args:
            path: The file.
            device: Where products are wanted.

        Raises:
            ValueError: If the file cannot be read, is not whole, or is not what its header says.
        """
        path = Path(path)
        try:
            opened = _Opened(path)
            with opened.file() as file:
                head = file.read(_HEADER)
                found = os.fstat(file.fileno()).st_size
                checksum = _checksum(file)
        except OSError as error:
            raise ValueError(f"the file of G {path} cannot be read: {error.strerror}") from error
        about = _parse_header(path, head)
        n, p = about["shape"]
        expected = _HEADER + n * p * _DTYPES[about["dtype"]].itemsize
        if found != expected:
            raise ValueError(f"{path} has {found} bytes where its header says {expected}: capture G again")
        if checksum != about["crc32"]:
            raise ValueError(f"the rows in {path} are not those that were written (checksum): capture G again")
        return cls(path, opened, (n, p), _DTYPES[about["dtype"]], torch.device(device), about["crc32"])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, p)."""
        return self.size

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield whole rows, or parts of one where it is longer than a block."""
        n, p = self.size
        entries = max(1, BLOCK_BYTES // self.dtype.itemsize)
        height, width = max(1, entries // p), min(p, entries)
        for top in range(0, n, height):
            rows = slice(top, min(top + height, n))
            for left in range(0, p, width):
                columns = slice(left, min(left + width, p))
                yield rows, columns, self._mapped(rows, columns).to(self.device)

    def columns(self, index: Tensor) -> Tensor:
        """Return ``G[:, index]``, (n, len(index)), dense, from the span of columns that they lie in."""
        n, _ = self.size
        result = torch.empty(n, len(index), dtype=self.dtype, device="cpu")
        if len(index) == 0:
            return result.to(self.device)
        first, last = int(index.min()), int(index.max()) + 1
        local = index.cpu() - first
        height = max(1, BLOCK_BYTES // (self.dtype.itemsize * (last - first)))
        for top in range(0, n, height):
            rows = slice(top, min(top + height, n))
            torch.index_select(self._mapped(rows, slice(first, last)), 1, local, out=result[rows])
        return result.to(self.device)

    def delete(self) -> None:
        """Delete the file; the factor cannot be used any more."""
        self.opened.close()
        self.path.unlink(missing_ok=True)

    def _mapped(self, rows: slice, columns: slice) -> Tensor:
        """Map some rows; the pages of other columns are not touched. The last reference unmaps them."""
        _, p = self.size
        kind = np.dtype(np.float64 if self.dtype == torch.float64 else np.float32)
        start = _HEADER + rows.start * p * kind.itemsize
        # copy-on-write: torch wants memory that it may write to, and nobody does
        with self.opened.file() as file:
            part = np.memmap(file, kind, mode="c", offset=start, shape=(rows.stop - rows.start, p))
        return torch.from_numpy(part)[:, columns]


class MappedWriter:
    """Writes the rows of G one after the other.

    Args:
        directory: Where the file is made.
        n: Rows that are expected; fewer may come.
        p: Entries of a row.
        dtype: float32 or float64.

    Raises:
        ValueError: If the directory cannot be written to, or has no room for n rows.
    """

    def __init__(self, directory: str | Path, n: int, p: int, dtype: torch.dtype = torch.float32) -> None:
        self._p, self._dtype = p, dtype
        self._rows, self._crc = 0, 0
        self._directory, self._bytes = Path(directory), n * p * dtype.itemsize
        if dtype not in _DTYPES.values():
            raise ValueError(f"a file holds G in float32 or float64, got {dtype}")
        try:
            handle, name = tempfile.mkstemp(prefix="G-", suffix=_SUFFIX + _PARTIAL, dir=directory)
        except OSError as error:
            raise self._refusal(error) from error
        self._partial, self._file = Path(name), os.fdopen(handle, "wb")
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is found out now, not after the work
                os.posix_fallocate(self._file.fileno(), 0, _HEADER + self._bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                self.discard()
                raise self._refusal(error) from error
        self._file.seek(_HEADER)

    def append(self, rows: Tensor) -> None:
        """Write rows (m, p).

        Raises:
            ValueError: If the disk is full or fails.
        """
        data = rows.detach().to("cpu", self._dtype).contiguous().numpy()
        view = data.reshape(-1).view(np.uint8).data
        try:
            self._file.write(view)
        except OSError as error:
            self.discard()
            raise self._refusal(error) from error
        self._crc = zlib.crc32(view, self._crc)
        self._rows += len(rows)

    def finish(self, device: torch.device | str = "cpu") -> MappedFactor:
        """Write the header, and give the file its name.

        Raises:
            ValueError: If there are no rows, or the disk is full or fails.
        """
        if self._rows == 0:
            self.discard()
            raise ValueError(f"G must have shape (n, p) with n, p >= 1, got (0, {self._p})")
        kind = next(name for name, dtype in _DTYPES.items() if dtype == self._dtype)
        about = {"version": _VERSION, "shape": [self._rows, self._p], "dtype": kind, "crc32": self._crc}
        head = _MAGIC + json.dumps(about | {"byteorder": sys.byteorder}).encode()
        path = self._partial.with_name(self._partial.name.removesuffix(_PARTIAL))
        try:
            self._file.truncate(_HEADER + self._rows * self._p * self._dtype.itemsize)
            self._file.seek(0)
            self._file.write(head.ljust(_HEADER, b"\0"))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(path)
            opened = _Opened(path)
        except OSError as error:
            self.discard()
            raise self._refusal(error) from error
        return MappedFactor(path, opened, (self._rows, self._p), self._dtype, torch.device(device), self._crc)

    def discard(self) -> None:
        """Delete what was written."""
        self._partial.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk refuses once more
            self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file") and not self._file.closed:  # whoever wrote to it gave up
            self.discard()

    def _refusal(self, error: OSError) -> ValueError:
        try:
            free = f"which has {shutil.disk_usage(self._directory).free / 1e9:.1f} GB free"
        except OSError:
            free = "which cannot be read"
        return ValueError(
            f"storage 'mapped' needs a file of {self._bytes / 1e9:.1f} GB in {self._directory}, {free} "
            f"({error.strerror}); give another directory with scratch=, or use fewer samples"
        )


def _parse_header(path: Path, head: bytes) -> dict[str, Any]:
    """Read and check the header.

    Raises:
        ValueError: If it is none, or one of another version or machine.
    """
    text = head.removeprefix(_MAGIC).rstrip(b"\0")
    if len(head) < _HEADER or not head.startswith(_MAGIC):
        raise ValueError(f"{path} is no finished file of G: its writer did not come to its end; capture G again")
    about: dict[str, Any] = json.loads(text)
    if about.get("version") != _VERSION or about.get("byteorder") != sys.byteorder or about["dtype"] not in _DTYPES:
        raise ValueError(f"{path} is of another format or machine ({about}): capture G again")
    return about


def _checksum(file: BinaryIO) -> int:
    """Return the CRC-32 of what is left of a file."""
    crc = 0
    while block := file.read(BLOCK_BYTES):
        crc = zlib.crc32(block, crc)
    return crc
