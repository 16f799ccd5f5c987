"""What two looks tell: against the truth, which they do not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swap_prune.fisher.defence import looks
from swap_prune.fisher.defence.looks import choose_average, choose_treatment, noise_between
from swap_prune.fisher.defence.treatment import AS_THEY_ARE, Average, Treatment
from tests.cases import generator, normal

SHAPE = (12, 30)


def outer_products(n: int, rank: int, seed: int = 1) -> Tensor:
    """Return rows that are matrices of a rank, (n, a b)."""
    return (normal(n, SHAPE[0], rank, seed=seed) @ normal(n, rank, SHAPE[1], seed=seed + 1)).reshape(n, -1)


def even(rows: Tensor, seed: int) -> Tensor:
    """Return noise on all entries, half as large as the rows."""
    return 0.5 * rows.std() * normal(*rows.shape, seed=seed)


def spikes(rows: Tensor, seed: int) -> Tensor:
    """Return noise on a tenth of the entries, ten times as large as the rows."""
    hit = torch.rand(rows.shape, generator=generator(seed)) < 0.1
    return hit * 10 * rows.std() * normal(*rows.shape, seed=seed + 1)


def plainly(average: Average) -> Average:
    """Return an average without its scale."""
    return replace(average, scale=1.0)


def nothing(rows: Tensor, seed: int) -> Tensor:
    return torch.zeros_like(rows)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_share_of_noise_in_two_looks(size: float) -> None:
    """As much noise as signal in each: their difference has half of the energy of both together."""
    rows = normal(9, 5000, seed=1)
    first, second = ((rows + normal(9, 5000, seed=seed)) * size for seed in (2, 3))
    assert noise_between(first.float(), second.float()) == pytest.approx(0.5, abs=0.05)
    assert noise_between(first, first) == 0 == noise_between(torch.zeros(2, 3), torch.zeros(2, 3))
    few = first.clone()
    few[:4] = 1e3 * size
    assert noise_between(few, first) == 0, "rows that were overwritten, four of nine, are no noise in all of them"
    few[4] = 1e3 * size
    assert noise_between(few, first) > 0.5


@pytest.mark.parametrize(
    ("rank", "noise", "expected"),
    [
        (1, nothing, AS_THEY_ARE),
        (12, nothing, AS_THEY_ARE),
        (1, even, Treatment(rank=1)),
        (3, even, Treatment(rank=3)),
        (1, spikes, Treatment(winsorised=True, rank=1)),
    ],
)
def test_the_treatment_is_that_of_the_kind_of_noise(
    rank: int, noise: Callable[..., Tensor], expected: Treatment
) -> None:
    rows = outer_products(16, rank)
    assert choose_treatment(rows + noise(rows, 5), rows + noise(rows, 7), SHAPE) == expected


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("noise", [even, spikes])
@pytest.mark.parametrize("size", [1e-25, 1.0])
def test_no_other_treatment_is_much_nearer_to_the_truth(rank: int, noise: Callable[..., Tensor], size: float) -> None:
    rows = outer_products(16, rank)
    first, second = (((rows + noise(rows, seed)) * size).float() for seed in (5, 7))
    chosen = choose_treatment(first, second, SHAPE)

    def away(treatment: Treatment) -> float:
        return float((treatment.of(first, SHAPE) / size - rows).square().sum())

    others = [AS_THEY_ARE, *(Treatment(limited, rank) for limited in (False, True) for rank in range(1, 12))]
    assert away(chosen) <= 1.1 * min(map(away, others))
    assert away(chosen) < away(AS_THEY_ARE)


def test_a_treatment_has_to_help_most_rows_and_rows_that_were_overwritten_count_as_one_each() -> None:
    rows = outer_products(16, 1)
    first, second = rows + even(rows, 5), rows + even(rows, 7)
    first[:3] = 1e6 * normal(3, 360, seed=9)
    assert choose_treatment(first, second, SHAPE) == Treatment(rank=1)
    mixed = outer_products(16, 12)
    mixed[:11] = rows[:11]  # five of sixteen rows lose by any rank
    clean = mixed.clone()
    clean[:11] += even(rows[:11], 5)
    other = mixed.clone()
    other[:11] += even(rows[:11], 7)
    assert choose_treatment(clean, other, SHAPE).rank is None


def test_a_vector_has_no_rank() -> None:
    rows = normal(16, 40, seed=1)
    chosen = choose_treatment(rows + even(rows, 5), rows + even(rows, 7), (1, 40))
    assert chosen.rank is None


@pytest.mark.parametrize("rank", [1, 12])
@pytest.mark.parametrize("noise", [even, spikes])
def test_slopes_are_averaged_by_what_is_best_aligned_with_the_truth(rank: int, noise: Callable[..., Tensor]) -> None:
    """The truth is the mean of honest rows; the second look is as noisy as the first."""
    rows = outer_products(40, rank) + 0.3 * outer_products(1, rank, seed=11)
    first, again, truth = rows + noise(rows, 5), (rows + noise(rows, 7)).mean(0), rows.mean(0)
    average, found = choose_average(first, again, SHAPE)
    torch.testing.assert_close(found, average.of(first, SHAPE))
    torch.testing.assert_close(choose_average(first * 1e-30, again * 1e-30, SHAPE)[1] * 1e30, found)

    def alignment(one: Average) -> float:
        return float(torch.cosine_similarity(one.of(first, SHAPE), truth, dim=0))

    best = max(map(alignment, looks._AVERAGES))
    assert alignment(average) > 0.97 * best
    assert noise is even or alignment(average) > 1.05 * alignment(Average())


def test_honest_gradients_are_averaged_as_they_are() -> None:
    rows = outer_products(40, 3)
    average, found = choose_average(rows, rows.mean(0), SHAPE)
    assert plainly(average) == Average() and average.scale == pytest.approx(1)
    torch.testing.assert_close(found, rows.mean(0))


def test_smaller_means_are_not_better_ones() -> None:
    """By distance, what shrinks a mean that is mostly noise would win; noise that all rows share stays in all."""
    truth, skewed = normal(360, seed=1), normal(40, 360, seed=2).exp() - 1.6
    rows = truth + skewed + 3 * normal(360, seed=3)
    again = (truth + skewed + 3 * normal(360, seed=4)).mean(0)
    assert plainly(choose_average(rows, again, SHAPE)[0]) == Average()


def test_a_second_look_of_zeros_tells_nothing() -> None:
    rows = normal(8, 360, seed=1)
    average, found = choose_average(rows, torch.zeros(360, dtype=torch.float64), SHAPE)
    assert plainly(average) == Average() and not found.any()


def test_a_mean_is_scaled_to_come_nearest_to_the_second_look() -> None:
    """Where as much of it is noise as signal, by a half."""
    truth = normal(360, seed=1)
    rows, again = ((truth + normal(360, seed=seed)).expand(3, 360) for seed in (2, 3))
    average, found = choose_average(rows, again.mean(0), SHAPE)
    assert average.scale == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(found, average.scale * rows[0])
    torch.testing.assert_close(average.of(rows, SHAPE), found)
    assert choose_average(rows, -rows[0], SHAPE)[0].scale == 0, "what points the other way is noise"


def test_what_is_said_of_treatments_and_averages() -> None:
    assert [str(Treatment()), str(Treatment(True)), str(Treatment(True, 2))] == [
        "as they are",
        "winsorised",
        "winsorised, rank 2",
    ]
    assert [str(Average()), str(Average(Treatment(rank=1))), str(Average(kind="median of means"))] == [
        "mean",
        "mean, rank 1",
        "median of means",
    ]


@pytest.mark.parametrize("kind", ["mean", "trimmed mean", "median of means"])
def test_an_average_is_that_of_treated_rows_whatever_the_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = outer_products(70, 3) + spikes(outer_products(70, 3), 4)
    average = Average(Treatment(True, 2), kind)  # type: ignore[arg-type]
    whole = average.of(rows, SHAPE)
    plain = Average(kind=kind).of(average.treatment.of(rows, SHAPE), SHAPE)  # type: ignore[arg-type]
    torch.testing.assert_close(whole, plain)
    monkeypatch.setattr("swap_prune.fisher.defence.treatment._CHUNK_BYTES", 100_000)
    torch.testing.assert_close(average.of(rows, SHAPE), whole)
