"""The k largest scores: against a stable sort, with ties, of every size, dtype and sign."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from swap_prune.regression import top_k as module
from swap_prune.regression.top_k import top_k


def sorted_out(scores: torch.Tensor, keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:keep])


@pytest.fixture(params=[2**18, 0], ids=["selected", "searched"])
def searched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", request.param)
    monkeypatch.setattr(module, "_CHUNK", 37)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-30, 0.7, 1e30])
def test_it_is_what_a_stable_sort_finds(dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(203, generator=generator, dtype=torch.float64) * spread).to(dtype)
    for keep in (0, 1, 2, 50, 100, 202, 203):
        assert top_k(scores, keep).tolist() == sorted_out(scores, keep)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(
    "values", [[0.0, -0.0], [1.0], [-1.0, 2.0, 2.0], [0.0, 1e-45, 3.0], [-torch.inf, torch.inf, 0]]
)
def test_of_equal_scores_the_first_are_taken(values: list[float]) -> None:
    index = torch.randint(len(values), (150,), generator=torch.Generator().manual_seed(1))
    scores = torch.tensor(values)[index]
    for keep in (1, 40, 75, 110, 150):
        assert top_k(scores, keep).tolist() == sorted_out(scores, keep)


@pytest.mark.usefixtures("searched")
def test_what_is_no_number_counts_as_infinite_and_the_count_is_exact() -> None:
    scores = torch.tensor([1.0, float("nan"), torch.inf, -torch.inf, float("nan")])
    assert [len(top_k(scores, keep)) for keep in range(6)] == list(range(6))
    assert top_k(scores, 3).tolist() == [1, 2, 4]


def test_a_large_vector() -> None:
    scores = torch.randn(300_000, generator=torch.Generator().manual_seed(2)).square()
    found = top_k(scores, 90_000)
    assert len(found) == 90_000 and bool((found.diff() > 0).all())
    rest = torch.ones(300_000, dtype=torch.bool).index_fill(0, found, False)
    assert float(scores[found].min()) >= float(scores[rest].max())


def unlike_its_sample() -> torch.Tensor:
    scores = torch.randn(300_000, generator=torch.Generator().manual_seed(3))
    scores[:: module._STRIDE] += 100
    return scores


LARGE = {
    "random": lambda: torch.randn(300_000, generator=torch.Generator().manual_seed(2)).square(),
    "mostly zero": lambda: torch.randn(300_000, generator=torch.Generator().manual_seed(2)).sub_(1.5).relu_(),
    "layers": lambda: torch.arange(300_000).sin().abs() * torch.logspace(-20, 20, 300_000),
    "in order": lambda: torch.arange(300_000.0),
    "one value": lambda: torch.ones(300_000),
    "infinite": lambda: torch.ones(300_000).index_fill_(0, torch.arange(0, 300_000, 7), torch.inf),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("keep", [1, 15, 3_000, 30_000, 150_000, 299_990, 300_000])
def test_between_two_values_of_the_sample_lies_the_one_that_is_looked_for(kind: str, keep: int) -> None:
    scores = LARGE[kind]()
    found = top_k(scores, keep)
    assert torch.equal(found, scores.sort(descending=True, stable=True).indices[:keep].sort().values)


@pytest.mark.parametrize("keep", [4_000, 150_000, 297_000])
def test_scores_that_are_unlike_the_sample_are_all_looked_at(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    partition, sizes = np.partition, []
    monkeypatch.setattr(
        module.np, "partition", lambda values, at: (sizes.append(len(values)), partition(values, at))[1]
    )
    for scores, most in ((LARGE["random"](), 20_000), (unlike_its_sample(), 300_000)):
        sizes.clear()
        expected = scores.sort(descending=True, stable=True).indices[:keep].sort().values
        assert torch.equal(top_k(scores, keep), expected)
        sampled, left = sizes
        assert sampled == -(-300_000 // module._STRIDE) and left <= most
        assert left == 300_000 or most < 300_000


def test_layers_keep_their_share_and_the_sum_is_the_largest() -> None:
    floors = ((slice(0, 3), 1), (slice(3, 7), 2), (slice(7, 9), 0))
    for seed in range(20):
        scores = torch.randint(0, 9, (9,), generator=torch.Generator().manual_seed(seed)).double()
        for keep in range(3, 10):
            found = top_k(scores, keep, floors)
            assert len(set(found.tolist())) == keep and found.tolist() == sorted(found.tolist())
            allowed = [
                one
                for one in itertools.combinations(range(9), keep)
                if all(sum(place.start <= i < place.stop for i in one) >= least for place, least in floors)
            ]
            assert tuple(found.tolist()) in allowed
            assert float(scores[found].sum()) == max(float(scores[list(one)].sum()) for one in allowed)


@pytest.mark.usefixtures("searched")
def test_scores_that_are_infinitely_low_are_taken_once() -> None:
    scores = torch.full((60,), -torch.inf)
    scores[7] = 1.0
    found = top_k(scores, 50, ((slice(0, 20), 10), (slice(20, 60), 0)))
    assert len(set(found.tolist())) == 50 and 7 in found.tolist()


@pytest.mark.slow
def test_indices_go_beyond_what_32_bits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file with holes, of 8.6 GB that take no room, as a copy would; ties are those of lowest index there too."""
    ordered = [2.0] * 2 + [1.0] * 3 + [0.0] * 9
    monkeypatch.setattr(module, "_kth_largest", lambda scores, keep: torch.tensor(ordered[keep - 1]))
    size = 2**31 + 8
    scores = torch.from_file(str(tmp_path / "scores"), shared=True, size=size, dtype=torch.float32)
    places = [5, 2**31 - 1, 2**31, 2**31 + 3, size - 1]
    for rank, place in enumerate(places):
        scores[place] = 1.0 + rank % 2
    assert top_k(scores, len(places)).tolist() == places
    assert top_k(scores, 2).tolist() == [2**31 - 1, 2**31 + 3]
    assert top_k(scores, 3).tolist() == [5, 2**31 - 1, 2**31 + 3], "of three that are equal"
    assert top_k(scores, len(places) + 2).tolist() == [0, 1, *places]
