"""The layout of images: taken where a network takes it, to the same effect, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.batches import join_batches, slice_batch
from swap_prune.calibration import CalibrationStream
from swap_prune.layout import lay_out, suited_layout
from swap_prune.losses import cross_entropy


class Network(nn.Module):
    """Two convolutions and a layer on all their pixels, flattened by ``view`` or by ``flatten``."""

    def __init__(self, viewed: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.classify = nn.Linear(4 * 6 * 6, 3)
        self.viewed = viewed
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        x = self.features(x)
        return self.classify(x.view(len(x), -1) if self.viewed else x.flatten(1))


def network(viewed: bool = False) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(viewed)


def images(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


def test_a_network_that_convolves_gets_channels_last():
    assert suited_layout(network(), cross_entropy, slice_batch(images(), 0, 1)) is torch.channels_last


def test_a_network_that_takes_nothing_else_gets_images_as_they_come():
    assert suited_layout(network(viewed=True), cross_entropy, slice_batch(images(), 0, 1)) is torch.preserve_format


def test_a_network_that_makes_something_else_of_it_gets_images_as_they_come():
    class Striding(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.stride(1))

    assert suited_layout(Striding(), cross_entropy, slice_batch(images(), 0, 1)) is torch.preserve_format


@pytest.mark.parametrize(
    "sample", [None, (torch.randn(1, 192), torch.zeros(1, dtype=torch.long)), (images(1)[0].double(), images(1)[1])]
)
def test_nothing_to_lay_out(sample):
    assert suited_layout(network(), cross_entropy, sample) is torch.preserve_format
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert suited_layout(linear, cross_entropy, slice_batch(images(), 0, 1)) is torch.preserve_format


def test_the_trial_leaves_no_trace():
    model, state = network(), torch.get_rng_state()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        sample = slice_batch((images()[0] + 0, images()[1]), 0, 1)
        assert suited_layout(model, cross_entropy, sample) is torch.channels_last
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_drawn_batches_keep_their_values_and_the_layout_when_cut_and_joined():
    inputs, labels = images()
    plain, laid = (
        CalibrationStream([(inputs, labels)], torch.Generator(), "cpu", layout).draw(60)[0]
        for layout in (torch.preserve_format, torch.channels_last)
    )
    assert torch.equal(plain[0], laid[0]) and torch.equal(plain[1], laid[1])
    assert plain[0].is_contiguous() and inputs.is_contiguous()
    parts = [laid, slice_batch(laid, 3, 9), join_batches([slice_batch(laid, 0, 5), slice_batch(laid, 5, 9)], 64)[0]]
    assert all(part[0].is_contiguous(memory_format=torch.channels_last) for part in parts)
    assert lay_out(laid, torch.channels_last)[0] is laid[0]  # nothing is copied twice


@pytest.mark.parametrize("method", ["lr", "magnitude", "sparsegpt"])
def test_pruning_takes_it_and_gives_the_same(method, monkeypatch):
    data = TensorDataset(*images(200))
    fast, slow = network(), network()
    prune(fast, data, 0.6, method, samples=100, progress=False)
    assert sum(fast.seen) > len(fast.seen) / 2
    monkeypatch.setattr("swap_prune.pipeline.suited_layout", lambda *_: torch.preserve_format)
    prune(slow, data, 0.6, method, samples=100, progress=False)
    assert not any(slow.seen)
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert ours.is_contiguous()


def test_pruning_a_network_that_views_its_features():
    model = network(viewed=True)
    report = prune(model, TensorDataset(*images(200)), 0.6, samples=100, progress=False)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    assert sum(model.seen) == 1  # the trial
