"""What a sample takes, counted."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import grad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.fisher.capture.footprint import allocated_bytes, saved_bytes, unrolls
from swap_prune.fisher.capture.rows import bytes_of_a_row, capture_gradients
from swap_prune.losses import cross_entropy
from swap_prune.selection import select_parameters


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cells(x)[0][:, -1])


def test_what_is_held_together_counts_once_and_what_is_freed_no_more() -> None:
    def one_after_the_other() -> None:
        for _ in range(200):
            torch.ones(1000)

    def together() -> list[torch.Tensor]:
        return [torch.ones(1000) for _ in range(200)]

    assert 4000 <= allocated_bytes(one_after_the_other) <= 20 * 4000
    assert allocated_bytes(together) == 200 * 4000


def test_rows_of_a_recurrent_network_take_a_gradient_a_step() -> None:
    model, steps = Recurrent(), 50
    batch = torch.randn(1, steps, 8), torch.tensor([1])
    kept = saved_bytes(lambda: cross_entropy(model, batch), model.parameters()).total
    selection = select_parameters(model, ["re:.*weight.*"])
    assert unrolls(model) and bytes_of_a_row(model, selection, cross_entropy, batch) > 5 * kept
    few = capture_gradients(model, selection, [(torch.randn(200, steps, 8), torch.zeros(200, dtype=torch.long))],
                            cross_entropy)  # fmt: skip
    assert few.backend == "vmap" and few.chunk < 200
    plain = nn.Linear(8, 3)
    assert bytes_of_a_row(plain, select_parameters(plain), cross_entropy, (torch.randn(1, 8), torch.tensor([1]))) == 0


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
