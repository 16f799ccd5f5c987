"""Problems with known answers, and makers of random ones."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swap_prune import LR
from swap_prune.fisher.factor import DenseFactor
from swap_prune.problem import PruningProblem
from swap_prune.regression.objective import WeightedRidge
from swap_prune.selection import Selection

ONE = LR(ridge=0.025, damping=1.0, metric="diagonal", floor=0)  # one candidate; it holds samples out, and takes steps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def but_long(cases: Iterable[Any], short: int | Collection[Any] = 1) -> list[Any]:
    """Return the cases of a parametrised test, all marked long but the first ``short`` of them, or but those named."""
    marked = []
    for number, case in enumerate(cases):
        values, marks, name = (case, (), None)
        if isinstance(case, type(pytest.param())):
            values, marks, name = case
        elif not isinstance(case, tuple):
            values = (case,)
        stays = number < short if isinstance(short, int) else case in short
        marked.append(pytest.param(*values, marks=[*marks] if stays else [*marks, pytest.mark.long], id=name))
    return marked


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def paired_clouds(n, seed=0, noise=0.3):
    """Two clouds (n,) that are close to each other pair by pair, as G w and G w_bar are."""
    state = generator(seed)
    y = torch.randn(n, generator=state, dtype=torch.float64)
    return y + noise * torch.randn(n, generator=state, dtype=torch.float64), y


def smoothing_matrix(n, state):
    """A symmetric positive definite S whose rows sum to 1, like the symmetric part of n P."""
    offsets = torch.randn(n, generator=state, dtype=torch.float64)
    kernel = torch.exp(-((offsets[:, None] - offsets[None, :]) ** 2)) + torch.eye(n, dtype=torch.float64)
    scale = torch.ones(n, dtype=torch.float64)
    for _ in range(200):  # symmetric Sinkhorn scaling
        scale = (scale / (kernel @ scale)).sqrt()
    return scale[:, None] * kernel * scale[None, :]


def random_regression(n, p, state, *, ridge=0.1, smoothed=False, dtype=torch.float64):
    """A WeightedRidge with a target of its own (not y) and a metric of its own."""
    G = torch.randn(n, p, generator=state, dtype=torch.float64)
    target = torch.randn(n, generator=state, dtype=torch.float64)
    reference = torch.randn(p, generator=state, dtype=torch.float64)
    metric = torch.rand(p, generator=state, dtype=torch.float64) + 0.5
    S = smoothing_matrix(n, state).to(dtype) if smoothed else None
    return WeightedRidge(DenseFactor(G.to(dtype)), target.to(dtype), reference.to(dtype), ridge, metric.to(dtype), S)


def orthogonal_regression(n, p, state, *, ridge=0.05, spread=1.0):
    """G with orthogonal columns of length sqrt(m_j), m the metric: Q is separable, and the best support known.

    The unconstrained minimiser is ``u_j = (g_j . t + n lam m_j w_bar_j) / (m_j (1 + n lam))``, and keeping weight j
    gains ``m_j (1 + n lam) u_j^2 / 2``.
    """
    basis = torch.linalg.qr(torch.randn(n, p, generator=state, dtype=torch.float64)).Q
    metric = torch.exp(spread * torch.randn(p, generator=state, dtype=torch.float64))
    G = basis * metric.sqrt()
    target = 2 * torch.randn(n, generator=state, dtype=torch.float64)
    reference = torch.randn(p, generator=state, dtype=torch.float64) / metric.sqrt()
    problem = WeightedRidge(DenseFactor(G), target, reference, ridge, metric)
    free = (G.T @ target + n * ridge * metric * reference) / (metric * (1 + n * ridge))
    return problem, free


def dense_parts(problem):
    """The arguments that the functions of `reference` take, in float64."""
    return {
        "G": problem.factor.columns(torch.arange(problem.factor.shape[1])).double(),
        "target": problem.target.double(),
        "reference": problem.reference.double(),
        "ridge": problem.ridge,
        "metric": problem.metric.double(),
        "smoothing": None if problem.smoothing is None else problem.smoothing.double(),
    }


@dataclass(frozen=True)
class KnownInputs:
    """Statistics of inputs that are at hand: parameter name to x, (groups, m, d)."""

    rows: dict[str, torch.Tensor]

    def mean_squares(self):
        return {name: x.square().mean(1) for name, x in self.rows.items()}

    def moments(self):
        return {name: x.mT @ x / x.shape[1] for name, x in self.rows.items()}


def pruning_problem(n, p, keep, seed=0, kind="plain", dtype=torch.float32):
    """A pruning problem of two layers, (2, p // 4) and (1, rest); ``kind`` names what is awkward about G.

    The inputs of a layer are as awkward: they are columns of G.
    """
    state = generator(seed)
    G = torch.randn(n, p, generator=state, dtype=torch.float64)
    if kind == "zero columns":
        G[:, ::3] = 0
    elif kind == "zero matrix":
        G.zero_()
    elif kind == "duplicate rows":
        G[n // 2 :] = G[: n - n // 2].clone()
    elif kind == "duplicate columns":
        G[:, p // 2 :] = G[:, : p - p // 2].clone()
    elif kind == "one row dominates":
        G[0] *= 1e4
    elif kind == "layers of different scale":
        G[:, : p // 2] *= 1e-3
    elif kind != "plain":
        raise AssertionError(kind)
    reference = torch.randn(p, generator=state, dtype=torch.float64)
    width = p // 4
    selection = Selection({"first": torch.Size([2, width]), "second": torch.Size([1, p - 2 * width])})
    inputs = KnownInputs({"first": G[None, :, :width].to(dtype), "second": G[None, :, 2 * width :].to(dtype)})
    return PruningProblem(reference.to(dtype), keep, DenseFactor(G.to(dtype)), selection=selection, inputs=inputs)


AWKWARD = (
    "plain",
    "zero columns",
    "zero matrix",
    "duplicate rows",
    "duplicate columns",
    "one row dominates",
    "layers of different scale",
)


def batches_of(*sizes):
    """Batches (inputs, targets) whose targets number the samples."""
    numbers = torch.arange(sum(sizes))
    return [(part[:, None].float() * 10, part) for part in numbers.split(list(sizes))]


def trained(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    lr: float = 3e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> nn.Module:
    """Train a network for some steps of Adam, on 64 random samples each; return it in eval mode."""
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        optimiser.zero_grad()
        loss(model(x[chosen]), y[chosen]).backward()
        optimiser.step()
    return model.eval()


def blurred_classes(count: int) -> tuple[Tensor, Tensor]:
    """Return inputs (n, 12) and one of three classes each, which noise makes hard to tell near their borders."""
    x = torch.randn(count, 12)
    return x, (torch.tanh(x) @ torch.randn(12, 3) + 0.5 * torch.randn(count, 3)).argmax(1)
