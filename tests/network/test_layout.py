"""The layout of images: taken where a network takes it, to the same effect, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.experiments.evaluate import evaluate
from swap_prune.fisher.capture.rows import Backend, capture_gradients
from swap_prune.fisher.factor import DenseFactor
from swap_prune.losses import cross_entropy
from swap_prune.network.layout import images_laid_out, takes_channels_last
from swap_prune.samples.batches import slice_batch
from swap_prune.selection import select_parameters
from tests.cases import but_long

SEEN: list[bool] = []  # whether the networks below saw channels last


def all_pixels(x: Tensor) -> Tensor:
    return x.flatten(1)


class Network(nn.Module):
    """Two convolutions and a layer on all their pixels."""

    def __init__(self, flatten: Callable[[Tensor], Tensor] = all_pixels) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.classify = nn.Linear(4 * 6 * 6, 3)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return self.classify(self.flatten(self.features(x)))


REFUSALS = {
    "views all pixels": lambda x: x.view(len(x), -1),
    "views samples with channels": lambda x: x.view(len(x) * 4, 36).reshape(len(x), -1),
    "reads strides": lambda x: x.flatten(1) * float(x.stride(1)),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    SEEN.clear()
    yield


def network(flatten: Callable[[Tensor], Tensor] = all_pixels) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(flatten)


def images(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


def one() -> tuple[Tensor, Tensor]:
    return slice_batch(images(), 0, 1)


def test_a_network_that_convolves_takes_it() -> None:
    assert takes_channels_last(network(), cross_entropy, one())


@pytest.mark.parametrize("reason", but_long(REFUSALS))
def test_a_network_that_refuses_gets_images_as_they_come(reason: str) -> None:
    model = network(REFUSALS[reason])
    assert not takes_channels_last(model, cross_entropy, one())
    SEEN.clear()
    report = prune(model, TensorDataset(*images(200)), 0.6, samples=100, progress=False)
    assert report.sparsity == pytest.approx(0.6, abs=0.01) and not report.settings["channels_last"]
    assert sum(SEEN) <= 1  # the trial


def test_a_network_without_room_for_a_copy_gets_images_as_they_come() -> None:
    def short(_model: nn.Module, _batch: object) -> Tensor:
        raise MemoryError("none left")

    assert not takes_channels_last(
        nn.Sequential(nn.Conv2d(3, 4, 3)), short, (torch.randn(1, 3, 8, 8), torch.tensor([0]))
    )


@pytest.mark.parametrize(
    "sample", [None, (torch.randn(1, 192), torch.zeros(1, dtype=torch.long)), (one()[0].double(), one()[1])]
)
def test_nothing_to_lay_out(sample: object) -> None:
    assert not takes_channels_last(network().double(), cross_entropy, sample)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert not takes_channels_last(linear, cross_entropy, one())


def test_the_trial_leaves_no_trace() -> None:
    class Counting(Network):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    model, state = Counting(), torch.get_rng_state()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        sample = slice_batch((images()[0] + 0, images()[1]), 0, 1)
        assert takes_channels_last(model, cross_entropy, sample)
    assert model.training and all(p.grad is None for p in model.parameters()) and not hasattr(model, "kept")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_the_network_sees_it() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, *, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, mask))
            assert not (x.is_contiguous() or mask.is_contiguous())
            return {"both": (x * 2, mask * 2)}

    x = images(4)[0]
    model = Pair()
    with images_laid_out(model):
        found = model(x, mask=x)["both"]
    assert x.is_contiguous() and all(t.is_contiguous() and torch.equal(t, 2 * x) for t in found)
    with pytest.raises(AssertionError):
        model(x, mask=x)
    with images_laid_out(model, False), pytest.raises(AssertionError):
        model(x, mask=x)


def test_inputs_of_any_strides() -> None:
    strided = torch.randn(60, 8, 8, 3).permute(0, 3, 1, 2)
    for model in (network(), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))):
        prune(model, [(strided, images()[1])], 0.5, samples=40, progress=False)


@pytest.mark.parametrize(
    "method", but_long(["lr", "magnitude", "sparsegpt", "obd"], short=["magnitude", "sparsegpt", "obd"])
)
def test_pruning_takes_it_and_gives_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorDataset(*images(200))
    fast, slow = network(), network()
    assert prune(fast, data, 0.6, method, samples=100, progress=False).settings["channels_last"]
    assert sum(SEEN) > len(SEEN) / 2
    SEEN.clear()
    monkeypatch.setattr("swap_prune.pipeline.takes_channels_last", lambda *_, **__: False)
    prune(slow, data, 0.6, method, samples=100, progress=False)
    assert SEEN and not any(SEEN)
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert ours.is_contiguous()
    assert not fast._forward_hooks and not fast._forward_pre_hooks


def test_a_network_can_be_copied_after_pruning_by_magnitude() -> None:
    class Keeping(Network):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    model = Keeping()
    prune(model, TensorDataset(*images()), 0.5, "magnitude", recalibrate_batchnorm=False, progress=False)
    copy.deepcopy(model)


def test_evaluation_takes_it() -> None:
    model = network()
    found = evaluate(model, TensorDataset(*images()), batch_size=20)
    assert sum(SEEN) >= 3 and not model._forward_hooks
    with torch.no_grad():
        assert found.accuracy == pytest.approx(
            100 * float((model.eval()(images()[0]).argmax(1) == images()[1]).double().mean())
        )


@pytest.mark.parametrize("backend", ["hooks", "vmap", "loop"])
def test_gradients_are_the_same_whatever_takes_them(backend: Backend) -> None:
    model, batch = network(), images(20)
    selection = select_parameters(model)
    usual = capture_gradients(model, selection, [batch], cross_entropy, backend=backend)
    with images_laid_out(model):
        laid = capture_gradients(model, selection, [batch], cross_entropy, backend=backend)
    assert usual.backend == laid.backend == backend
    assert isinstance(usual.factor, DenseFactor) and isinstance(laid.factor, DenseFactor)
    torch.testing.assert_close(laid.factor.matrix, usual.factor.matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups", "laid"),
    [
        (2, 1, 2, 1, False),
        (15, 1, (1, 2), 1, False),
        (32, 1, 2, 4, False),
        (16, 1, 2, 1, True),
        (2, 1, 1, 1, True),
        (2, 3, 2, 1, True),
    ],
)
def test_layers_whose_gradients_write_past_their_memory_keep_their_layout(channels, kernel, stride, groups, laid):
    convolution = nn.Conv2d(channels, 16, kernel, stride, groups=groups)
    network = nn.Sequential(convolution, nn.Flatten(), nn.LazyLinear(3))
    sample = torch.randn(1, channels, 8, 8), torch.tensor([1])
    network(sample[0])
    assert takes_channels_last(network, cross_entropy, sample) is laid
    assert takes_channels_last(network, cross_entropy, sample, backwards=False), "forwards alone nothing is wrong"
