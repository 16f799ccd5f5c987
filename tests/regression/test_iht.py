"""Iterative hard thresholding: exact where the answer is known, and the invariances of its objective."""

from dataclasses import replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.iht import hard_threshold, solve_sparse
from swap_prune.regression.metric import diagonal_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.top_k import top_k
from tests.cases import dense_parts, generator, normal, orthogonal_regression, random_regression
from tests.reference import best_subset, dense_value, normal_equation_refit


def assert_sparse(fit, problem, keep):
    p = len(problem.reference)
    assert fit.support.shape == (keep,) and len(set(fit.support.tolist())) == keep
    outside = torch.ones(p, dtype=torch.bool).index_fill(0, fit.support, False)
    assert bool((fit.weights[outside] == 0).all()) and bool(torch.isfinite(fit.weights).all())
    parts = dense_parts(problem)
    scale = dense_value(w=torch.zeros(p, dtype=torch.float64), **parts)
    assert fit.value == pytest.approx(dense_value(w=fit.weights.double(), **parts), rel=1e-5, abs=1e-5 * scale)


def test_top_k():
    scores = torch.tensor([0.5, 3.0, -1.0, 2.0, 0.0])
    assert top_k(scores, 2).tolist() == [1, 3]
    assert top_k(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert top_k(scores, 0).tolist() == []
    assert len(set(top_k(torch.ones(9), 4).tolist())) == 4


def test_hard_threshold():
    w = torch.tensor([1.0, -2.0, 3.0, 4.0])
    assert hard_threshold(w, torch.tensor([1, 3])).tolist() == [0.0, -2.0, 0.0, 4.0]
    assert w.tolist() == [1.0, -2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("n", "p"), [(30, 12), (8, 40), (1, 6)])
def test_exactly_k_weights_and_never_worse_than_the_start(n, p, smoothed, dtype):
    problem = random_regression(n, p, generator(1), smoothed=smoothed, dtype=dtype)
    for keep in (1, 2, p // 2, p - 1, p):
        fit = solve_sparse(problem, keep)
        assert_sparse(fit, problem, keep)
        first = top_k(problem.metric * problem.reference.square(), keep)
        assert fit.value <= problem.value(problem.refit(first).weights) * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_a_support_that_is_given(seed):
    problem = random_regression(10, 25, generator(seed))
    start = torch.randperm(25, generator=generator(seed + 100))[:7].sort().values
    before = start.clone()
    fit = solve_sparse(problem, 7, start=start)
    assert_sparse(fit, problem, 7)
    assert fit.value <= problem.value(problem.refit(start).weights) * (1 + 1e-9)
    assert torch.equal(start, before)


def test_steps_that_would_make_it_worse_are_refused():
    """One step at a time, each from where the last one ended: full steps often go uphill or back and forth here."""
    for seed in range(30):
        problem = random_regression(15, 12, generator(seed), ridge=1e-3)
        support, value = torch.arange(3), float("inf")
        for _ in range(8):
            fit = solve_sparse(problem, 3, start=support, max_iterations=1)
            assert fit.value <= value * (1 + 1e-9)
            support, value = fit.support, fit.value


@pytest.mark.parametrize("keep", [1, 3, 6])
@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_optimum_of_an_orthogonal_design(seed, spread, keep):
    problem, free = orthogonal_regression(14, 7, generator(seed), spread=spread)
    value, support = best_subset(keep=keep, **dense_parts(problem))
    by_formula = (problem.metric * free.square()).topk(keep).indices.sort().values
    assert by_formula.tolist() == list(support), "the case's own formula"
    fit = solve_sparse(problem, keep, start=torch.arange(keep))
    assert fit.value == pytest.approx(value, rel=1e-3)
    assert fit.support.sort().values.tolist() == list(support)
    torch.testing.assert_close(fit.weights[fit.support], free[fit.support])


@pytest.mark.parametrize("seed", range(6))
def test_not_below_the_best_subset_and_close_to_it(seed):
    """Brute force is a bound that no solver can pass; a well-conditioned design leaves little above it."""
    problem = random_regression(40, 8, generator(seed), ridge=0.1)
    value, _ = best_subset(keep=4, **dense_parts(problem))
    fit = solve_sparse(problem, 4)
    assert value * (1 - 1e-9) <= fit.value <= 1.5 * value


def test_weights_are_the_refit_of_their_support():
    problem = random_regression(12, 20, generator(2))
    fit = solve_sparse(problem, 8)
    expected = normal_equation_refit(support=fit.support, **dense_parts(problem))
    torch.testing.assert_close(fit.weights, expected, rtol=1e-6, atol=1e-8)


def test_planted_weights_are_found():
    """Weights of which 5 matter: without noise Q = 0 is reached on their support."""
    G = normal(60, 30, seed=3)
    planted = torch.zeros(30, dtype=torch.float64)
    planted[torch.tensor([2, 7, 11, 20, 29])] = torch.tensor([3.0, -2.0, 4.0, 2.5, -3.5], dtype=torch.float64)
    reference = planted + 0.01 * normal(30, seed=4)
    problem = WeightedRidge(DenseFactor(G), G @ planted, reference, 0.0, torch.ones(30, dtype=torch.float64))
    fit = solve_sparse(problem, 5, start=torch.tensor([0, 1, 2, 7, 11]), max_iterations=50)
    assert fit.support.sort().values.tolist() == [2, 7, 11, 20, 29]
    torch.testing.assert_close(fit.weights, planted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("smoothed", [False, True])
def test_more_iterations_never_raise_the_value(smoothed):
    for seed in range(4):
        problem = random_regression(20, 40, generator(seed), smoothed=smoothed)
        values = [solve_sparse(problem, 10, start=torch.arange(10), max_iterations=i).value for i in (1, 2, 3, 5, 10)]
        assert values == sorted(values, reverse=True)
        assert values[-1] < problem.value(problem.refit(torch.arange(10)).weights)


@pytest.mark.parametrize("factor", [2.0**-8, 4.0, 2.0**10])
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_scale_of_a_layer_does_not_matter_in_the_diagonal_metric(ridge, factor):
    """Columns times s and weights over s describe the same network; powers of two keep the arithmetic exact."""
    G, reference = normal(15, 24, seed=5), normal(24, seed=6)

    def regression(matrix, weights):
        fisher = DenseFactor(matrix)
        return WeightedRidge(fisher, matrix @ weights, weights, ridge, diagonal_metric(fisher.diagonal(), 0.0))

    scale = torch.ones(24, dtype=torch.float64)
    scale[:9] = factor
    plain = solve_sparse(regression(G, reference), 8)
    scaled = solve_sparse(regression(G * scale, reference / scale), 8)
    assert scaled.support.sort().values.tolist() == plain.support.sort().values.tolist()
    torch.testing.assert_close(scaled.weights * scale, plain.weights, rtol=1e-7, atol=1e-9)
    assert scaled.value == pytest.approx(plain.value, rel=1e-9)


@pytest.mark.parametrize("smoothed", [False, True])
def test_order_of_the_rows_does_not_matter(smoothed):
    problem = random_regression(16, 30, generator(7), smoothed=smoothed)
    order = torch.randperm(16, generator=generator(8))
    permuted = replace(
        problem,
        factor=problem.factor.rows(order),
        target=problem.target[order],
        smoothing=problem.smoothing[order][:, order] if smoothed else None,
    )
    plain, other = solve_sparse(problem, 9), solve_sparse(permuted, 9)
    assert plain.support.sort().values.tolist() == other.support.sort().values.tolist()
    torch.testing.assert_close(plain.weights, other.weights, rtol=1e-6, atol=1e-8)


def test_order_of_the_weights_does_not_matter():
    problem = random_regression(16, 30, generator(9))
    order = torch.randperm(30, generator=generator(10))
    permuted = replace(
        problem,
        factor=DenseFactor(dense_parts(problem)["G"][:, order]),
        reference=problem.reference[order],
        metric=problem.metric[order],
    )
    torch.testing.assert_close(
        solve_sparse(permuted, 9).weights, solve_sparse(problem, 9).weights[order], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_gradients_of_zero_leave_the_weights(ridge):
    reference = normal(6, seed=11)
    zero = torch.zeros(4, 6, dtype=torch.float64)
    problem = WeightedRidge(DenseFactor(zero), zero[:, 0], reference, ridge, torch.ones(6, dtype=torch.float64))
    fit = solve_sparse(problem, 3)
    assert_sparse(fit, problem, 3)
    expected = hard_threshold(reference, top_k(reference.abs(), 3))
    torch.testing.assert_close(fit.weights, expected)


def test_inputs_are_left_alone():
    problem = random_regression(8, 12, generator(12), smoothed=True)
    before = {name: part.clone() for name, part in dense_parts(problem).items() if name != "ridge"}
    solve_sparse(problem, 5)
    after = dense_parts(problem)
    assert all(torch.equal(part, after[name]) for name, part in before.items())


def test_a_layer_keeps_its_floor_wherever_the_iterations_lead():
    free = 0
    for seed in range(8):
        problem = random_regression(10, 40, generator(seed))
        held = replace(problem, floors=((slice(0, 15), 12), (slice(15, 40), 0)))
        assert int((solve_sparse(held, 15, start=torch.arange(15)).support < 15).sum()) >= 12
        free += int((solve_sparse(problem, 15, start=torch.arange(15)).support < 15).sum()) < 12
    assert free > 0, "else nothing is held"
