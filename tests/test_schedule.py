"""Sparsity over the stages, and the number of weights kept."""

import itertools
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swap_prune.schedule import SCHEDULES, keep_count, share_out, sparsity_schedule

ALL = pytest.mark.parametrize("schedule", SCHEDULES)


@ALL
@pytest.mark.parametrize("target", [0.0, 0.3, 0.9, 0.98, 0.999999])
@pytest.mark.parametrize("stages", [1, 2, 7, 100])
def test_rises_to_exactly_the_target(schedule, target, stages):
    steps = sparsity_schedule(target, stages, schedule)
    assert len(steps) == stages and steps[-1] == target
    assert list(steps) == sorted(steps) and steps[0] >= 0
    if target > 0:
        assert steps[0] > 0, "no stage is spent at sparsity zero"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(target=st.floats(0, 1, exclude_max=True), stages=st.integers(1, 60), schedule=st.sampled_from(sorted(SCHEDULES)))
def test_is_monotone_and_in_range_for_any_target(target, stages, schedule):
    steps = sparsity_schedule(target, stages, schedule)
    assert len(steps) == stages and steps[-1] == target
    assert all(0 <= a <= b < 1 for a, b in pairwise(steps))


def test_values_by_hand():
    assert sparsity_schedule(0.7, 3, "exponential") == pytest.approx((0.4, 0.6, 0.7))  # 4/7, 6/7, 7/7
    assert sparsity_schedule(0.8, 2, "cubic") == pytest.approx((0.7, 0.8))  # 1 - 1/8
    assert sparsity_schedule(0.9, 3, "linear") == pytest.approx((0.3, 0.6, 0.9))
    assert sparsity_schedule(0.75, 2, "geometric") == pytest.approx((0.5, 0.75))  # half of the rest each time
    assert sparsity_schedule(0.9, 3, "constant") == (0.9, 0.9, 0.9)


def test_default_is_exponential():
    assert sparsity_schedule(0.9, 5) == sparsity_schedule(0.9, 5, "exponential")


@pytest.mark.parametrize(
    ("target", "stages", "schedule", "message"),
    [
        (1.0, 1, "cubic", "sparsity"),
        (-0.1, 1, "cubic", "sparsity"),
        (80, 1, "cubic", r"got 80 \(80 % is 0.8\)"),
        (math.nan, 1, "cubic", "sparsity"),
        ("0.9", 1, "cubic", "sparsity"),
        (0.9, 0, "cubic", "stages"),
        (0.9, 1.5, "cubic", "stages"),
        (0.9, True, "cubic", "stages"),
        (0.9, 1, "quartic", "schedule .*'quartic'"),
    ],
)
def test_bad_arguments(target, stages, schedule, message):
    with pytest.raises(ValueError, match=message):
        sparsity_schedule(target, stages, schedule)


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"), [(10, 0.5, 5), (7, 0.5, 3), (3, 0.9, 0), (8, 0.0, 8), (1, 0, 1)]
)
def test_keep_count(total, sparsity, kept):
    assert keep_count(total, sparsity) == kept


@settings(max_examples=200, deadline=None, derandomize=True)
@given(total=st.integers(1, 10**8), sparsity=st.floats(0, 1, exclude_max=True))
def test_zeros_are_those_of_the_public_formula(total, sparsity):
    kept = keep_count(total, sparsity)
    assert total - kept == total - math.floor(total * (1 - sparsity))
    assert 0 <= kept <= total


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan])
def test_keep_count_of_an_impossible_sparsity(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        keep_count(10, sparsity)


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes=SIZES, share=st.floats(0, 1))
def test_shares_add_up_fit_and_never_grow_as_less_is_kept(sizes, share):
    total = sum(sizes)
    keep = round(share * total)
    shares = share_out(keep, sizes)
    assert sum(shares) == keep and all(0 <= got <= size for got, size in zip(shares, sizes, strict=True))
    for got, size in zip(shares, sizes, strict=True):
        assert abs(got - keep * size / total) < len(sizes)
    if keep > 0:
        assert all(less <= got for less, got in zip(share_out(keep - 1, sizes), shares, strict=True))
    assert share_out(total, sizes) == sizes and not any(share_out(0, sizes))


@pytest.mark.parametrize("sizes", [(10, 20, 30), (7, 5, 1), (4, 4, 4), (1, 9, 3)])
def test_shares_change_the_proportions_least(sizes):
    """Webster's rule minimises ``sum (share - quota)^2 / size`` (Sainte-Lague, 1910)."""
    for keep in range(sum(sizes) + 1):

        def unfairness(shares, keep=keep):
            return sum((got - keep * size / sum(sizes)) ** 2 / size for got, size in zip(shares, sizes, strict=True))

        every = [s for s in itertools.product(*(range(size + 1) for size in sizes)) if sum(s) == keep]
        assert unfairness(share_out(keep, sizes)) == pytest.approx(min(map(unfairness, every)))


def test_equal_parts_differ_by_one_the_first_ones_ahead():
    assert share_out(11, [4, 4, 4, 4]) == [3, 3, 3, 2]
    assert share_out(0, []) == []


@pytest.mark.parametrize("keep", [-1, 8])
def test_more_than_there_is_cannot_be_shared_out(keep):
    with pytest.raises(ValueError, match="keep"):
        share_out(keep, [3, 4])


@pytest.mark.parametrize("seed", range(20))
def test_shares_follow_the_rule_unit_by_unit(seed):
    """The one unit too many or too few goes where it changes the proportions least, the first part at a tie."""
    state = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 6, (12,), generator=state).tolist()
    for keep in range(sum(sizes) + 1):
        total = sum(sizes)
        shares = [(2 * keep * size + total) // (2 * total) if total else 0 for size in sizes]
        while sum(shares) < keep:
            shares[max(range(12), key=lambda i: (Fraction(sizes[i], 2 * shares[i] + 1), -i))] += 1
        while sum(shares) > keep:
            kept = [i for i in range(12) if shares[i]]
            shares[min(kept, key=lambda i: (Fraction(sizes[i], 2 * shares[i] - 1), -i))] -= 1
        assert share_out(keep, sizes) == shares


def test_a_great_many_parts_are_shared_out_at_once():
    assert sum(share_out(470_001, [100] * 10_000)) == 470_001


def test_sparsities_of_half_precision_are_numbers_like_others():
    """NumPy's own products in it end at 65504, and are coarse."""
    for dtype in (np.float16, np.float32):
        sparsity = dtype(0.9)
        assert keep_count(40_000_000, sparsity) == keep_count(40_000_000, float(sparsity))
