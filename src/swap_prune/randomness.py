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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "GlobalStates",
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

    NumPy draws them far faster than PyTorch puts all in random order.
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


class GlobalStates(NamedTuple):
    """The global random states of PyTorch (on the CPU), Python and NumPy, as these give them.

    A bit generator that a user gave NumPy in the place of its own is not among them: it cannot be seeded.
    """

    torch: Tensor
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None

    def tensors(self) -> dict[str, Tensor]:
        """Return them as tensors: those of Python and NumPy are words, and what is left of a pair of normal numbers."""
        version, words, left = self.python
        found = {
            "torch": self.torch,
            "python": torch.tensor([version, *words], device="cpu"),
            "python_left": torch.tensor(math.nan if left is None else left, dtype=torch.float64, device="cpu"),
        }
        if self.numpy is not None:
            _, keys, place, has_left, left = self.numpy
            found["numpy"] = torch.tensor([*keys.tolist(), place, has_left], device="cpu")
            found["numpy_left"] = torch.tensor(left, dtype=torch.float64, device="cpu")
        return found

    @classmethod
    def of_tensors(cls, found: Mapping[str, Tensor]) -> GlobalStates:
        """Return the states that :meth:`tensors` gave."""
        version, *words = found["python"].tolist()
        left = float(found["python_left"])
        python = (version, tuple(words), None if math.isnan(left) else left)
        if "numpy" not in found:
            return cls(found["torch"], python, None)
        *keys, place, has_left = found["numpy"].tolist()
        own = ("MT19937", np.array(keys, np.uint32), place, has_left, float(found["numpy_left"]))
        return cls(found["torch"], python, own)


def global_states() -> GlobalStates:
    """Return the global random states."""
    own = np.random.get_state()
    return GlobalStates(torch.get_rng_state(), random.getstate(), own if isinstance(own, tuple) else None)


def set_global_states(states: GlobalStates) -> None:
    """Set the global random states."""
    torch.set_rng_state(states.torch)
    random.setstate(states.python)
    if states.numpy is not None and isinstance(np.random.get_state(), tuple):
        np.random.set_state(states.numpy)


def global_states_of(seed: int) -> GlobalStates:
    """Return the global states that a seed gives."""
    with global_states_kept():
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if isinstance(np.random.get_state(), tuple):
            np.random.seed(seed % 2**32)
        return global_states()
