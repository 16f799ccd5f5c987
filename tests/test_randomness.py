"""Forked random states: repeatable, and apart from each other and from the run's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.methods.lr import LR
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.randomness import forked_generator, subset


def test_forks_are_repeatable_and_apart() -> None:
    def draw(seed: int, purpose: str) -> list[float]:
        return torch.randn(4, generator=forked_generator(seed, purpose)).tolist()

    cases = [(seed, purpose) for seed in (0, 1, 2**62) for purpose in ("noise", "solver 1", "solver 2")]
    draws = {case: draw(*case) for case in cases}
    assert all(draw(*case) == numbers for case, numbers in draws.items())
    own = [
        torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (0, 1)
    ]  # torch looks at 32 bits
    assert len({tuple(numbers) for numbers in [*draws.values(), *own]}) == len(cases) + 2


@pytest.mark.long
def test_each_subset_is_drawn_as_often_as_any_other() -> None:
    generator = forked_generator(0, "subsets")
    drawn = Counter(frozenset(subset(6, 3, generator).tolist()) for _ in range(20_000))
    assert all(len(one) == 3 and one <= set(range(6)) for one in drawn) and len(drawn) == 20
    assert sum((count - 1000) ** 2 / 1000 for count in drawn.values()) < 43.8, "chi-squared of 19 degrees, 0.1 %"
    again = [subset(10**6, size, forked_generator(1, "subsets")) for size in (7, 400_000, 10**6)]
    assert [len(one.unique()) for one in again] == [len(one) for one in again] == [7, 400_000, 10**6]
    assert torch.equal(again[1], subset(10**6, 400_000, forked_generator(1, "subsets")))
    with pytest.raises(ValueError, match="larger sample than population"):
        subset(3, 4, generator)


@pytest.mark.long
def test_what_a_method_draws_does_not_change_the_samples_of_later_stages() -> None:
    class Greedy(LR):
        def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
            torch.randn(1000, generator=generator)
            return super().solve(problem, generator)

    def pruned(method: LR) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        inputs = torch.randn(90, 6)
        data = TensorDataset(inputs, torch.randint(3, (90,)))
        prune(model, data, 0.6, method, samples=20, stages=3, noise="gradient:std=2", progress=False)
        return model[0].weight

    assert torch.equal(pruned(LR()), pruned(Greedy()))
