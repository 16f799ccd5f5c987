"""BatchNorm's statistics, estimated anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.losses import cross_entropy
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.selection import select_parameters
from swap_prune.surgery.batchnorm import batchnorm_misfit, recalibrate_batchnorm
from swap_prune.surgery.snapshot import Snapshot
from swap_prune.surgery.weights import write_weights
from tests.cases import ONE, generator, normal


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    whole = normal(sum(sizes), 5, dtype=torch.float32), torch.zeros(sum(sizes), dtype=torch.long)
    return list(zip(*(part.split(sizes) for part in whole), strict=True))


@pytest.mark.parametrize("sizes", [(64,), (64, 64), (64, 2), (2, 64), (30, 3, 40)])
def test_every_sample_counts_alike(sizes: tuple[int, ...]) -> None:
    model, parts = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), batches(*sizes)
    assert recalibrate_batchnorm(model, parts, cross_entropy)
    inputs, shares = torch.cat([part[0] for part in parts]), torch.tensor(sizes) / sum(sizes)
    torch.testing.assert_close(model[0].running_mean, inputs.mean(0))
    within = torch.stack([part[0].var(0) for part in parts])
    torch.testing.assert_close(model[0].running_var, (shares[:, None] * within).sum(0))
    assert model[0].momentum == 0.1 and int(model[0].num_batches_tracked) == len(sizes)
    assert not model[0]._forward_pre_hooks


def test_a_layer_counts_what_reaches_it() -> None:
    """A layer that is passed twice, and one that the first batch does not reach."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.late, self.head = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.twice(torch.cat([x, x[:4]]))[:4] + self.twice(x[:4])
            return self.head(self.late(y) if len(x) < 20 else y).repeat(len(x), 1)[: len(x)]

    model, parts = Forked(), batches(30, 10, 10)
    recalibrate_batchnorm(model, parts, cross_entropy)
    seen = [torch.cat([x, x[:4], x[:4]]) for x, _ in parts]
    torch.testing.assert_close(model.twice.running_mean, torch.cat(seen).mean(0))
    assert int(model.late.num_batches_tracked) == 2
    assert float(model.late.running_var.max()) < 10, "not the mean with what was there before"


def test_an_expert_that_no_sample_of_a_batch_is_sent_to() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.unused, self.head = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            chosen = (x[:, 0] > 0) & (len(x) < 20)
            self.unused(x[:0])
            return self.head(x.masked_scatter(chosen[:, None], self.expert(x[chosen])))

    model, parts = Routed(), batches(30, 10, 10)
    nn.init.constant_(model.unused.running_mean, 7.0)
    assert recalibrate_batchnorm(model, parts, cross_entropy)
    sent = torch.cat([x[x[:, 0] > 0] for x, _ in parts[1:]])
    torch.testing.assert_close(model.expert.running_mean, sent.mean(0))
    assert model.unused.running_mean.tolist() == [7.0] * 5


def test_a_layer_may_be_called_by_keyword() -> None:
    class Named(nn.BatchNorm1d):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(input=x)

    plain, named = (nn.Sequential(kind(5), nn.Linear(5, 3)) for kind in (nn.BatchNorm1d, Named))
    for model in (plain, named):
        assert recalibrate_batchnorm(model, batches(30, 10), cross_entropy)
    assert torch.equal(plain[0].running_mean, named[0].running_mean)


def test_places_of_a_channel_count_too() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 3))
    shapes = (4, 2, 50), (8, 2, 5)
    parts = [(normal(*shape, dtype=torch.float32), torch.zeros(shape[0], dtype=torch.long)) for shape in shapes]
    assert recalibrate_batchnorm(model, parts, cross_entropy)
    every = torch.cat([x.transpose(0, 1).flatten(1) for x, _ in parts], dim=1)
    torch.testing.assert_close(model[0].running_mean, every.mean(1))


def test_what_fails_on_the_way_leaves_the_layers_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        cross_entropy(network, batch)
        raise RuntimeError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        recalibrate_batchnorm(model, batches(30, 10), loss)
    assert model[0].momentum == 0.1 and not model[0]._forward_pre_hooks


def test_a_look_at_the_misfit_changes_nothing() -> None:
    """Nor where the loss fails on the way."""
    model, asked = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), []
    before = [buffer.clone() for buffer in model.buffers()]

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        asked.append(network[0].training)
        losses = cross_entropy(network, batch)
        if len(asked) == 8:
            raise RuntimeError("the last batch of the second look")
        return losses

    stored, own = batchnorm_misfit(model, batches(30, 10), loss)
    assert stored != own and asked == [False, False, True, True]
    with pytest.raises(ValueError, match="the second look"):
        batchnorm_misfit(model, batches(30, 10), loss)
    assert all(map(torch.equal, before, model.buffers()))


@pytest.mark.parametrize("size", [128, 130, 259, 650])
def test_statistics_are_good_whatever_is_left_over(size: int) -> None:
    data = torch.utils.data.TensorDataset(normal(size, 5, dtype=torch.float32), torch.zeros(size, dtype=torch.long))
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
    recalibrate_batchnorm(model, CalibrationStream(data, generator()).read(10000), cross_entropy)
    torch.testing.assert_close(model[0].running_mean, data.tensors[0].mean(0))
    assert float((model[0].running_var / data.tensors[0].var(0) - 1).abs().max()) < 0.03


def test_a_snapshot_lends_its_copy_as_long_as_that_is_right() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    weight, before = model[0].weight, Snapshot(model)
    lent = before.copy_of(weight)
    assert lent is before.copy_of(weight) and torch.equal(lent, weight) and lent.data_ptr() != weight.data_ptr()
    with torch.no_grad():
        weight.add_(1)
    own = before.copy_of(weight)
    assert own is not lent and torch.equal(own, weight) and own.data_ptr() != weight.data_ptr()
    before.restore()
    assert torch.equal(weight, lent)
    stranger = torch.randn(2)
    assert torch.equal(before.copy_of(stranger), stranger)


def test_kept_weights_that_a_narrow_dtype_would_lose_keep_their_sign() -> None:
    model = nn.Linear(4, 1, bias=False).half()
    selection = select_parameters(model)
    weights = torch.tensor([1e-12, -1e-12, 0.0, -1e-12])
    write_weights(model, selection, weights, torch.tensor([True, True, True, False]))
    least = torch.finfo(torch.float16).smallest_normal
    assert model.weight.flatten().tolist() == [least, -least, 0.0, 0.0]


def test_weights_beyond_a_narrow_dtype_become_its_largest_and_not_infinite() -> None:
    model = nn.Linear(4, 1, bias=False).half()
    weights = torch.tensor([1e5, 1.0, -7e4, 6e4])
    write_weights(model, select_parameters(model), weights, torch.ones(4, dtype=torch.bool))
    assert model.weight.flatten().tolist() == [65504.0, 1.0, -65504.0, 6e4 // 32 * 32]


class Replacing(nn.Module):
    """Writes to one of its buffers, and puts another tensor in the place of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + 1
        outputs: Tensor = self.head(self.norm(x))
        return outputs


def test_a_snapshot_gives_back_weights_statistics_and_all_other_buffers() -> None:
    model = Replacing()
    before, replaced = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.replaced
    snapshot = Snapshot(model)
    with torch.no_grad():
        model.head.weight.mul_(2)
    model.train()(normal(8, 5, dtype=torch.float32))
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in MOVED)
    snapshot.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.replaced is replaced


MOVED = ("head.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "written", "replaced")


def moved(self: nn.RNNBase) -> None:
    """Move weights into one piece of memory, as cuDNN does whenever they are not in one."""
    if len({weight.data_ptr() for weight in self._flat_weights}) == len(self._flat_weights):
        with torch.no_grad():
            pieces = torch.cat([weight.detach().reshape(-1) for weight in self._flat_weights])
            for weight, piece in zip(
                self._flat_weights, pieces.split([weight.numel() for weight in self._flat_weights]), strict=True
            ):
                weight.set_(piece.view_as(weight))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0].mean(1))


def test_weights_that_cudnn_moved_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recurrent()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    snapshot = Snapshot(model)
    moved(model.body)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    snapshot.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.long
def test_the_best_number_of_stages_is_found_though_cudnn_moves_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data, first = TensorDataset(torch.randn(120, 5, 6), torch.arange(120) % 4), Recurrent()
    second, settings = copy.deepcopy(first), {"samples": 32, "stages": "auto", "targets": ["LSTM"], "progress": False}
    prune(first, data, 0.8, ONE, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", moved)
    prune(second, data, 0.8, ONE, **settings)  # type: ignore[arg-type]
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
