"""Rows that stand out are scaled down to the others, and only these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swap_prune.fisher.defence.outliers import clip_rows_
from swap_prune.fisher.factor import DenseFactor


def rows(n: int = 40, p: int = 200) -> Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(0))


def test_rows_that_were_scaled_get_the_median_norm_and_their_own_direction() -> None:
    honest = rows()
    poisoned = honest.clone()
    poisoned[[3, 17, 25, 39]] *= 100
    factor = DenseFactor(poisoned.clone())
    assert clip_rows_(factor) == pytest.approx(0.1)
    median = poisoned.norm(dim=1).quantile(0.5)
    for i in range(40):
        if i in (3, 17, 25, 39):
            assert torch.allclose(factor.matrix[i], honest[i] * median / honest[i].norm(), rtol=1e-4)
        else:
            assert torch.equal(factor.matrix[i], honest[i])


@pytest.mark.parametrize("unit", [1e-30, 1e-22, 1e-18, 1e18])
def test_rows_stand_out_in_any_unit(unit: float) -> None:
    matrix = rows()
    matrix[7] *= 1000
    assert clip_rows_(DenseFactor(matrix * unit)) == pytest.approx(1 / 40)


def test_rows_of_the_sizes_that_are_expected_do_not_stand_out() -> None:
    sizes = torch.ones(40)
    sizes[:3] = 50
    factor = DenseFactor(rows() * sizes.unsqueeze(1))
    before = factor.matrix.clone()
    assert clip_rows_(factor, sizes) == 0
    assert torch.equal(factor.matrix, before)
    assert clip_rows_(factor) == pytest.approx(3 / 40)


def test_a_wide_spread_sets_a_wide_limit() -> None:
    factor = DenseFactor(rows() * torch.logspace(-3, 3, 40).unsqueeze(1))
    assert clip_rows_(factor) == 0


@pytest.mark.parametrize("scale", [4.0, 0.001, 0.0])
def test_a_little_larger_or_smaller_is_not_touched(scale: float) -> None:
    matrix = rows()
    matrix[5] *= scale
    before = matrix.clone()
    assert clip_rows_(DenseFactor(matrix)) == 0 and torch.equal(matrix, before)


def test_of_few_rows_the_upper_quartile_cannot_tell() -> None:
    for count, seen in ((1, 0.0), (3, 0.0), (4, 0.0), (5, 0.2)):
        rows = torch.ones(count, 1)
        rows[-1:] = 900.0
        assert clip_rows_(DenseFactor(rows)) == seen
    assert clip_rows_(DenseFactor(torch.zeros(5, 2))) == 0


def test_beyond_a_gap_rows_stand_out_where_sizes_are_known_however_wide_the_spread_and_many_they_are() -> None:
    sizes, spread = torch.logspace(-3, 3, 40), torch.logspace(-0.6, 0.6, 40).roll(11)
    honest = rows() * (sizes * spread).unsqueeze(1)
    poisoned = honest.clone()
    poisoned[::4] *= 100
    for matrix, share in ((honest, 0.0), (poisoned, 0.25)):
        assert clip_rows_(DenseFactor(matrix.clone()), sizes) == share
        assert clip_rows_(DenseFactor(matrix.clone()), sizes, gaps=False) == 0
        assert clip_rows_(DenseFactor(matrix / sizes.unsqueeze(1))) == 0
    matrix = poisoned.clone()
    clip_rows_(DenseFactor(matrix), sizes)
    assert float((matrix.norm(dim=1) / sizes).max()) < 5 * float((honest.norm(dim=1) / sizes).median())
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[::4] = False
    assert torch.equal(matrix[untouched], honest[untouched])


def test_a_gap_among_a_few_rows_says_nothing() -> None:
    spread = torch.tensor([0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 11.0, 12.0])
    for count, seen in ((7, 0.0), (8, 2 / 8)):
        matrix = torch.nn.functional.normalize(rows(count)) * spread[-count:].unsqueeze(1)
        assert clip_rows_(DenseFactor(matrix), torch.ones(count)) == pytest.approx(seen)


def test_rows_of_two_kinds_do_not_stand_out() -> None:
    """As of a layer that is one branch of many: a good third of the rows beyond the gap is the most."""
    matrix = rows(60)
    for count, seen in ((22, 0.0), (21, 0.35)):
        two = matrix.clone()
        two[:count] *= 100
        assert clip_rows_(DenseFactor(two), torch.ones(60)) == pytest.approx(seen)
