"""BatchNorm's statistics after a training under masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swap_prune import FineTune, finetune, prune, recalibrate_batchnorm
from swap_prune.losses import cross_entropy
from tests.cases import blurred_classes, trained


def pruned() -> tuple[nn.Module, nn.Module, TensorDataset]:
    """Return a trained network, the same pruned to 0.95, where channels are all but constant, and its data."""
    torch.manual_seed(1)
    x, y = blurred_classes(1500)
    hidden = [nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]
    model = trained(nn.Sequential(nn.Linear(12, 32), *hidden, nn.Linear(32, 3)), x, y, 150)
    dense, data = copy.deepcopy(model), TensorDataset(x, y)
    prune(model, data, 0.95, "lr", samples=300, progress=False)
    return dense, model, data


def loss(model: nn.Module, data: TensorDataset) -> float:
    return float(nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).detach())


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_statistics_are_estimated_anew_after_training(optimizer: str) -> None:
    dense, model, data = pruned()
    settings, found = FineTune(epochs=2, optimizer=optimizer, lr=0.003), []
    for recalibrate in (True, False):
        one = copy.deepcopy(model)
        finetune(one, data, settings, teacher=dense, recalibrate_batchnorm=recalibrate, progress=False)
        inputs = (data.tensors[0] @ one[0].weight.T + one[0].bias).detach()
        found.append(one)
        assert torch.allclose(one[1].running_mean, inputs.mean(0), rtol=1e-4, atol=1e-5) == recalibrate
    own = zip(*(one.parameters() for one in found), strict=True)
    assert all(torch.equal(one, other) for one, other in own)
    assert loss(found[0], data) < 0.8


@pytest.mark.long
def test_it_is_the_average_over_the_data_and_nothing_else_changes() -> None:
    _, model, data = pruned()
    before, state = copy.deepcopy(model), torch.random.get_rng_state()
    model.train()
    assert recalibrate_batchnorm(model, data, seed=3) and model.training
    inputs = data.tensors[0] @ model[0].weight.T + model[0].bias
    torch.testing.assert_close(model[1].running_mean, inputs.mean(0), rtol=1e-4, atol=1e-5)
    own = zip(model.named_parameters(), before.parameters(), strict=True)
    assert all(torch.equal(one, other) for (_, one), other in own)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.long
def test_data_that_can_be_read_once_are_trained_on_all_the_same() -> None:
    _, model, data = pruned()
    batches = iter(list(DataLoader(data, batch_size=100)))
    assert finetune(model, batches, FineTune(epochs=1), progress=False).steps == 15


@pytest.mark.long
def test_without_statistics_or_with_bad_data() -> None:
    plain = nn.Sequential(nn.Linear(12, 3))
    assert not recalibrate_batchnorm(plain, TensorDataset(torch.randn(8, 12), torch.zeros(8, dtype=torch.long)))
    _, model, data = pruned()
    before = statistics(model)
    x = data.tensors[0].clone()
    x[700] = torch.nan
    with pytest.raises(ValueError, match="statistics of the data are not finite"):
        recalibrate_batchnorm(model, TensorDataset(x, data.tensors[1]))
    with pytest.raises(ValueError, match="samples must be"):
        recalibrate_batchnorm(model, data, samples=0)
    assert all(torch.equal(one, other) for one, other in zip(before, model.buffers(), strict=True))


def test_other_buffers_are_given_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(12), nn.Linear(12, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(self.norm(x))

    model = Counting()
    assert recalibrate_batchnorm(model, TensorDataset(torch.randn(64, 12), torch.zeros(64, dtype=torch.long)))
    assert int(model.calls) == 0 and float(model.norm.running_mean.abs().max()) > 0


def test_batches_that_the_default_loss_cannot_read_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{"x": torch.randn(8, 4), "target": torch.randint(3, (8,))}]
    with pytest.raises(ValueError, match=r"default loss needs batches .* a dict with keys \['target', 'x'\]; pass"):
        recalibrate_batchnorm(model, batches)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="the default loss needs batches"):
        recalibrate_batchnorm(model, [torch.randn(8, 4)])
    assert recalibrate_batchnorm(model, batches, loss_fn=lambda net, b: cross_entropy(net, (b["x"], b["target"])))
    assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
