"""Damped natural-gradient steps: against the normal equations, and with a Gram matrix that is known."""

from __future__ import annotations

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.natural_gradient import NaturalGradient
from swap_prune.regression.objective import WeightedRidge
from tests.cases import generator, normal


def regression_of(k: int) -> tuple[torch.Tensor, WeightedRidge, torch.Tensor]:
    G, reference = normal(8, 14, seed=k), normal(14, seed=k + 1)
    metric = torch.rand(14, generator=generator(k), dtype=torch.float64) + 0.5
    support = torch.randperm(14, generator=generator(k))[:k].sort().values
    return G, WeightedRidge(DenseFactor(G), G @ reference, reference, 0.3, metric), support


@pytest.mark.parametrize("k", [1, 3, 8, 9, 12, 14])
@pytest.mark.parametrize("known", [False, True])
def test_it_minimises_the_quadratic_model(k: int, known: bool) -> None:
    G, regression, support = regression_of(k)
    slope = normal(14, seed=99)
    previous = regression.refit(support) if known else None
    step = NaturalGradient.on(regression, support, 0.7, previous).direction(slope)
    g = G[:, support]
    hessian = g.T @ g / 8 + 0.7 * torch.diag(regression.metric[support])
    torch.testing.assert_close(step[support], -torch.linalg.solve(hessian, slope[support]))
    assert int(step.count_nonzero()) == k


def test_one_factorisation_serves_every_slope() -> None:
    _, regression, support = regression_of(12)
    descent = NaturalGradient.on(regression, support, 0.1)
    first, second = normal(14, seed=1), normal(14, seed=2)
    torch.testing.assert_close(
        descent.direction(2 * first - second), 2 * descent.direction(first) - descent.direction(second)
    )
