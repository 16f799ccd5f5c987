"""Models so small that rows are many: a linear head on correlated features."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import LR, SquaredError, prune
from swap_prune.methods.pairing import candidates_of


def head(seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return the least-squares fit of numbers to ten inputs, of which five are nearly those of the other five."""
    state = torch.Generator().manual_seed(seed)
    x = torch.randn(3000, 10, generator=state)
    x[:, 5:] = x[:, :5] + 0.3 * x[:, 5:]
    y = x @ torch.randn(10, 1, generator=state) + 0.1 * torch.randn(3000, 1, generator=state)
    model = nn.Linear(10, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x[:2000], y[:2000]).solution.T.contiguous()
    return model, x, y


def loss_of(weight: Tensor, x: Tensor, y: Tensor) -> float:
    return float((x @ weight.T - y).square().mean())


@pytest.mark.parametrize("seed", range(5))
def test_among_correlated_inputs_it_comes_near_the_best_of_all_supports(seed: int) -> None:
    """Of all 252 supports of five of ten inputs, each refitted on the data that there are."""
    model, x, y = head(seed)
    best = min(
        loss_of(torch.linalg.lstsq(x[:2000, s], y[:2000]).solution.T, x[2000:, s], y[2000:])
        for s in map(list, itertools.combinations(range(10), 5))
    )
    pruned = copy.deepcopy(model)
    data = TensorDataset(x[:2000], y[:2000])
    prune(pruned, data, 0.5, "lr", loss_fn=SquaredError(), samples=400, progress=False)
    assert loss_of(pruned.weight.detach(), x[2000:], y[2000:]) < 1.2 * best


def test_candidates_of_little_ridge_need_a_row_a_weight() -> None:
    diagonal = torch.ones(100)
    few, many = candidates_of(LR(), diagonal, 99), candidates_of(LR(), diagonal, 100)
    assert many[:-1] == few and (many[-1].ridge, many[-1].damping) == (1e-4, 0.01)
