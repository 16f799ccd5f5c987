"""SparseGPT against one row and one exact inverse at a time."""

import pytest
import torch

from swap_prune.methods import SparseGPT
from swap_prune.methods.sparsegpt import damped, prune_columns
from swap_prune.schedule import share_out
from tests.cases import generator, normal, pruning_problem


def layer(groups, rows, d, seed=0):
    X = normal(groups, 2 * d, d, seed=seed)
    return normal(groups, rows, d, seed=seed + 1), damped(X.mT @ X / (2 * d), 0.01)


def surgeon_by_columns(W, H, kept):
    """Walk each row from left to right; compensate a removed weight on those to its right, by an exact inverse."""
    W = W.clone()
    groups, rows, d = W.shape
    for g in range(groups):
        for i in range(rows):
            for j in range(d):
                if not kept[g, i, j]:
                    inverse = torch.linalg.inv(H[g, j:, j:])
                    W[g, i, j:] -= W[g, i, j] / inverse[0, 0] * inverse[0]
    return W.masked_fill(~kept, 0)


@pytest.mark.parametrize("block", [1, 4, 5, 12, 128])
@pytest.mark.parametrize(("groups", "rows"), [(1, 5), (3, 2)])
def test_the_update_is_the_surgeons_of_every_row(groups, rows, block):
    W, H = layer(groups, rows, 12)
    new, kept = prune_columns(W, H, groups * rows * 5, block)
    assert int(kept.sum()) == groups * rows * 5
    torch.testing.assert_close(new, surgeon_by_columns(W, H, kept), rtol=1e-8, atol=1e-8)


def test_one_block_removes_what_costs_least_given_that_the_left_is_fixed():
    """``w^2 / [H_{j:}^-1]_jj`` is twice the least error of removing w_j with the columns before it fixed."""
    W, H = layer(1, 4, 9)
    _, kept = prune_columns(W, H, 20, 128)
    costs = torch.stack([W[0, :, j].square() / torch.linalg.inv(H[0, j:, j:])[0, 0] for j in range(9)], 1)
    assert set(kept[0].flatten().nonzero().flatten().tolist()) == set(costs.flatten().topk(20).indices.tolist())


def test_each_block_keeps_its_share():
    W, H = layer(2, 3, 10)
    _, kept = prune_columns(W, H, 25, 4)
    assert [int(kept[:, :, start : start + 4].sum()) for start in (0, 4, 8)] == share_out(25, [24, 24, 12])


def test_the_update_lowers_the_output_error():
    """By more than half where inputs go together."""
    X = normal(60, 5) @ normal(5, 30, seed=1) + 0.2 * normal(60, 30, seed=2)
    W, H = normal(1, 6, 30, seed=3), damped((X.T @ X / 60)[None], 0.01)
    new, kept = prune_columns(W, H, 60, 8)

    def error(other):
        return float(torch.einsum("grd,gde,gre->", other - W, H, other - W))

    assert error(new) < 0.5 * error(W.masked_fill(~kept, 0))


def test_layers_keep_the_same_share_unless_they_are_compared():
    problem = pruning_problem(40, 40, 16, kind="layers of different scale")
    shares = {}
    for scope in ("layer", "global"):
        kept = SparseGPT(scope=scope).solve(problem, generator()).kept
        shares[scope] = [int(kept[:20].sum()), int(kept[20:].sum())]
    assert shares == {"layer": [8, 8], "global": [0, 16]}, "the first layer's inputs are a thousand times smaller"


def test_weights_that_are_zero_go_before_those_without_an_input():
    weights = torch.tensor([[[0.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    H = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    idle = torch.tensor([[False, False, True, True]])
    for keep in (1, 2, 3):
        assert not bool(prune_columns(weights, H, keep, 4, idle)[1][0, 0, 0])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_without_an_input_go_first(scope):
    problem = pruning_problem(40, 40, 16, kind="zero columns")
    idle = torch.cat(
        [(problem.inputs.rows[one.name] == 0).all(1).expand(one.rows, -1).flatten() for one in problem.layers()]
    )
    problem.reference[idle] = 1e3  # however large
    kept = SparseGPT(scope=scope).solve(problem, generator()).kept
    assert 10 < int(idle.sum()) < 24 and int(kept.sum()) == 16 and not bool((kept & idle).any())


def test_inputs_of_zero_leave_magnitude():
    W = normal(1, 2, 6)
    new, kept = prune_columns(W, damped(torch.zeros(1, 6, 6), 0.01), 5, 128)
    assert torch.equal(new, W.masked_fill(~kept, 0))
    assert set(kept.flatten().nonzero().flatten().tolist()) == set(W.abs().flatten().topk(5).indices.tolist())


def test_the_damping_is_a_share_of_the_mean_of_the_diagonal_and_one_where_that_is_zero():
    H = torch.diag_embed(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    expected = torch.diag_embed(torch.tensor([[1.2, 3.2], [1.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(damped(H, 0.1), expected)
