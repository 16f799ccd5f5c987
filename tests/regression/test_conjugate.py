"""Refits and natural-gradient steps from products alone, against those from columns and Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.conjugate import DualSystem
from swap_prune.regression.iht import solve_sparse
from swap_prune.regression.natural_gradient import NaturalGradient
from swap_prune.regression.swap import swap_weights
from tests.cases import dense_parts, generator, normal, random_regression
from tests.reference import normal_equation_refit


@dataclass(frozen=True)
class ProductsOnly(DenseFactor):
    """G that gives products, and one column at a time."""

    limit: int | None = 1

    @property
    def iterative(self) -> bool:
        return True

    def gram(self, scale):
        raise AssertionError("no Gram matrix is wanted of it")


def products_only(problem):
    return replace(problem, factor=ProductsOnly(problem.factor.matrix))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_refit(smoothed, ridge):
    problem = random_regression(12, 60, generator(1), ridge=ridge, smoothed=smoothed)
    support = torch.arange(5, 45)
    refit = products_only(problem).refit(support)
    assert refit.gram is None
    expected = normal_equation_refit(support=support, **dense_parts(problem))
    torch.testing.assert_close(refit.weights, expected, rtol=1e-6, atol=1e-8)


def test_the_whole_search():
    problem = random_regression(10, 60, generator(2))
    fit, other = solve_sparse(problem, 20), solve_sparse(products_only(problem), 20)
    assert torch.equal(fit.support, other.support)
    torch.testing.assert_close(fit.weights, other.weights, rtol=1e-6, atol=1e-8)
    assert swap_weights(products_only(problem), other) is other


@pytest.mark.parametrize("keep", [6, 40])
@pytest.mark.parametrize("make", [ProductsOnly, lambda G: DenseFactor(G, limit=3)], ids=["iterative", "lean"])
def test_natural_gradient(make, keep):
    problem = random_regression(12, 60, generator(3))
    support, slope = torch.arange(keep) + 7, normal(60, seed=4)
    expected = NaturalGradient.on(problem, support, 0.1).direction(slope)
    other = NaturalGradient.on(replace(problem, factor=make(problem.factor.matrix)), support, 0.1)
    assert (other.columns is None) == (keep > 12)
    torch.testing.assert_close(other.direction(slope), expected, rtol=1e-6, atol=1e-8)


def test_swaps_with_few_columns_at_a_time():
    problem = random_regression(15, 60, generator(5))
    fit = solve_sparse(problem, 25)
    lean = replace(problem, factor=DenseFactor(problem.factor.matrix, limit=2))
    expected, other = swap_weights(problem, fit), swap_weights(lean, fit)
    assert expected.swaps > 0 and torch.equal(expected.support, other.support)
    torch.testing.assert_close(other.weights, expected.weights)


def test_a_system_without_a_solution_ends():
    zero = DenseFactor(torch.zeros(4, 6))
    assert DualSystem(zero, torch.ones(6), 0.0).solve(torch.ones(4)).tolist() == [0.0] * 4
    assert DualSystem(zero, torch.ones(6), 0.5).solve(torch.zeros(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("ridge", [1e-4, 1e-6])
def test_a_system_of_bad_condition_is_solved_in_as_many_steps_as_it_has_equations(ridge):
    """Singular values of G over four decades: without reorthogonalisation 200 steps leave Q far above its minimum."""
    n, p = 120, 900
    state = generator(7)
    left = torch.linalg.qr(torch.randn(n, n, generator=state, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(p, n, generator=state, dtype=torch.float64)).Q
    G = left * torch.logspace(2, -2, n, dtype=torch.float64) @ right.T
    problem = random_regression(n, p, state, ridge=ridge)
    problem = replace(problem, factor=DenseFactor(G), metric=torch.ones(p, dtype=torch.float64))
    support = torch.arange(500)
    exact, found = problem.refit(support), products_only(problem).refit(support)
    assert found.exact and problem.value(found.weights) == pytest.approx(problem.value(exact.weights), rel=1e-6)
    assert solve_sparse(products_only(problem), 300, max_iterations=0).converged


def test_what_is_not_solved_at_the_limit_says_so(monkeypatch):
    monkeypatch.setattr("swap_prune.regression.conjugate._MOST_ITERATIONS", 3)
    problem = products_only(random_regression(12, 60, generator(1), ridge=1e-4))
    assert not problem.refit(torch.arange(40)).exact
    assert not solve_sparse(problem, 20).converged
    assert random_regression(12, 60, generator(1), ridge=1e-4).refit(torch.arange(40)).exact
