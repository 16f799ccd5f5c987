"""Swaps on the support: what single exchanges are said to cost, against refits; the search, against brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.exchanged import DualFit
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import exchange_of, propose_swaps, spared, swap_weights
from tests.cases import dense_parts, generator, random_regression
from tests.reference import best_subset


def fit_on(problem: WeightedRidge, support: torch.Tensor) -> SparseFit:
    refit = problem.refit(support)
    return SparseFit(refit.weights, support, problem.value(refit.weights), 0, True, refit)


def scale_of(problem: WeightedRidge) -> torch.Tensor:
    return problem.factor.shape[0] * (problem.factor.diagonal() + problem.ridge * problem.metric)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("n", "p", "keep"), [(6, 20, 9), (30, 12, 5)])  # k > n and k <= n
def test_exchanges_cost_what_refits_say(n: int, p: int, keep: int, smoothed: bool) -> None:
    problem = random_regression(n, p, generator(1), smoothed=smoothed)
    support = torch.randperm(p, generator=generator(2))[:keep].sort().values
    fit = fit_on(problem, support)
    exchange = exchange_of(problem, support, fit.refit, problem.gradient(fit.weights))
    leave = exchange.leave(torch.arange(keep))
    for position in range(keep):
        rest = torch.cat([support[:position], support[position + 1 :]])
        assert float(leave[position]) == pytest.approx(fit_on(problem, rest).value - fit.value, rel=1e-6)
    outside = torch.tensor([j for j in range(p) if j not in support.tolist()])
    for index, gain in zip(outside, exchange.enter(outside), strict=True):
        more = torch.cat([support, index[None]]).sort().values
        assert float(gain) == pytest.approx(fit.value - fit_on(problem, more).value, rel=1e-6, abs=1e-12)


def test_swaps_do_not_depend_on_the_unit_of_the_gradients() -> None:
    fits = []
    for scale in (1.0, 1e-4, 1e-8, 1e6):
        problem = random_regression(10, 40, generator(5))
        factor = DenseFactor(problem.factor.matrix * scale)
        problem = replace(problem, factor=factor, target=problem.target * scale, metric=problem.metric * scale**2)
        fits.append(swap_weights(problem, fit_on(problem, torch.arange(15))))
    assert fits[0].swaps > 0
    for fit in fits[1:]:
        assert fit.swaps == fits[0].swaps and torch.equal(fit.support, fits[0].support)


def test_proposals_pair_the_cheapest_with_the_best_as_long_as_they_gain() -> None:
    problem = random_regression(8, 30, generator(3))
    fit = fit_on(problem, torch.arange(12))
    exchange = exchange_of(problem, fit.support, fit.refit, problem.gradient(fit.weights))
    leaving, entering, _ = propose_swaps(exchange, scale_of(problem), 10)
    cost, gain = exchange.leave(leaving), exchange.enter(entering)
    assert 0 < len(leaving) == len(entering) <= 10
    assert bool((gain > cost).all()) and bool((cost.diff() >= 0).all()) and bool((gain.diff() <= 0).all())
    assert not set(entering.tolist()) & set(fit.support.tolist())


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swaps_lower_the_value_and_keep_k_weights(dtype: torch.dtype, smoothed: bool) -> None:
    gains = 0
    for seed in range(8):
        problem = random_regression(10, 40, generator(seed), smoothed=smoothed, dtype=dtype)
        before = fit_on(problem, torch.arange(15))
        after = swap_weights(problem, before)
        assert len(set(after.support.tolist())) == 15 and after.value <= before.value
        assert after.value == pytest.approx(problem.value(problem.refit(after.support).weights), rel=1e-4)
        assert int(after.weights.count_nonzero()) <= 15
        assert bool((after.support.diff() > 0).all())
        gains += after.swaps > 0
    assert gains == 8, "an arbitrary support can be improved"


@pytest.mark.parametrize("seed", range(6))
def test_single_swaps_reach_the_best_subset_of_a_well_conditioned_design(seed: int) -> None:
    problem = random_regression(60, 9, generator(seed), ridge=0.1)
    best, _ = best_subset(keep=4, **dense_parts(problem))
    fit = swap_weights(problem, fit_on(problem, torch.arange(4)), max_batches=50)
    assert best * (1 - 1e-9) <= fit.value <= best * 1.02


def test_they_go_on_where_hard_thresholding_has_come_to_rest() -> None:
    better = 0
    for seed in range(10):
        problem = random_regression(15, 60, generator(seed), ridge=0.01)
        fit = solve_sparse(problem, 12)
        assert fit.converged
        better += swap_weights(problem, fit).value < fit.value * (1 - 1e-4)
    assert better >= 5


def test_swaps_from_the_end_of_the_path_come_as_low_as_after_hard_thresholding() -> None:
    for seed in range(12):
        problem = random_regression(20, 300, generator(seed), ridge=0.02, dtype=torch.float32)
        path, rest = solve_sparse(problem, 30, swaps_follow=True), solve_sparse(problem, 30)
        assert path.iterations == 0 and path.converged
        assert swap_weights(problem, path, 50).value <= swap_weights(problem, rest, 50).value * (1 + 1e-4)


@pytest.mark.parametrize(("keep", "start"), [(80, None), (30, torch.arange(30))])
def test_hard_thresholding_stays_where_no_path_was_walked(keep: int, start: torch.Tensor | None) -> None:
    found = 0
    for seed in range(6):
        problem = random_regression(20, 300, generator(seed), ridge=0.02)
        followed = solve_sparse(problem, keep, start=start, swaps_follow=True)
        assert torch.equal(followed.support, solve_sparse(problem, keep, start=start).support)
        found += followed.iterations > 0
    assert found > 0


def test_a_search_that_its_limit_ended_has_not_converged() -> None:
    problem = random_regression(20, 400, generator(0), ridge=0.01)
    fit = solve_sparse(problem, 200)
    assert fit.converged and swap_weights(problem, fit, 0) is fit
    found = [swap_weights(problem, fit, batches) for batches in (1, 2, 50)]
    assert [one.converged for one in found] == [False, False, True]


def test_nothing_to_swap() -> None:
    problem = random_regression(10, 6, generator(0))
    everything = fit_on(problem, torch.arange(6))
    assert swap_weights(problem, everything) is everything
    without_ridge = random_regression(10, 6, generator(0), ridge=0.0)
    fit = fit_on(without_ridge, torch.arange(3))
    assert swap_weights(without_ridge, fit) is fit


def test_no_layer_is_swapped_below_its_floor() -> None:
    support = torch.tensor([0, 1, 2, 5, 6, 9])
    leaving = torch.tensor([5, 1, 0, 9, 6, 2])
    may = spared(leaving, ((slice(0, 4), 1), (slice(4, 8), 1)), support)
    assert may.tolist() == [True, True, True, True, False, False]
    draw = generator(3)
    for _ in range(20):
        support = torch.randperm(60, generator=draw)[:40].sort().values
        leaving = support[torch.randperm(40, generator=draw)[:30]]
        floors = [(slice(5, 20), 4), (slice(20, 21), 1), (slice(30, 55), 9)]
        left, expected = set(support.tolist()), []
        for index in leaving.tolist():  # those before it in its layer have left, whether they might or not
            kept = [sum(place.start <= i < place.stop for i in left) for place, _ in floors]
            inside = [place.start <= index < place.stop for place, _ in floors]
            needed = any(here and n <= least for here, n, (_, least) in zip(inside, kept, floors, strict=True))
            expected.append(not needed)
            left.discard(index)
        assert spared(leaving, floors, support).tolist() == expected


def test_batches_that_do_not_pay_are_halved_down_to_a_sixteenth(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_regression(20, 1600, generator(0), ridge=0.01)
    fit, sizes, exchanged = fit_on(problem, torch.arange(800)), [], DualFit.exchanged

    def paying_alone(self: DualFit, leaving: torch.Tensor, *rest: torch.Tensor | None) -> DualFit:
        sizes.append(len(leaving))
        tried = exchanged(self, leaving, *rest)  # type: ignore[arg-type]
        return tried if len(leaving) == 1 else replace(tried, dropped=tried.dropped + math.inf)

    monkeypatch.setattr(DualFit, "exchanged", paying_alone)
    assert swap_weights(problem, fit, max_batches=1).swaps == 1
    assert sizes == [16, 8, 4, 2, 1]
