"""A plain loss function has no zero and no unit: what is added to it, or multiplied with, changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import TensorDataset

from swap_prune import prune
from tests.cases import but_long

Loss = Callable[[nn.Module, list[Tensor]], Tensor]


def trained() -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(1200, 12)
    y = torch.tanh(x @ torch.randn(12, 5))
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 5))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(300):
        part = slice(step % 16 * 50, step % 16 * 50 + 50)
        optimiser.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        optimiser.step()
    return model, TensorDataset(x[:800], y[:800]), (x[800:], y[800:])


def squares(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def pruned(loss: Loss, method: str = "lr", measure: Loss = squares) -> tuple[float, int]:
    """Return the held-out loss and the number of steps."""
    dense, data, held_out = trained()
    model = copy.deepcopy(dense)
    report = prune(model, data, 0.8, method, loss_fn=loss, samples=300, progress=False)
    with torch.no_grad():
        return float(measure(model, list(held_out)).mean()), len(report.stages[0].evidence["first_order"])


@pytest.mark.parametrize("method", but_long(["lr", "ewr"]))
@pytest.mark.parametrize("change", but_long(["+1", "-1", "+100", "*1e-6", "*1e6"]))
def test_what_is_added_or_multiplied_changes_nothing(change: str, method: str) -> None:
    number = float(change[1:])

    def changed(model: nn.Module, batch: list[Tensor]) -> Tensor:
        plain = squares(model, batch)
        return plain * number if change[0] == "*" else plain + (number if change[0] == "+" else -number)

    (plain, steps), (other, others) = pruned(squares, method), pruned(changed, method)
    assert steps > 0 and others > 0
    assert other == pytest.approx(plain, rel=0.1)  # rounding may end steps earlier or later


@pytest.mark.long
def test_a_loss_below_zero_is_gone_down_as_far_as_the_same_above_it() -> None:
    def away(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return 1 - cosine_similarity(model(batch[0]), batch[1])

    above, steps = pruned(away, measure=away)
    below, others = pruned(lambda model, batch: -cosine_similarity(model(batch[0]), batch[1]), measure=away)
    assert steps > 0 and others > 0 and below == pytest.approx(above, rel=0.1)
