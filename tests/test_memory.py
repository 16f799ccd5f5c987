"""The memory budget: what is read, what is refused, and whether the remedy fits."""

from __future__ import annotations

import re

import pytest

from swap_prune.memory import check_memory, parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5 gb", 1_500_000_000), (1024, 1024), ("2048", 2048), ("7B", 7)],
)
def test_amounts(text: str | int, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4QB", "0", "1e9", True, "4GB please"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="memory must be"):
        parse_memory(text)


@pytest.mark.parametrize(("p", "budget"), [(32_360, "2GB"), (2_600_000, "4GB"), (100, "1GB")])
def test_the_number_of_samples_that_is_offered_fits_and_one_more_does_not(p: int, budget: str) -> None:
    with pytest.raises(ValueError, match="use samples=") as caught:
        check_memory(budget, 10**7, p)
    fits = int(re.search(r"samples=(\d+)", str(caught.value))[1])
    check_memory(budget, fits, p)
    with pytest.raises(ValueError, match="memory allows"):
        check_memory(budget, fits + 1, p)


def test_double_precision_needs_twice_as_much() -> None:
    check_memory("3GB", 200, 2_600_000)
    with pytest.raises(ValueError, match="need about"):
        check_memory("3GB", 200, 2_600_000, itemsize=8)
