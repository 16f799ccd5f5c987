"""The searches of a support, put together: path, hard thresholding, swaps, coupling, active set."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from swap_prune import EWR, LR
from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods import ewr as ewr_module
from swap_prune.regression import active_set, tuning
from swap_prune.regression.active_set import solve_active_set
from swap_prune.regression.iht import hard_threshold, solve_sparse
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import exchange_of, propose_swaps, swap_weights
from swap_prune.regression.top_k import top_k
from swap_prune.regression.tuning import Coupling, choose_coupling
from swap_prune.regression.two_regime import critical_step, two_regime_step
from tests.cases import dense_parts, generator, orthogonal_regression, pruning_problem, random_regression
from tests.reference import best_subset
from tests.regression.test_active_set import identity
from tests.regression.test_swap import fit_on, scale_of
from tests.regression.test_two_regime import sparse_start


def test_the_first_support_is_found_along_a_path_of_refits(monkeypatch):
    """From a fifth of the weights down, never more than a quarter leaving, by their refitted size."""
    problem = random_regression(12, 200, generator(0), ridge=0.01)
    seen = []
    refit = WeightedRidge.refit

    def watched(self, support, previous=None):
        found = refit(self, support, previous)
        seen.append((support, found.weights))
        return found

    monkeypatch.setattr(WeightedRidge, "refit", watched)
    fit = solve_sparse(problem, 8, max_iterations=0)
    sizes = [len(support) for support, _ in seen]
    assert 40 <= sizes[0] <= 54 and sizes[-1] == 8
    assert torch.equal(seen[0][0], top_k(problem.reference.square() * problem.metric, sizes[0]))
    for (before, w), (after, _) in itertools.pairwise(seen):
        assert 0.75 * len(before) - 1 <= len(after) < len(before)
        assert torch.equal(after, top_k(w.square() * problem.metric, len(after)))
    assert not torch.equal(fit.support, top_k(problem.reference.square() * problem.metric, 8))
    seen.clear()
    sparse = replace(problem, reference=problem.reference * (torch.arange(200) % 10 == 0))
    solve_sparse(sparse, 8, max_iterations=0)
    assert all(len(support) <= 20 for support, _ in seen), "what an earlier stage removed does not come back"


def test_a_path_in_a_known_metric_begins_with_its_gram_matrix(monkeypatch):
    """A floor or another ridge changes the path, not where it begins: no column there is multiplied again."""
    problem = random_regression(12, 200, generator(0), ridge=0.01)
    other = replace(problem, ridge=0.02, floors=((slice(0, 50), 4),))
    columns = []
    gram = DenseFactor.gram

    def counted(self, scale):
        columns.append(int(scale.count_nonzero()))
        return gram(self, scale)

    monkeypatch.setattr(DenseFactor, "gram", counted)
    known = solve_sparse(problem, 30).first
    columns.clear()
    fit, before = solve_sparse(other, 30), list(columns)
    columns.clear()
    again = solve_sparse(other, 30, previous=known)
    assert columns == before[1:] and before[0] == len(known.support) > 30
    assert torch.equal(again.weights, fit.weights) and again.value == fit.value
    assert again.first is None, "that is the other path's"


@pytest.mark.parametrize("ridge", [0.05, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_one_step_reaches_the_optimum_of_an_orthogonal_design(ridge, seed):
    """The line minimum counts the ridge."""
    problem, _free = orthogonal_regression(14, 7, generator(seed), ridge=ridge, spread=1.0)
    value, _support = best_subset(keep=3, **dense_parts(problem))
    fit = solve_sparse(problem, 3, start=torch.arange(3), max_iterations=1)
    assert fit.value == pytest.approx(value, rel=1e-3)


def test_a_search_that_was_cut_short_says_so():
    cut = 0
    for seed in range(10):
        problem = random_regression(20, 40, generator(seed))
        one, two = (solve_sparse(problem, 10, start=torch.arange(10), max_iterations=i) for i in (1, 2))
        if two.iterations == 2:
            cut += 1
            assert not one.converged
    assert cut > 0
    problem = identity(random_regression(30, 40, generator(5), ridge=1e-4))
    assert not solve_active_set(problem, 10, generator(), max_iterations=1).converged


def test_swaps_leave_a_layer_its_floor():
    """In the search, not only in `spared`."""
    touched = 0
    for seed in range(8):
        problem = random_regression(10, 40, generator(seed))
        support = torch.arange(15)
        free = swap_weights(problem, fit_on(problem, support))
        touched += int((free.support < 15).sum()) < 12
        held = replace(problem, floors=((slice(0, 15), 12), (slice(15, 40), 0)))
        after = swap_weights(held, fit_on(held, support))
        assert int((after.support < 15).sum()) >= 12 and after.swaps > 0
    assert touched > 0


def test_a_batch_that_does_not_pay_is_halved_down_to_one_pair():
    """Where the search ends, the best single pair gains nothing either."""
    for seed in range(10):
        problem = random_regression(20, 400, generator(seed), ridge=0.01)
        fit = solve_sparse(problem, 200)
        after = swap_weights(problem, fit, max_batches=50)
        exchange = exchange_of(problem, after.support, after.refit, problem.gradient_of(after.refit))
        leaving, entering, _ = propose_swaps(exchange, scale_of(problem), 1)
        if len(leaving) > 0:
            support = after.support.index_copy(0, leaving, entering).sort().values
            assert fit_on(problem, support).value >= after.value * (1 - 1e-4)
        assert after.swaps > 4 and len(set(after.support.tolist()) - set(fit.support.tolist())) <= after.swaps
        first = swap_weights(problem, fit, max_batches=1)
        assert first.swaps == 4 and len(set(first.support.tolist()) - set(fit.support.tolist())) == 4


def overfitted(n=60, p=50, seed=3):
    problem = random_regression(n, p, generator(seed), ridge=1e-6)
    return replace(problem, target=problem.factor.matvec(problem.reference))


def test_a_coupling_that_held_out_rows_favour_is_taken(monkeypatch):
    """The baseline fits as many weights as it has rows; one candidate keeps them near the reference."""
    pairing = overfitted()
    seen = []

    def couple(fitting, x, coupling):
        seen.append((len(fitting.target), len(x)))
        good = coupling.anchor == 0.5 and coupling.epsilon == 2.0
        return replace(fitting, ridge=10.0 if good else 1e-6)

    monkeypatch.setattr(tuning, "couple", couple)
    choice, evidence = choose_coupling(pairing, torch.arange(44), generator(0), (0.05, 0.5), (0.1, 2.0))
    assert (choice.anchor, choice.epsilon) == (0.5, 2.0)
    assert evidence["held_out_loss"] < evidence["held_out_loss_pairing"]
    assert seen == [(45, 45)] * 4, "a quarter of the rows is held out"
    choose_coupling(overfitted(400), torch.arange(20), generator(0), (0.5,), (0.1,))
    assert seen[-1] == (192, 192), "of 256 rows"


def test_in_the_second_regime_tau_grows_until_the_objective_rises():
    grown = 0
    for seed in range(20):
        problem = random_regression(20, 15, generator(seed), ridge=0.01)
        w, support = sparse_start(problem, 4)
        gradient = problem.gradient(w)
        tau = critical_step(w, gradient, support)
        inside = hard_threshold(gradient, support)
        moved = problem.factor.matvec(inside)
        curvature = float(moved @ moved + problem.penalty * (problem.metric @ inside.square()))
        if float(gradient @ inside) / curvature <= tau or tau == 0:
            continue

        def value(t, w=w, gradient=gradient, problem=problem):
            u = w - t * gradient
            return problem.value(hard_threshold(u, top_k(u.abs(), 4)))

        edge, tau = problem.value(w - tau * inside), tau * (1 + 2**-10)  # past the tie of two supports
        best, steps = value(tau), 0
        while value(tau * 1.05 ** (steps + 1)) < best:
            steps += 1
            best = value(tau * 1.05**steps)
        grown += steps > 1
        assert two_regime_step(problem, w, support).value == pytest.approx(min(edge, best))
    assert grown > 0


def test_what_is_asked_of_a_coupling_is_asked_where_it_is_chosen(monkeypatch):
    asked = []

    def choose(pairing, support, generator, anchors, epsilons, **named):
        asked.append((anchors, named))
        return Coupling(0.0, 1.0), {}

    monkeypatch.setattr(ewr_module, "choose_coupling", choose)
    problem = pruning_problem(30, 40, 12, seed=1)
    EWR(gradient="paper", debias=False, anchor=0.3).solve(problem, generator())
    EWR(epsilon_unit="absolute", relaxation=7.0).solve(problem, generator())
    (anchors, named), (no_anchors, relaxed) = asked
    assert anchors == (0.3,) and named.pop("known") is not None and no_anchors is None
    assert named == {"gradient": "paper", "debias": False, "relaxation": math.inf} and relaxed["relaxation"] == 7.0


def test_active_sets_that_were_cut_short_are_reported(monkeypatch):
    iterate = active_set._iterate
    monkeypatch.setattr(active_set, "_iterate", lambda *arguments: replace(iterate(*arguments), converged=True))
    found = [
        active_set.solve_active_set(
            identity(random_regression(30, 60, generator(s), ridge=1e-3)), 6, generator(), max_iterations=1
        )
        for s in range(8)
    ]
    assert not all(fit.converged for fit in found)


@pytest.mark.parametrize("metric", ["diagonal", "layer", "factored", "identity"])
@pytest.mark.parametrize("n", [8, 30])
def test_the_unit_of_the_loss_does_not_matter(n, metric):
    """A trillionth of it, and a trillion: powers of two, which change no digit."""
    masks, method = [], LR(metric=metric, damping=1.0, first_order=0.0, swaps=10)
    for scale in (1.0, 2.0**-40, 2.0**40):
        problem = pruning_problem(n, 80, 20, seed=3)
        factor = DenseFactor(problem.fisher().matrix * scale)
        solution = method.solve(replace(problem, factor=factor), generator())
        assert solution.evidence["swaps"] > 0
        masks.append(solution.kept)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_no_more_batches_are_swapped_than_asked_for():
    problem = random_regression(20, 400, generator(0), ridge=0.01)
    fit = solve_sparse(problem, 200)
    assert [swap_weights(problem, fit, batches).swaps for batches in (0, 1, 2)] == [0, 4, 8]
