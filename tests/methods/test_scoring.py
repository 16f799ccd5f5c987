"""What is kept where scores are compared over all weights, within layers, or within rows."""

from dataclasses import replace

import pytest
import torch

from swap_prune.methods import Magnitude
from swap_prune.methods.scoring import select_best
from swap_prune.schedule import share_out
from tests.cases import generator, normal, pruning_problem


def rows_of(kept):
    """The kept set of a problem of 26 weights, (2, 6) and (1, 14), row by row."""
    return [kept[:6], kept[6:12], kept[12:]]


def test_global_is_the_top_of_all():
    problem, scores = pruning_problem(3, 26, 9), normal(26, seed=2).abs()
    assert select_best(problem, scores).nonzero().flatten().tolist() == scores.topk(9).indices.sort().values.tolist()


@pytest.mark.parametrize("keep", [0, 1, 7, 13, 25, 26])
def test_layers_keep_the_same_share_of_their_best(keep):
    problem, scores = pruning_problem(3, 26, keep), normal(26, seed=2).abs()
    kept = select_best(problem, scores, "layer")
    for place, share in zip((slice(0, 12), slice(12, 26)), share_out(keep, [12, 14]), strict=True):
        expected = set(scores[place].topk(share).indices.tolist())
        assert set(kept[place].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("keep", [0, 1, 7, 13, 25, 26])
def test_rows_of_a_layer_differ_by_one_at_most(keep):
    problem, scores = pruning_problem(3, 26, keep), normal(26, seed=2).abs()
    kept, parts = select_best(problem, scores, "row"), rows_of(scores)
    first, second, third = rows_of(kept)
    assert int(kept.sum()) == keep and int(first.sum()) - int(second.sum()) in (0, 1)
    assert [int(first.sum() + second.sum()), int(third.sum())] == share_out(keep, [12, 14])
    for row, score in zip((first, second, third), parts, strict=True):
        assert set(row.nonzero().flatten().tolist()) == set(score.topk(int(row.sum())).indices.tolist())


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_weights_that_are_zero_go_before_any_other(scope):
    problem = pruning_problem(3, 26, 13)
    reference = problem.reference.clone()
    reference[::3] = 0
    kept = select_best(replace(problem, reference=reference), torch.zeros(26), scope)
    assert int(kept.sum()) == 13 and not bool(kept[::3].any())


def test_magnitude_by_layer():
    problem = pruning_problem(3, 26, 11)
    problem = replace(problem, reference=problem.reference * torch.where(torch.arange(26) < 12, 0.1, 1.0))
    solution = Magnitude(scope="layer").solve(problem, generator())
    assert torch.equal(solution.kept, select_best(problem, problem.reference.abs(), "layer"))
    assert torch.equal(solution.weights, problem.reference * solution.kept)
    assert not torch.equal(solution.kept, Magnitude().solve(problem, generator()).kept)


def test_a_problem_without_layers_is_one():
    problem = replace(pruning_problem(3, 26, 11), selection=None)
    scores = normal(26, seed=2).abs()
    assert [layer.place for layer in problem.layers()] == [slice(0, 26)]
    assert torch.equal(select_best(problem, scores, "layer"), select_best(problem, scores))
    assert torch.equal(select_best(problem, scores, "row"), select_best(problem, scores))
