"""Forked random states: repeatable, and apart from each other and from the run's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.methods.lr import LR
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.randomness import forked_generator


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
