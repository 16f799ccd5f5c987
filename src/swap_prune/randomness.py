"""Random states forked from the seed of a run.

Whatever draws a number of random numbers that depends on the method or on the data has a state of its own. So two runs
of one seed see the same calibration samples and the same noise, whatever their methods draw, as long as these hold as
many samples out; and their difference is that of the methods.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "forked_generator",
    "global_states",
    "global_states_kept",
    "global_states_of",
    "seeded",
    "set_global_states",
    "standard_normal",
    "subset",
    "uniform",
]


def forked_generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator whose numbers depend on the seed and on what they are for."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def standard_normal(shape: int | Sequence[int], generator: torch.Generator) -> Tensor:
    """Return normal numbers of mean 0 and deviation 1, float32 on the CPU, whatever the caller's defaults are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform(shape: int | Sequence[int], generator: torch.Generator) -> Tensor:
    """Return numbers in [0, 1), float32 on the CPU, whatever the caller's defaults are."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def subset(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return so many of the numbers below a count, drawn without replacement, (size,) on the CPU.

    NumPy draws them six times as fast as PyTorch puts all in random order.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    return torch.from_numpy(np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run a block in which the global states that others may draw from are seeded; then give them back.

    Args:
        seed: In [0, 2**63).
        device: A GPU whose random state is seeded as well; None and the CPU: none.
    """
    on_gpu = device is not None and device.type == "cuda"
    with global_states_kept(), torch.random.fork_rng([device] if on_gpu else []):
        set_global_states(global_states_of(seed))
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def global_states_kept() -> Iterator[None]:
    """Run a block after which the global states on the CPU are what they were."""
    before = global_states()
    try:
        yield
    finally:
        set_global_states(before)


def global_states() -> dict[str, Tensor]:
    """Return the global random states of PyTorch (on the CPU), Python and NumPy, as tensors.

    Those of the last two are words, and what is left of a pair of normal numbers. A bit generator that a user gave
    NumPy in the place of its own is not among them: it cannot be seeded.
    """
    version, words, left = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], device="cpu"),
        "python_left": torch.tensor(math.nan if left is None else left, dtype=torch.float64, device="cpu"),
    }
    state = np.random.get_state()
    if isinstance(state, tuple):
        _, keys, place, has_left, left = state
        found["numpy"] = torch.tensor([*keys.tolist(), place, has_left], device="cpu")
        found["numpy_left"] = torch.tensor(left, dtype=torch.float64, device="cpu")
    return found


def set_global_states(states: Mapping[str, Tensor]) -> None:
    """Set the global random states that :func:`global_states` gave."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    left = float(states["python_left"])
    random.setstate((version, tuple(words), None if math.isnan(left) else left))
    if "numpy" in states and isinstance(np.random.get_state(), tuple):
        *keys, place, has_left = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), place, has_left, float(states["numpy_left"])))


def global_states_of(seed: int) -> dict[str, Tensor]:
    """Return the global states that a seed gives."""
    with global_states_kept():
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if isinstance(np.random.get_state(), tuple):
            np.random.seed(seed % 2**32)
        return global_states()
