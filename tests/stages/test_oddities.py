"""Odd calibration samples are said, and states that a loss may draw from are the run's own."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import BinaryCrossEntropy, SquaredError, TokenCrossEntropy, prune
from swap_prune.losses import CrossEntropy, LossFn, cross_entropy
from swap_prune.stages.oddities import WatchedLosses, share_of_largest
from tests.cases import trained


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))


def data() -> tuple[Tensor, Tensor]:
    state = torch.Generator().manual_seed(1)
    return torch.randn(300, 6, generator=state), torch.randn(300, 2, generator=state)


@pytest.mark.long
def test_one_target_that_stands_for_a_missing_one_is_said() -> None:
    x, y = data()
    assert prune(network(), TensorDataset(x, y), 0.5, "lr", loss_fn=SquaredError(), progress=False).notes == [
        "samples used in a stage: 240, fewer than the 1024 asked for"
    ]
    for place in range(0, 300, 25):  # a fifth is held out
        bad = y.index_put((torch.tensor(place), torch.tensor(0)), torch.tensor(-9999.0))
        report = prune(network(), TensorDataset(x, bad), 0.5, "lr", loss_fn=SquaredError(), progress=False)
        assert any("one calibration sample has 100 % of what the losses have" in note for note in report.notes), place


@pytest.mark.parametrize("offset", [0.0, -50.0])
def test_it_is_a_share_of_what_is_above_the_median(offset: float) -> None:
    losses, loss_fn = torch.linspace(0, 1, 101) + offset, SquaredError()
    assert share_of_largest(losses, loss_fn) is None
    losses[3] = 100 + offset
    assert share_of_largest(losses, loss_fn) == pytest.approx(99.49 / 111.74, rel=1e-5)
    assert share_of_largest(losses[:10], loss_fn) is None is share_of_largest(torch.ones(64), loss_fn)
    losses[4] = 10 + offset
    assert share_of_largest(losses, loss_fn) is None, "the next is not far behind"


def test_the_one_error_of_a_sound_classifier_is_not_odd() -> None:
    losses = torch.full((100,), 1e-4).index_fill_(0, torch.tensor(7), 12.0)
    assert share_of_largest(losses, cross_entropy) is None
    assert share_of_largest(losses, SquaredError()) == pytest.approx(1.0)
    losses[7] = 400.0  # inputs in another unit
    assert share_of_largest(losses, cross_entropy) == pytest.approx(1.0)


def test_the_best_candidate_alone_tells_an_odd_sample() -> None:
    even, odd = torch.linspace(0, 1, 64), torch.linspace(0, 1, 64).index_fill(0, torch.tensor(9), 90.0)
    kept = torch.tensor([True, False])
    watched = WatchedLosses(lambda weights, _: odd if weights.any() else even, SquaredError())
    for far_off, share in ((True, True), (False, False), (True, False)):
        watched(torch.full((2,), float(far_off)), kept)
        assert (watched.share_of_largest is not None) == share
    watched = WatchedLosses(lambda _, kept: even - 1 if kept.all() else odd, SquaredError())
    watched(torch.ones(2), kept)
    watched(torch.ones(2), ~(kept & False))  # the dense network, which has learned it
    assert watched.share_of_largest is not None
    broken = WatchedLosses(lambda *_: odd * torch.inf, SquaredError())
    assert bool(broken(torch.ones(2), kept).isnan().any()) and broken.share_of_largest is None


@pytest.mark.long
@pytest.mark.parametrize(
    "loss_fn", [SquaredError(), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)]
)
def test_an_odd_target_that_the_network_has_learned_is_said(loss_fn: LossFn) -> None:
    x, y = data()
    said = 0
    for place in range(0, 300, 60):
        bad = y.index_put((torch.tensor(place), torch.tensor(0)), torch.tensor(-100.0))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 2))
        model = trained(model, x, bad, 300, lr=1e-2, loss=nn.functional.mse_loss)
        report = prune(model, TensorDataset(x, bad), 0.9, "lr", loss_fn=loss_fn, progress=False)
        said += any("one calibration sample has" in note for note in report.notes)
    assert said >= 4


@pytest.mark.parametrize("loss_fn", [CrossEntropy(), BinaryCrossEntropy(), TokenCrossEntropy()])
def test_a_wrong_class_is_not_odd_whatever_it_is_a_class_of(loss_fn: LossFn) -> None:
    losses = torch.full((100,), 1e-4).index_fill_(0, torch.tensor(7), 12.0)
    assert share_of_largest(losses, loss_fn) is None
    assert share_of_largest(losses, lambda *_: losses) is not None


def test_a_well_trained_classifier_has_no_odd_sample() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 10)
    y = (x[:, 0] > 0).long()
    model = trained(nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2)), x, y, 400, lr=1e-2)
    report = prune(model, TensorDataset(x, y), 0.5, "lr", samples=300, progress=False)
    assert not any("one calibration sample" in note for note in report.notes)


def behind_no_grad() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self.backbone(inputs).relu()
            return self.head(hidden)

    return Net()


@pytest.mark.parametrize("method", ["lr", "obd"])
def test_layers_that_no_gradient_reaches_are_named(method: str) -> None:
    data = TensorDataset(torch.randn(60, 4), torch.randn(60, 1))
    for model, named in ((behind_no_grad(), True), (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), False)):
        report = prune(model, data, 0.5, method, samples=40, loss_fn=SquaredError(), stages=2, progress=False)
        assert any(note.startswith("no gradient reaches backbone.weight: behind") for note in report.notes) == named
        assert report.stages[0].evidence.get("without_gradient") == (["backbone.weight"] if named else None)


ROUNDING = "gradients are no more than rounding at the dense network"


def own_outputs(model: nn.Module, error: float) -> tuple[Tensor, Tensor]:
    """Return inputs, and the network's outputs as another machine would have them."""
    inputs = data()[0]
    with torch.no_grad():
        outputs = copy.deepcopy(model).double()(inputs.double())
    return inputs, (outputs + error * torch.randn(outputs.shape, dtype=torch.float64)).float()


def squares(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


@pytest.mark.parametrize(
    ("method", "loss", "noted"),
    [
        ("obd", SquaredError(), True),
        ("woodfisher", BinaryCrossEntropy(), True),
        ("ewr", squares, True),
        ("ewr", SquaredError(), False),  # which takes no gradients of the loss
        ("magnitude", SquaredError(), False),
    ],
)
def test_gradients_of_rounding_size_are_said(method: str, loss: LossFn, *, noted: bool) -> None:
    model = network()
    inputs, outputs = own_outputs(model, 0.0)
    if isinstance(loss, BinaryCrossEntropy):
        outputs = outputs.sigmoid()
    report = prune(model, TensorDataset(inputs, outputs), 0.5, method, loss_fn=loss, stages=2, progress=False)
    assert any(note.startswith(ROUNDING) for note in report.notes) == noted
    assert [stage.evidence.get("gradients_are_rounding", False) for stage in report.stages] == [noted, False]


def test_targets_that_are_the_networks_own_in_part_are_not_rounding() -> None:
    """Those come first, and are more than are looked at."""
    model = network()
    inputs, outputs = own_outputs(model, 0.0)
    outputs[20:] = data()[1][20:]
    batches = [(inputs[a : a + 10], outputs[a : a + 10]) for a in range(0, 300, 10)]
    report = prune(model, batches, 0.5, "obd", loss_fn=SquaredError(), progress=False)
    assert not any(note.startswith(ROUNDING) for note in report.notes)


def test_a_fit_in_float64_is_not_rounding_where_it_is_one_in_float32() -> None:
    model = network()
    given = TensorDataset(*own_outputs(model, 0.0))
    report = prune(model.double(), TensorDataset(*(t.double() for t in given.tensors)), 0.5, "lr", loss_fn=squares)
    assert 0 < report.stages[0].loss < 1e-12 and not any(note.startswith(ROUNDING) for note in report.notes)


@pytest.mark.long
def test_small_gradients_that_say_something_are_not_rounding() -> None:
    """Targets that are a thousandth off, and a classifier that has learnt its labels by heart."""
    model = network()
    given = TensorDataset(*own_outputs(model, 1e-3))
    report = prune(model, given, 0.5, "obd", loss_fn=SquaredError(), progress=False)
    assert 0 < report.stages[0].loss < 1e-5 and not any(note.startswith(ROUNDING) for note in report.notes)
    inputs = data()[0]
    labels = (inputs[:, 0] > 0).long()
    kept = inputs[:, 0].abs() > 0.2
    learnt = trained(network(), inputs[kept], labels[kept], 3000, lr=3e-2)
    report = prune(learnt, TensorDataset(inputs[kept], labels[kept]), 0.5, "obd", progress=False)
    assert report.stages[0].loss < 1e-3 and not any(note.startswith(ROUNDING) for note in report.notes)


@pytest.mark.parametrize("source", ["numpy", "python"])
def test_a_loss_that_draws_from_other_states_gives_the_same_and_leaves_them(source: str) -> None:
    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        n = len(batch[0])
        drawn = np.random.randn(n) if source == "numpy" else [random.gauss(0, 1) for _ in range(n)]
        shifted = batch[0] + 0.1 * torch.tensor(drawn, dtype=torch.float32)[:, None]
        return (model(shifted) - batch[1]).square().mean(1)

    dense, found = network(), []
    for _ in range(2):
        model = copy.deepcopy(dense)
        np.random.seed(len(found))
        random.seed(len(found))
        before = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]
        prune(model, TensorDataset(*data()), 0.6, "lr", loss_fn=loss, samples=100, progress=False)
        assert before == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
        found.append(model[0].weight.detach().clone())  # type: ignore[index]
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["lr", "obd", "wanda", "sparsegpt"])
@pytest.mark.parametrize("in_order", [True, False])
def test_data_in_the_order_of_their_classes_are_noted_by_every_method(method: str, in_order: bool) -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) // 40 if in_order else torch.arange(200) % 5
    batches = [(torch.randn(20, 4), labels[start : start + 20]) for start in range(0, 200, 20)]
    report = prune(nn.Sequential(nn.Linear(4, 5)), batches, 0.5, method, samples=40, progress=False)
    said = [note for note in report.notes if "calibration labels are of" in note]
    assert said == (
        [
            "the 40 calibration labels are of 1 of 5 classes: data that are read in order should be shuffled; a "
            "Dataset is drawn from at random"
        ]
        if in_order
        else []
    )
