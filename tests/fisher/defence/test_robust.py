"""Robust statistics: known answers, and rows that nobody wrote to."""

from __future__ import annotations

import pytest
import torch

from swap_prune.fisher.defence.robust import column_scales, median_of_means, middle_mean, winsorised
from tests.cases import normal


def test_the_middle_mean_leaves_out_what_hits_fewer_than_three_eighths_of_the_rows_at_either_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = normal(40, seed=7)
    rows = true.repeat(16, 1)
    for row, sign in ((0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, -1), (7, -1), (8, -1), (9, -1)):
        rows[row] += sign * 1e6 * normal(40, seed=8 + row).abs()
    torch.testing.assert_close(middle_mean(rows), true)
    assert (middle_mean(torch.cat([rows, rows[:2]])) > true + 1e3).any(), "eight of eighteen are too many"
    honest = normal(1000, 30, seed=9)
    middle = middle_mean(honest)
    assert (middle - honest.mean(0)).abs().max() < 4 / 1000**0.5, "of honest rows it is about the mean"
    assert torch.equal(middle_mean(rows[:1]), rows[0])
    whole = middle_mean(rows)
    monkeypatch.setattr("swap_prune.fisher.defence.robust._SORTED", 100)
    assert torch.equal(middle_mean(rows), whole), "six columns at a time, and four at the end"


def test_the_median_of_means_leaves_out_what_hits_fewer_than_half_of_the_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 rows make 16 groups of four: rows i, i + 16, i + 32, i + 48."""
    true = normal(40, seed=7)
    rows = true.repeat(64, 1)
    for row in range(7):
        rows[row + 16 * (row % 4)] += 1e6
    torch.testing.assert_close(median_of_means(rows), true)
    rows[[7, 8]] += 1e6
    assert (median_of_means(rows) > true + 1e3).all(), "nine of sixteen groups are too many"
    honest = normal(1000, 30, seed=9)
    assert (median_of_means(honest) - honest.mean(0)).abs().max() < 4 / 1000**0.5
    few = normal(5, 30, seed=10)
    torch.testing.assert_close(median_of_means(few), few.median(0).values)
    whole = median_of_means(honest)
    monkeypatch.setattr("swap_prune.fisher.defence.robust._SORTED", 100)
    assert torch.equal(median_of_means(honest), whole)


def test_the_scale_of_a_column_is_the_median_size_beside_that_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, scales = normal(41, 1, seed=1).exp(), normal(1, 30, seed=2).exp()
    signs = normal(41, 30, seed=3).sign()
    expected = (scales / scales.mean()).squeeze(0)
    torch.testing.assert_close(column_scales(sizes * scales * signs), expected)
    spoilt = sizes * scales * signs
    spoilt[:, 4] = 0
    spoilt[:15, 4] = 1e3
    assert float(column_scales(spoilt)[4]) == 0, "fifteen of 41 entries are no typical ones"
    zero = torch.cat([torch.zeros(1, 30, dtype=torch.float64), sizes * scales * signs])
    assert bool(column_scales(zero).isfinite().all())
    whole = column_scales(normal(41, 30, seed=5))
    monkeypatch.setattr("swap_prune.fisher.defence.robust._SORTED", 100)
    assert torch.equal(column_scales(normal(41, 30, seed=5)), whole)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_entries_that_stand_out_are_brought_back_and_others_stay(size: float) -> None:
    rows = (normal(50, 40, seed=1).sign() * (1 + normal(50, 40, seed=2).abs())).float()
    spoilt = rows.clone()
    spoilt[3, 7] = 500.0
    limits = 4.5 * spoilt.abs().mean(1, keepdim=True) * column_scales(spoilt)
    found = winsorised(spoilt * size, column_scales(spoilt * size)) / size
    torch.testing.assert_close(found[3, 7], limits[3, 7])
    found[3, 7] = spoilt[3, 7]
    torch.testing.assert_close(found, spoilt)
