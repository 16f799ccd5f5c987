"""WoodFisher against the dense inverse and the dense constrained minimum."""

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods import WoodFisher
from swap_prune.problem import PruningProblem
from tests.cases import generator, normal, pruning_problem
from tests.reference import brain_surgeon, damped_fisher

SIZES = pytest.mark.parametrize(("n", "p", "keep"), [(30, 12, 5), (7, 16, 10), (7, 16, 3)])


def blocks_of(problem, size):
    return [part for layer in problem.layers() for part in torch.arange(16)[layer.place].split(size)]


@pytest.mark.parametrize("update", ["independent", "joint"])
def test_one_weight_is_removed_by_the_surgeons_rule(update):
    """Of all single removals, each compensated at best, the one of least cost."""
    G, w = normal(8, 6), normal(6, seed=1)
    F = damped_fisher(G, 0.1)
    after = [brain_surgeon(F, w, [q]) for q in range(6)]
    best = min(after, key=lambda v: float((v - w) @ F @ (v - w)))
    solution = WoodFisher(0.1, update).solve(PruningProblem(w, 5, DenseFactor(G)), generator())
    torch.testing.assert_close(solution.weights, best.masked_fill(~solution.kept, 0))


@SIZES
def test_independent_updates_add_up(n, p, keep):
    problem = pruning_problem(n, p, keep, dtype=torch.float64)
    w, inverse = problem.reference, torch.linalg.inv(damped_fisher(problem.factor.matrix, 0.05))
    costs = w.square() / (2 * inverse.diagonal())
    removed = costs.argsort()[: p - keep].tolist()
    expected = w - sum(w[q] / inverse[q, q] * inverse[:, q] for q in removed)
    expected[removed] = 0
    solution = WoodFisher(damping=0.05).solve(problem, generator())
    assert sorted(removed) == (~solution.kept).nonzero().flatten().tolist()
    torch.testing.assert_close(solution.weights, expected)


@SIZES
def test_the_joint_update_is_the_constrained_minimum(n, p, keep):
    problem = pruning_problem(n, p, keep, dtype=torch.float64)
    solution = WoodFisher(damping=0.05, update="joint").solve(problem, generator())
    removed = (~solution.kept).nonzero().flatten().tolist()
    expected = brain_surgeon(damped_fisher(problem.factor.matrix, 0.05), problem.reference, removed)
    torch.testing.assert_close(solution.weights, expected.masked_fill(~solution.kept, 0))


@pytest.mark.parametrize("update", ["independent", "joint"])
def test_blocks_see_only_themselves(update):
    """Blocks of 3 within the two layers: the dense method with everything else in F struck out."""
    problem = pruning_problem(7, 16, 8, dtype=torch.float64)
    G, w = problem.factor.matrix, problem.reference
    F = torch.block_diag(*(damped_fisher(G[:, part], 0.05) for part in blocks_of(problem, 3)))
    inverse = torch.linalg.inv(F)
    removed = (w.square() / inverse.diagonal()).argsort()[:8].tolist()
    if update == "joint":
        expected = brain_surgeon(F, w, removed)
    else:
        expected = w - sum(w[q] / inverse[q, q] * inverse[:, q] for q in removed)
    expected[removed] = 0
    solution = WoodFisher(0.05, update, block=3).solve(problem, generator())
    torch.testing.assert_close(solution.weights, expected)


def test_many_weights_are_taken_in_blocks(monkeypatch):
    problem = pruning_problem(7, 16, 8, dtype=torch.float64)
    monkeypatch.setattr("swap_prune.methods.woodfisher.WHOLE", 15)
    monkeypatch.setattr("swap_prune.methods.woodfisher._BLOCK", 3)
    expected = WoodFisher(block=3).solve(problem, generator())
    assert torch.equal(WoodFisher().solve(problem, generator()).weights, expected.weights)
