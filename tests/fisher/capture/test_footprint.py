"""What a sample takes, counted."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import grad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.fisher.capture.footprint import saved_bytes


def test_a_network_that_differentiates_itself_can_be_pruned() -> None:
    class Slopes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(grad(lambda inputs: self.a(inputs).tanh().sum())(x))

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 4), torch.randint(3, (60,)))
    report = prune(Slopes(), data, 0.5, "lr", samples=40, progress=False)
    assert report.kept == 22


def test_nothing_of_a_pass_stays() -> None:
    seen: list[StorageWeakRef] = []

    def run() -> None:
        outputs = torch.randn(10, requires_grad=True).sigmoid()  # which keeps them for its backward pass
        seen.append(StorageWeakRef(outputs.untyped_storage()))

    assert saved_bytes(run, ()).total == 40 and seen[0].expired()
