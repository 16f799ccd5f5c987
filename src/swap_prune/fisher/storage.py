"""How G is held, and how much runs at once: what the memory plan of a run has chosen.

Place in the pipeline: between the plan and capture, whose stores (:mod:`~swap_prune.fisher.capture.stores`) hold G so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from swap_prune.distributed import Team
from swap_prune.samples.spill import Spilled

__all__ = [
    "AT_ONCE",
    "BLOCK_VECTORS",
    "CHUNK_BYTES",
    "HOLDING_NO_ROWS",
    "Storage",
    "StorageKind",
    "chunk_bytes",
]

StorageKind = Literal["float32", "bfloat16", "float16", "mapped", "sharded", "low-rank", "matrix-free"]

HOLDING_NO_ROWS = ("low-rank", "matrix-free")  # no row of G lies anywhere, neither in memory nor in a file

AT_ONCE = 64  # samples, where memory allows
BLOCK_VECTORS, _FEW_BLOCK_VECTORS = 12, 1  # of p, that a block of columns may take; where memory is shortest
CHUNK_BYTES = 512 * 2**20  # saved activations and gradients of one chunk of samples at capture together
_LEAN_CHUNK_BYTES = 64 * 2**20  # the same where memory is short
_GPU_SAMPLE_BYTES = 64 * 2**20  # the same on a GPU, for each of the samples that may run at once
_ROOMY_CHUNK_BYTES = 32 * 2**30  # the same on a GPU, where small kernels are dear and there is room


@dataclass(frozen=True)
class Storage:
    """How G is held.

    Attributes:
        kind: ``float32`` holds it in the precision of the gradients (float64, where the weights are).
        lean: Whether the solver does without copies of many columns in float32 too; in the others it always does.
        scratch: Directory of files: of G for ``mapped``, of what is spilled.
        kept: Where G of the first stage is left for later runs, and looked for; None: nowhere.
        at_once: Samples that run through the network forwards and backwards at once, at the most. Mini-batches that
            make a row keep their own size.
        roomy: Whether a GPU has room for large chunks of samples at capture.
        spilled: What is spilled to files: the samples of a stage, and what a forward pass keeps for its backward pass.
        compares_rows: Whether there is room for rows of single samples beside those of mini-batches.
        team: The processes that share G, for ``sharded``; None until the run has them.
    """

    kind: StorageKind = "float32"
    lean: bool = False
    scratch: Path | None = None
    kept: Path | None = None
    team: Team | None = None
    at_once: int = AT_ONCE
    roomy: bool = False
    spilled: Spilled = "nothing"
    compares_rows: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(StorageKind):
            raise ValueError(f"storage must be one of {', '.join(get_args(StorageKind))}, got {self.kind!r}")
        if self.kind == "mapped" and self.scratch is None:
            raise ValueError("storage 'mapped' needs a directory, got none; give scratch=")

    def chunk_bytes(self, device: torch.device) -> int:
        """Return the bytes of one chunk of samples at capture."""
        return chunk_bytes(device, self.at_once, lean=not self.copies_columns, roomy=self.roomy)

    @property
    def copies_columns(self) -> bool:
        """Whether the solver copies many columns of G at once."""
        return self.kind == "float32" and not self.lean

    @property
    def forwards(self) -> int:
        """Samples that run through the network forwards alone at once: twice as many, unless memory is shortest."""
        return self.at_once if self.spilled == "activations" else 2 * self.at_once

    @property
    def block_vectors(self) -> int:
        """Vectors of p that a block of columns may take where nothing is held of G."""
        return _FEW_BLOCK_VECTORS if self.spilled == "activations" else BLOCK_VECTORS

    @property
    def holds_rows(self) -> bool:
        """Whether there are rows of G somewhere, be it rounded or in a file."""
        return self.kind not in HOLDING_NO_ROWS


def chunk_bytes(device: torch.device, at_once: int, *, lean: bool, roomy: bool = False) -> int:
    """Return the bytes of one chunk of samples at capture.

    Args:
        device: Where the network runs.
        at_once: Samples that may run through it at once.
        lean: Whether memory is short.
        roomy: Whether that of a GPU is plenty.
    """
    if device.type == "cuda":
        return _ROOMY_CHUNK_BYTES if roomy else at_once * _GPU_SAMPLE_BYTES
    return _LEAN_CHUNK_BYTES if lean else CHUNK_BYTES
