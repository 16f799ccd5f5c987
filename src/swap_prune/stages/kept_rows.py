"""G of the dense network, left in a file for the runs that follow.

Whoever prunes one network to many sparsities, or by many methods, takes the same gradients in each first stage. Their
file has a name made of all that they depend on: the weights and buffers, the samples, the loss, what is selected, the
seed of the signs. What a name cannot say, such as what the code of a network or of a loss does, the first row and the
losses of all samples say: they are taken again, and a file that has others is not believed.

    G-<digest>.fisher    the rows (:mod:`swap_prune.fisher.backends.mapped`)
    G-<digest>.json      their losses, and the checksum of the rows; written last

Place in the pipeline: in place of the capture of a first stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.artifact import weights_sha256
from swap_prune.checks import user_path
from swap_prune.files import delete_abandoned, replacing
from swap_prune.fisher.backends.mapped import MappedFactor
from swap_prune.fisher.capture.rows import Capture
from swap_prune.process_memory import pass_on_shortage
from swap_prune.report import versions
from swap_prune.request import Request
from swap_prune.samples.batches import digest_whole
from swap_prune.stages.identity import described

__all__ = ["KeptRows", "check_keepable"]

_FORMAT = 3  # of what a row is: raise it when rows of the same samples change
_ALIKE = 1e-3  # of a norm: two ways to compute a row, or losses, may differ by so much


def check_keepable(request: Request, scratch: str | Path | None) -> Path:
    """Return the directory that rows are kept in; refuse those that would lie in no file, or be others each time.

    Raises:
        ValueError: If they would, or there is nowhere to keep them.
    """
    if scratch is None:
        raise ValueError("keep_rows needs a directory to keep them in: give scratch= (--scratch)")
    if request.storage != "mapped":
        raise ValueError(f"keep_rows needs storage 'mapped', which holds G in a file, got {request.storage!r}")
    if request.noise.models:
        raise ValueError("keep_rows keeps the gradients of the network as it is, and noise= makes others of them")
    return user_path(scratch)


@dataclass(frozen=True)
class KeptRows:
    """The file of one G.

    Attributes:
        directory: Where it lies, or will.
        name: Of its two files, without their endings.
        device: Where products with it are wanted.
    """

    directory: Path
    name: str
    device: torch.device

    @classmethod
    def of(
        cls,
        directory: Path,
        model: nn.Module,
        request: Request,
        batches: Sequence[Any],
        *,
        in_batches: bool,
        draws: int,
    ) -> KeptRows:
        """Name the rows of some samples.

        Args:
            directory: Where files are kept.
            model: The network, at the weights that gradients are taken at.
            request: What is asked for.
            batches: The samples.
            in_batches: Whether rows are those of mini-batches.
            draws: How often signs are drawn, at the most.

        Raises:
            ValueError: If the samples cannot be told from others.
        """
        samples, device = hashlib.sha256(), next(model.parameters()).device
        try:
            for batch in batches:
                digest_whole(batch, samples)
        except ValueError as error:
            raise ValueError(f"keep_rows cannot name these samples: {error}; leave keep_rows out") from error
        about = {
            "weights": weights_sha256(model),
            "network": type(model).__qualname__,
            "selected": {name: list(shape) for name, shape in request.selection.shapes.items()},
            "loss": described(request.loss),
            "rows": [described(request.curvature), in_batches and request.mini_batch, draws, request.seed, _FORMAT],
            "samples": samples.hexdigest(),
            "device": device.type,
            "versions": versions(),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return cls(directory, f"G-{digest[:32]}", device)

    def find(self, first_row: Callable[[], Tensor], losses_now: Callable[[], Tensor]) -> Capture | None:
        """Return what an earlier run left; None where there is nothing, or nothing to be believed.

        Args:
            first_row: Takes the first row again, (p,).
            losses_now: Takes the losses of all samples again.
        """
        try:
            about = json.loads(self._path(".json").read_text(encoding="utf-8"))
            factor = MappedFactor.open(self._path(".fisher"), self.device)
            losses = torch.tensor(about["losses"], dtype=factor.dtype, device=self.device)
            found = Capture(factor, losses, str(about["backend"]), int(about["chunk"]))
        except Exception as error:  # not there, not whole, or not ours: it is taken anew
            pass_on_shortage(error)
            return None
        if about.get("crc32") != factor.checksum:
            return None
        row = factor.row_span(0, 1)[0]
        now = losses_now()
        same = _are_alike(losses, now) or not (losses.any() or now.any())  # those of the dense network may all be zero
        return found if same and _are_alike(row, first_row()) else None

    def keep(self, capture: Capture) -> Capture:
        """Give the file of a G its name, for good.

        Args:
            capture: With G in a file of the run's own, in the same file system.

        Raises:
            ValueError: If it cannot be kept.
        """
        factor = capture.factor
        assert isinstance(factor, MappedFactor), "nothing else lies in a file"
        about = {
            "losses": capture.losses.double().tolist(),
            "backend": capture.backend,
            "chunk": capture.chunk,
            "crc32": factor.checksum,
        }
        try:
            self._path(".json").unlink(missing_ok=True)  # or it would stand beside other rows for a moment
            factor.path.replace(self._path(".fisher"))
            delete_abandoned(self.directory)
            with replacing(self._path(".json")) as scratch:
                scratch.write_text(json.dumps(about), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"the file of G cannot be kept in {self.directory}: {error.strerror or error}") from error
        return replace(capture, factor=replace(factor, path=self._path(".fisher")))

    def _path(self, ending: str) -> Path:
        return self.directory / (self.name + ending)


def _are_alike(kept: Tensor, now: Tensor) -> bool:
    """Whether two vectors are the same to rounding; zeros tell nothing."""
    if kept.shape != now.shape:
        return False
    away, size = (torch.linalg.vector_norm(one.double()) for one in (kept - now.to(kept), now))
    return bool(size > 0) and bool(away <= _ALIKE * size)
