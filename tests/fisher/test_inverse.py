"""The inverse of the damped Fisher against the dense inverse."""

import mpmath
import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.inverse import BlockFisher, DampedFisher
from tests.cases import AWKWARD, normal, pruning_problem
from tests.reference import damped_fisher


@pytest.mark.parametrize(("n", "p"), [(5, 20), (20, 5), (12, 12), (1, 6)])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_is_the_dense_inverse(n, p, damping):
    G, v = normal(n, p), normal(p, seed=1)
    inverse = torch.linalg.inv(damped_fisher(G, damping))
    fisher = DampedFisher.of(G, damping)
    torch.testing.assert_close(fisher.diagonal(), inverse.diagonal(), rtol=1e-9, atol=0)
    torch.testing.assert_close(fisher.solve(v), inverse @ v, rtol=1e-8, atol=1e-10)


def test_blocks_are_inverted_one_by_one():
    G, v = normal(6, 11), normal(11, seed=1)
    members = torch.arange(11).split(4)
    F = damped_fisher(G, 0.1)
    masked = torch.block_diag(*(F[part][:, part] for part in members))
    fisher = BlockFisher(DenseFactor(G), 0.1, members)
    torch.testing.assert_close(fisher.diagonal(), torch.linalg.inv(masked).diagonal())
    torch.testing.assert_close(fisher.solve(v), torch.linalg.solve(masked, v))


def exactly(G, damping):
    """The inverse in sixty digits."""
    with mpmath.workdps(60):
        M = mpmath.matrix(G.tolist())
        F = M.T * M / len(G) + mpmath.mpf(damping) * mpmath.eye(G.shape[1])
        return torch.tensor([[float(x) for x in row] for row in (F**-1).tolist()], dtype=torch.float64)


@pytest.mark.parametrize(("n", "p"), [(30, 8), (6, 10)])
@pytest.mark.parametrize("loud", [1.0, 1e4, 1e7])
@pytest.mark.parametrize("damping", [1e-5, 1e-9])
def test_little_damping_and_loud_rows_leave_it_all_its_digits(n, p, loud, damping):
    G, v = normal(n, p), normal(p, seed=1)
    G[3] *= loud
    expected = exactly(G, damping)
    fisher = DampedFisher.of(G, damping)
    torch.testing.assert_close(fisher.diagonal(), expected.diagonal(), rtol=1e-9, atol=0)
    solved = expected @ v
    torch.testing.assert_close(fisher.solve(v), solved, rtol=0, atol=1e-6 * float(solved.abs().max()))


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize(("n", "p"), [(30, 12), (9, 30)])
def test_the_diagonal_with_little_damping_is_that_of_the_singular_values(kind, n, p):
    G, damping = pruning_problem(n, p, 1, kind=kind).factor.matrix.double(), 1e-9
    _, values, vectors = torch.linalg.svd(G)
    curvature = torch.zeros(p, dtype=torch.float64)
    curvature[: len(values)] = values.square() / n
    expected = (vectors.square() / (curvature + damping).unsqueeze(1)).sum(0)
    torch.testing.assert_close(DampedFisher.of(G, damping).diagonal(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("n", "p"), [(30, 12), (9, 30)])
def test_cancellation_stays_within_what_an_inverse_can_be(n, p):
    """The damping is lost in the rounding of gradients as large as these, of which some rows are equal."""
    G = normal(n, p) * 1e8
    if n < p:
        G[5:] = G[:4].clone()
    diagonal = DampedFisher.of(G, 1e-9).diagonal()
    assert bool(diagonal.isfinite().all()) and bool((diagonal <= 1.001 / 1e-9).all())
    assert bool((diagonal >= 0.999 / (G.square().mean(0) + 1e-9)).all())
