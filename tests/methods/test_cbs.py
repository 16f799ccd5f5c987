"""The Combinatorial Brain Surgeon: every swap against all there are, the update against the dense minimum."""

import itertools

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods import CBS
from swap_prune.methods.cbs import improve_by_swaps
from swap_prune.problem import PruningProblem
from tests.cases import generator, normal
from tests.reference import brain_surgeon, damped_fisher


def removal_cost(F, w, kept):
    v = w.masked_fill(kept, 0)
    return float(v @ F @ v / 2)


def swap_exhaustively(F, w, kept, floors=()):
    """Make the best of all swaps that floors allow, until none helps: the kept set and the number of swaps."""
    kept, swaps = kept.clone(), 0
    while True:
        tried = []
        for i, j in itertools.product(kept.nonzero().flatten().tolist(), (~kept).nonzero().flatten().tolist()):
            other = kept.clone()
            other[i], other[j] = False, True
            if all(int(other[place].sum()) >= least for place, least in floors):
                tried.append((removal_cost(F, w, other), i, j))
        cost, i, j = min(tried)
        if not cost < removal_cost(F, w, kept) - 1e-9:
            return kept, swaps
        kept[i], kept[j] = False, True
        swaps += 1


@pytest.mark.parametrize("damping", [1e-5, 0.3])
@pytest.mark.parametrize(("n", "p", "keep"), [(20, 9, 4), (4, 12, 6), (4, 12, 2)])
def test_with_all_weights_as_candidates_every_swap_is_the_best(n, p, keep, damping):
    total = 0
    for seed in range(5):
        G, w = normal(n, p, seed=seed), normal(p, seed=seed + 100)
        start = torch.arange(p) < keep
        expected, swaps = swap_exhaustively(damped_fisher(G, damping), w, start)
        kept, made, _ = improve_by_swaps(DenseFactor(G), w, start, damping, p, 50)
        assert torch.equal(kept, expected) and made == swaps
        total += swaps
    assert total > 5


@pytest.mark.parametrize("candidates", [1, 3])
def test_few_candidates_lower_the_cost_and_say_when_they_are_done(candidates):
    G, w = normal(15, 40), normal(40, seed=1)
    F, start = damped_fisher(G, 0.01), torch.arange(40) < 15
    factor = DenseFactor(G)
    costs = [removal_cost(F, w, start)]
    for rounds in range(1, 6):
        kept, _, used = improve_by_swaps(factor, w, start, 0.01, candidates, rounds)
        assert used <= rounds and int(kept.sum()) == 15
        costs.append(removal_cost(F, w, kept))
    assert costs == sorted(costs, reverse=True) and costs[1] < costs[0]
    done, swaps, used = improve_by_swaps(factor, w, start, 0.01, candidates, 1000)
    again, more, _ = improve_by_swaps(factor, w, done, 0.01, candidates, 1000)
    assert used < 1000 and swaps > 0 and more == 0 and torch.equal(again, done)


FLOORS = {
    "one layer of all": [(slice(0, 9), 4)],
    "binding everywhere": [(slice(0, 3), 2), (slice(3, 6), 1), (slice(6, 9), 1)],
    "some": [(slice(0, 3), 1), (slice(6, 9), 1)],
    "none": [(slice(0, 3), 0)],
}


@pytest.mark.parametrize("case", FLOORS)
def test_with_all_weights_as_candidates_every_swap_is_the_best_that_floors_allow(case):
    floors = FLOORS[case]
    held = 0
    for seed in range(8):
        G, w = normal(20, 9, seed=seed), normal(9, seed=seed + 100)
        start = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([0, 1, 3, 6]), True)
        F = damped_fisher(G, 0.01)
        expected, swaps = swap_exhaustively(F, w, start, floors)
        kept, made, _ = improve_by_swaps(DenseFactor(G), w, start, 0.01, 9, 50, floors)
        assert torch.equal(kept, expected) and made == swaps
        held += not torch.equal(kept, swap_exhaustively(F, w, start)[0])
    assert (held > 0) == (case in ("binding everywhere", "some"))


def test_a_layer_at_its_floor_does_not_stop_the_others():
    """The cheapest candidates are all of a layer that can spare none."""
    w = torch.cat([torch.full((6,), 1e-3), torch.tensor([1.0, 2.0, 3.0, 0.5])]).double()
    kept = torch.tensor([True] * 6 + [False, True, True, True])
    found, swaps, _ = improve_by_swaps(DenseFactor(torch.zeros(2, 10).double()), w, kept, 1.0, 2, 9, [(slice(0, 6), 6)])
    assert swaps == 1 and found.tolist() == [True] * 6 + [True, True, True, False]


def test_two_weights_that_cancel_are_removed_together():
    """Magnitude keeps one of them; looked at alone, neither can go."""
    G = torch.eye(4, dtype=torch.float64)[:, [0, 0, 1, 2]]
    w = torch.tensor([3.0, -3.2, 5.0, 1.0], dtype=torch.float64)
    solution = CBS(damping=1e-5).solve(PruningProblem(w, 2, DenseFactor(G)), generator())
    assert solution.kept.tolist() == [False, False, True, True] and solution.evidence == {"swaps": 1}


def test_the_update_is_the_constrained_minimum():
    G, w = normal(9, 14), normal(14, seed=1)
    solution = CBS(damping=0.05).solve(PruningProblem(w, 6, DenseFactor(G)), generator())
    removed = (~solution.kept).nonzero().flatten().tolist()
    expected = brain_surgeon(damped_fisher(G, 0.05), w, removed).masked_fill(~solution.kept, 0)
    torch.testing.assert_close(solution.weights, expected)


def test_what_would_come_back_is_looked_for_among_the_largest():
    w, kept = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([True, False, False])
    found, _, _ = improve_by_swaps(DenseFactor(torch.zeros(2, 3)), w, kept, 1.0, 1, 1)
    assert found.tolist() == [False, True, False]
