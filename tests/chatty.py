"""A network and data that print whenever they are used, as ``tests.chatty:network`` and ``tests.chatty:data``."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests import tiny


class Chatty(nn.Module):
    """Says that it runs; with ``mute=True`` its outputs are not numbers once a weight is zero."""

    def __init__(self, mute: bool) -> None:
        super().__init__()
        self.inner, self.mute = tiny.network(), mute

    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        outputs: Tensor = self.inner(x)
        pruned = any(bool((p == 0).any()) for p in self.parameters() if p.ndim > 1)
        return outputs * torch.nan if self.mute and pruned else outputs


class Endless(nn.Module):
    """Comes to no end with more than the one sample that a plan is made on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.network(normalised=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            print("running", file=sys.stderr, flush=True)
            time.sleep(60)
        outputs: Tensor = self.inner(x)
        return outputs


class Spoken(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        print("item")
        return super().__getitem__(index)


def network(mute: bool = False) -> nn.Module:
    print("building the network")
    return Chatty(mute)


def endless() -> nn.Module:
    return Endless()


def mute() -> nn.Module:
    return Chatty(mute=True)


def data() -> tuple[Spoken, Spoken]:
    subprocess.run(["echo", "a child process"], check=True)  # writes to the descriptor, not to sys.stdout
    train, test = tiny.data()
    return Spoken(*train.tensors), Spoken(*test.tensors)
