"""Random states forked from the seed of a run.

Whatever draws a number of random numbers that depends on the method or on the data has a state of its own. So two runs
of one seed see the same calibration samples and the same noise, whatever their methods draw, as long as these hold as
many samples out; and their difference is that of the methods.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forked_generator", "seeded"]


def forked_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator whose numbers depend on the seed and on what they are for."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run a block in which PyTorch's own random state, which others may draw from, is seeded; then give it back.

    Args:
        seed: In [0, 2**63).
        device: A GPU whose random state is seeded as well; None and the CPU: none.
    """
    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
