"""Rows of low rank: against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from swap_prune.fisher.defence.rank import energies, leading_singular_triples, low_rank_rows
from tests.cases import normal


def falling(shape: tuple[int, int], seed: int = 3) -> torch.Tensor:
    """Return eight matrices of a shape whose singular values are 3, 2, and 0.5 for the others."""
    u, _, v = torch.linalg.svd(normal(8, *shape, seed=seed), full_matrices=False)
    return (u * torch.tensor([3.0, 2.0, *[0.5] * 4], dtype=torch.float64)[: min(shape)]) @ v


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 7)])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_best_matrix_of_a_rank(shape: tuple[int, int], rank: int) -> None:
    u, _, v = torch.linalg.svd(normal(8, *shape, seed=3), full_matrices=False)
    values = torch.tensor([3.0, 2.0, *[0.5] * 4], dtype=torch.float64)[: min(shape)]
    values = values if rank == 2 else values.index_fill(0, torch.tensor(1), 0.5)
    rows = (u * values) @ v
    expected = (u[..., :rank] * values[:rank]) @ v[:, :rank]
    torch.testing.assert_close(low_rank_rows(rows, rank), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_rows_of_any_size_are_cut_to_a_rank(size: float) -> None:
    rows = normal(5, 30, 40).float()
    expected = low_rank_rows(rows, 2)
    torch.testing.assert_close(low_rank_rows(rows * size, 2) / size, expected, rtol=1e-4, atol=1e-5)


def test_outer_products_and_zeros_stay_as_they_are() -> None:
    rows = normal(7, 5, 1, seed=4) * normal(7, 1, 8, seed=5)
    rows[3] = 0
    torch.testing.assert_close(low_rank_rows(rows, 1), rows)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_leading_singular_triples(shape: tuple[int, int]) -> None:
    rows = falling(shape)
    u, s, v = leading_singular_triples(rows, 2)
    assert u.shape == (8, shape[0], 2) and v.shape == (8, shape[1], 2)
    torch.testing.assert_close(s, torch.tensor([3.0, 2.0], dtype=torch.float64).expand(8, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close((u * s[:, None]) @ v.transpose(1, 2), low_rank_rows(rows, 2))
    tiny = leading_singular_triples((rows * 1e-30).float(), 2)
    torch.testing.assert_close(tiny[1] * 1e30, s.float(), rtol=1e-4, atol=0)


def test_energy_and_what_is_beyond_rank_one() -> None:
    whole, beyond = energies(falling((4, 7)))
    assert whole == pytest.approx(8 * (9 + 4 + 2 * 0.25)) and beyond == pytest.approx(8 * (4 + 2 * 0.25), rel=1e-3)
    assert energies(torch.zeros(3, 4, 5)) == (0.0, 0.0)
