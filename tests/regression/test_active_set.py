"""CHITA's solver: closed forms, brute force, and the estimate of its step length."""

from dataclasses import replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.active_set import largest_curvature, solve_active_set
from swap_prune.regression.iht import hard_threshold
from swap_prune.regression.top_k import top_k
from tests.cases import but_long, dense_parts, generator, orthogonal_regression, random_regression
from tests.reference import best_subset, dense_value


def identity(problem):
    return replace(problem, metric=torch.ones_like(problem.metric))


@pytest.mark.parametrize("seed", range(6))
def test_new_members_join_where_they_lower_the_objective(seed):
    """With orthonormal columns Q is separable: the best weights on any set are the k largest of the free minimiser."""
    problem, free = orthogonal_regression(40, 24, generator(seed), spread=0.0)

    def best_value(among):
        return problem.value(hard_threshold(free, top_k(free.abs().masked_fill(~among, -1), 6)))

    everything = torch.ones(24, dtype=torch.bool)
    first = torch.zeros_like(everything).index_fill(0, top_k(problem.reference.abs(), 9), True)
    fit = solve_active_set(problem, 6, generator())
    assert fit.converged and not bool(first[fit.support].all())
    assert best_value(everything) - 1e-9 <= fit.value < best_value(first)
    torch.testing.assert_close(fit.weights, hard_threshold(free, fit.support), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_lies_between_magnitude_and_the_optimum(seed):
    problem = identity(random_regression(12, 9, generator(seed), ridge=0.1))
    fit = solve_active_set(problem, 4, generator())
    parts = dense_parts(problem)
    optimum, _ = best_subset(**parts, keep=4)
    start = hard_threshold(problem.reference, top_k(problem.reference.abs(), 4))
    assert optimum - 1e-9 <= fit.value < dense_value(w=start, **parts)
    assert fit.value == pytest.approx(dense_value(w=fit.weights, **parts))
    assert fit.value < 1.6 * optimum


def test_weights_without_gradients_go_first_however_large():
    problem = identity(random_regression(10, 8, generator(3)))
    G = problem.factor.matrix.clone()
    G[:, 5:] = 0
    problem = replace(problem, factor=DenseFactor(G), reference=problem.reference + 10)
    assert set(solve_active_set(problem, 4, generator()).support.tolist()) < set(range(5))
    assert len(solve_active_set(problem, 7, generator()).support) == 7, "but not if the others are too few"


@pytest.mark.parametrize("seed", but_long(range(4)))
def test_layers_keep_to_their_floors(seed):
    """The last layer has no gradients and the smallest weights: it keeps what its floor asks for, and nothing else."""
    problem = identity(random_regression(30, 40, generator(seed), ridge=0.01))
    G, w = problem.factor.matrix.clone(), problem.reference.clone()
    G[:, 30:], w[30:] = 0, 1e-3 * w[30:]
    problem = replace(problem, factor=DenseFactor(G), reference=w)
    floors = [(slice(0, 10), 4), (slice(30, 40), 3)]
    fit = solve_active_set(replace(problem, floors=floors), 8, generator())
    assert len(fit.support) == 8 and int((fit.support >= 30).sum()) == 3 and int((fit.support < 10).sum()) >= 4
    assert fit.value >= solve_active_set(problem, 8, generator()).value
    same = solve_active_set(replace(problem, floors=[(slice(0, 40), 8)]), 8, generator())
    assert torch.equal(same.weights, solve_active_set(problem, 8, generator()).weights), "a floor that says nothing"


def test_a_bound_on_the_iterations_is_kept_and_reported():
    problem = identity(random_regression(30, 40, generator(5), ridge=1e-4))
    fit = solve_active_set(problem, 10, generator(), max_iterations=1)
    assert fit.iterations == 1
    longer = solve_active_set(problem, 10, generator(), max_iterations=200)
    assert longer.converged and longer.value < fit.value


@pytest.mark.parametrize(("n", "p"), [(8, 20), (20, 8)])
def test_curvature_is_the_largest_eigenvalue(n, p):
    problem = identity(random_regression(n, p, generator(1)))
    G = problem.factor.matrix
    exact = float(torch.linalg.eigvalsh(G @ G.T)[-1]) + problem.penalty
    assert 0.95 * exact <= largest_curvature(problem, generator()) <= exact * (1 + 1e-9)


def test_the_unit_of_the_gradients_does_not_matter():
    problem = identity(random_regression(30, 60, generator(3), ridge=0.01))
    fits = []
    for scale in (1.0, 2.0**-20):
        factor = DenseFactor(problem.factor.matrix * scale)
        scaled = replace(problem, factor=factor, target=problem.target * scale, ridge=problem.ridge * scale**2)
        fits.append(solve_active_set(scaled, 12, generator()))
    assert fits[0].iterations == fits[1].iterations > 1
    assert torch.equal(fits[0].support, fits[1].support)


def test_gradients_of_any_size_have_a_curvature():
    """Its square is no number in float32 from 1.8e19 on."""
    problem = identity(random_regression(30, 60, generator(3), ridge=0.01, dtype=torch.float32))
    factor = DenseFactor(problem.factor.matrix * 2.0**40)
    large = replace(problem, factor=factor, target=problem.target * 2.0**40, ridge=problem.ridge * 2.0**80)
    assert largest_curvature(large, generator()) == pytest.approx(2.0**80 * largest_curvature(problem, generator()))
    fits = [solve_active_set(one, 12, generator()) for one in (problem, large)]
    assert torch.equal(fits[0].support, fits[1].support)
    torch.testing.assert_close(fits[0].weights, fits[1].weights)
