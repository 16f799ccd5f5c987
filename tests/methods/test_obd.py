"""OBD against the loss model it stands for."""

import itertools

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods import OBD
from swap_prune.problem import PruningProblem
from tests.cases import generator, normal


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_removes_what_the_diagonal_model_says_costs_least(seed):
    G, w = normal(9, 7, seed=seed) * torch.logspace(-1, 1, 7).double(), normal(7, seed=seed + 1)
    f = G.square().mean(0)

    def cost(removed):
        return sum(float((f[j] + 0.01) * w[j] ** 2 / 2) for j in removed)

    best = min(itertools.combinations(range(7), 4), key=cost)
    solution = OBD(damping=0.01).solve(PruningProblem(w, 3, DenseFactor(G)), generator())
    assert (~solution.kept).nonzero().flatten().tolist() == list(best)
    assert torch.equal(solution.weights[solution.kept], w[solution.kept])


def test_weights_without_gradients_are_ranked_by_size_and_zeros_go_first():
    w = torch.tensor([0.1, 0.0, 0.3, 0.2])
    problem = PruningProblem(w, 2, DenseFactor(torch.zeros(3, 4)))
    assert OBD().solve(problem, generator()).kept.tolist() == [False, False, True, True]
    lively = PruningProblem(torch.tensor([0.1, 0.0, 0.3]), 2, DenseFactor(torch.tensor([[0.0, 9.0, 0.0]])))
    assert OBD(damping=0.0).solve(lively, generator()).kept.tolist() == [True, False, True]
