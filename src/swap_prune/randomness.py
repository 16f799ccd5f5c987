"""Random states forked from the seed of a run.

Whatever draws a number of random numbers that depends on the method or on the data has a state of its own. So two runs
of one seed see the same calibration samples and the same noise, whatever their methods draw, and their difference is
that of the methods.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["forked_generator"]


def forked_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator whose numbers depend on the seed and on what they are for."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
