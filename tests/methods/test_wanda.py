"""Wanda's formula, by hand and on a network."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import swap_prune
from swap_prune.methods import Wanda
from tests.cases import generator, normal, pruning_problem


def test_scores_by_hand():
    problem = pruning_problem(9, 26, 12)
    W = problem.reference[:12].view(2, 6)
    norms = problem.inputs.rows["first"][0].square().sum(0).sqrt()
    scores = torch.stack([torch.stack([abs(W[i, j]) * norms[j] for j in range(6)]) for i in range(2)])
    kept = Wanda().solve(problem, generator()).kept[:12].view(2, 6)
    for row, score in zip(kept, scores, strict=True):
        assert set(row.nonzero().flatten().tolist()) == set(score.topk(int(row.sum())).indices.tolist())


def test_a_network_with_groups_is_pruned_by_row_and_keeps_its_other_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = normal(20, 4, 4, 4, dtype=torch.float32) * torch.tensor([1.0, 5.0, 0.2, 2.0]).view(4, 1, 1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    patches = nn.functional.unfold(x, 3).movedim(1, 2).reshape(-1, 4 * 9)  # (positions, all inputs)
    norms = patches.square().mean(0).sqrt().view(2, 18).repeat_interleave(2, 0)  # outputs 0, 1 see group 0
    scores = before["0.weight"].detach().abs().view(4, 18) * norms
    data = TensorDataset(x, torch.zeros(20, dtype=torch.long))
    report = swap_prune.prune(model, data, 0.5, "wanda", samples=20, progress=False)
    assert report.stages[0].samples == 20 and report.stages[0].loss is None
    weights = dict(model.named_parameters())
    kept = weights["0.weight"].detach().view(4, 18) != 0
    assert torch.equal(kept, torch.zeros_like(kept).scatter(1, scores.topk(9, dim=1).indices, True))
    assert weights["3.weight"].ne(0).sum(1).tolist() == [8, 8, 8]
    for name, value in weights.items():
        assert torch.equal(value[value != 0], before[name][value != 0])
