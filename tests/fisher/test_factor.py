"""The Fisher factor's products against dense algebra."""

import pytest
import torch

from swap_prune.fisher import factor as module
from swap_prune.fisher.factor import DenseFactor
from tests.cases import normal

SHAPES = pytest.mark.parametrize(("n", "p"), [(7, 20), (20, 7), (1, 5), (5, 1)])


def matrix(n, p, dtype=torch.float64):
    return normal(n, p, seed=n + p, dtype=dtype)


@SHAPES
def test_products(n, p):
    G = matrix(n, p)
    factor = DenseFactor(G)
    w, v = normal(p, seed=1), normal(n, seed=2)
    assert factor.shape == (n, p)
    torch.testing.assert_close(factor.matvec(w), G @ w)
    torch.testing.assert_close(factor.rmatvec(v), G.T @ v)
    torch.testing.assert_close(factor.diagonal(), torch.diag(G.T @ G) / n)
    assert float(v @ factor.matvec(w)) == pytest.approx(float(w @ factor.rmatvec(v)))


def test_columns_and_rows_in_the_order_asked_for():
    G = matrix(6, 9)
    factor = DenseFactor(G)
    index = torch.tensor([4, 0, 5, 4])
    assert torch.equal(factor.columns(index), G[:, index])
    assert factor.columns(torch.tensor([], dtype=torch.long)).shape == (6, 0)
    assert torch.equal(factor.rows(index).matvec(torch.eye(9, dtype=torch.float64)[2]), G[index, 2])


@SHAPES
@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("block", [1, 100, 2**28])
def test_gram(n, p, part, block, monkeypatch):
    """A sparse and a dense scale, in one block and in many."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    G = matrix(n, p)
    scale = normal(p, seed=3).abs() + 0.1
    scale[torch.rand(p, generator=torch.Generator().manual_seed(4)) >= part] = 0
    torch.testing.assert_close(DenseFactor(G).gram(scale), G @ torch.diag(scale) @ G.T)


def test_columns_of_scale_zero_are_not_read():
    G = matrix(5, 12)
    scale = torch.zeros(12, dtype=torch.float64)
    scale[[1, 4, 8]] = 2.0
    expected = G @ torch.diag(scale) @ G.T
    G[:, 0] = torch.nan
    torch.testing.assert_close(DenseFactor(G).gram(scale), expected)


def test_dtype_follows_the_matrix():
    factor = DenseFactor(matrix(4, 6, torch.float32))
    results = [
        factor.matvec(torch.ones(6)),
        factor.rmatvec(torch.ones(4)),
        factor.diagonal(),
        factor.gram(torch.ones(6)),
        factor.columns(torch.arange(2)),
    ]
    assert {result.dtype for result in results} == {torch.float32}


def test_the_matrix_is_left_alone():
    G = matrix(4, 6)
    before = G.clone()
    factor = DenseFactor(G)
    factor.matvec(torch.ones(6).double()), factor.diagonal(), factor.gram(torch.ones(6).double())
    factor.columns(torch.arange(3)).zero_()
    assert torch.equal(G, before)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 2, 2)])
def test_a_matrix_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        DenseFactor(torch.zeros(shape))
