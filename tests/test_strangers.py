"""Networks, losses and data as strangers bring them: each either works, or is refused with a way out."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import TensorDataset

from swap_prune import load_pruned, prune

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(80, 8, generator=GENERATOR), torch.randint(3, (80,), generator=GENERATOR)
DATA = TensorDataset(INPUTS, LABELS)


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def perceptron() -> nn.Module:
    return drawn(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (torch.nn.utils.weight_norm, "remove_weight_norm"),
        (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
        (parametrizations.weight_norm, "remove_parametrizations"),
        (parametrizations.spectral_norm, "remove_parametrizations"),
    ],
)
def test_weights_that_are_computed_from_others(wrap: Callable[[nn.Module], nn.Module], remedy: str) -> None:
    model = drawn(lambda: nn.Sequential(wrap(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 3)))
    with pytest.raises(
        ValueError, match=rf"'weight' of '0' is computed from other parameters.*{remedy}.*ignore=\['0'\]"
    ):
        prune(model, DATA, 0.5, samples=32, progress=False)
    report = prune(model, DATA, 0.5, samples=32, progress=False, ignore=["0"])
    assert report.total == 48 and report.kept == 24


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_parametrisations_that_are_left_alone() -> None:
    class Half(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return bias / 2

    model = perceptron()
    parametrize.register_parametrization(model[0], "bias", Half())  # type: ignore[index]
    assert prune(model, DATA, 0.5, samples=32, progress=False).total == 8 * 16 + 48
    old = drawn(lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 3)))
    for ignore in (["0.weight_g", "0.weight_v"], [r"re:0\..*"]):
        assert prune(old, DATA, 0.5, samples=32, progress=False, ignore=ignore).total == 48


def test_a_loss_on_another_network_is_not_tried_on_a_copy() -> None:
    net = drawn(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Viewing(), nn.Linear(4, 3)))
    net.train()
    images = torch.randn(80, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    report = prune(
        net, TensorDataset(images, LABELS), 0.5, "magnitude", recalibrate_batchnorm=False, progress=False,
        loss_fn=lambda _, batch: functional.cross_entropy(net(batch[0]), batch[1], reduction="none"),
    )  # fmt: skip
    assert not report.settings["channels_last"]
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


class Viewing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


@pytest.mark.parametrize("method", ["ewr", "obd", "wanda"])
def test_a_transformer_with_padding(method: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
            self.classify = nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            hidden: Tensor = self.layers(self.embed(ids), src_key_padding_mask=ids == 0)
            return self.classify(hidden.mean(1))

    ids = torch.randint(1, 20, (60, 7), generator=torch.Generator().manual_seed(1))
    ids[:30, 5:] = 0
    fast = torch.backends.mha.get_fastpath_enabled()
    targets = ("linear1", "linear2", "classify") if method == "wanda" else ("Linear",)
    targets = tuple(f"re:.*{name}" for name in targets) if method == "wanda" else targets
    report = prune(
        drawn(Encoder), TensorDataset(ids, LABELS[:60]), 0.5, method, samples=32, targets=targets, progress=False
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.01) and torch.backends.mha.get_fastpath_enabled() == fast


def test_what_comes_first_is_detached_and_labels_are_wrong() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.base(x).relu()
            return self.out(self.hidden(features).relu())

    model, state = drawn(Detached), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        inputs = torch.randn(300, 8, generator=state)
        labels = model(inputs).argmax(1)
    labels = torch.where(torch.rand(300, generator=state) < 0.5, torch.randint(4, (300,), generator=state), labels)
    report = prune(model, TensorDataset(inputs, labels), 0.5, ignore=["base"], samples=200, progress=False)
    assert report.stages[0].evidence["label_noise"] > 0.2


def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    z = functional.normalize(model(batch[0]), dim=1)
    return functional.cross_entropy(z @ z.T * 5, torch.arange(len(z)), reduction="none")


@pytest.mark.parametrize("storage", ["float32", "low-rank", "matrix-free"])
@pytest.mark.parametrize("method", ["ewr", "obd"])
def test_a_loss_that_mixes_samples(method: str, storage: str) -> None:
    with pytest.raises(ValueError, match=r"depends on the others in its batch.*do not mix them"):
        prune(perceptron(), DATA, 0.5, method, loss_fn=contrastive, samples=32, storage=storage, progress=False)


def test_batchnorm_without_running_statistics() -> None:
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    model = drawn(lambda: nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 3)))
    with pytest.raises(ValueError, match=r"single sample.*BatchNorm needs running statistics"):
        prune(model, DATA, 0.5, samples=32, progress=False)


def test_a_network_that_is_always_random_leaves_and_reads_no_global_state() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(functional.dropout(self.layer(x).relu(), 0.2, training=True))

    weights = []
    for start in (1, 2):
        model = drawn(Random)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(start)
            before = torch.get_rng_state()
            prune(model, DATA, 0.5, samples=32, progress=False)
            assert torch.equal(torch.get_rng_state(), before)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_numbers_of_numpy() -> None:
    weights = []
    for samples, seed, whether in ((32, 3, False), (np.int64(32), np.int32(3), np.bool_(False))):
        model = perceptron()
        report = prune(model, DATA, 0.5, samples=samples, seed=seed, recalibrate_batchnorm=whether, progress=False)
        json.dumps(report.settings)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)
    for bad in (3.0, True, "3", np.float64(3)):
        with pytest.raises(ValueError, match="samples must be a whole number of at least 1"):
            prune(perceptron(), DATA, 0.5, samples=bad, progress=False)


def test_losses_and_outputs_that_are_no_such_thing() -> None:
    with pytest.raises(ValueError, match=r"loss_fn must be a function \(model, batch\).*CrossEntropyLoss.*lambda"):
        prune(perceptron(), DATA, 0.5, loss_fn=nn.CrossEntropyLoss(), progress=False)  # type: ignore[arg-type]

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(x)}

    with pytest.raises(ValueError, match=r"returns logits \(n, classes\), got a dict: pass loss_fn="):
        prune(Named(), DATA, 0.5, samples=32, progress=False)


def test_batches_that_have_attributes() -> None:
    class Encoding(UserDict[str, Tensor]):
        def __getattr__(self, name: str) -> Tensor:
            try:
                return self.data[name]
            except KeyError as error:
                raise AttributeError(name) from error

    def loss(model: nn.Module, batch: Encoding) -> Tensor:
        return functional.cross_entropy(model(batch.inputs), batch.labels, reduction="none")

    batches = [Encoding({"inputs": INPUTS[i : i + 20], "labels": LABELS[i : i + 20]}) for i in (0, 20, 40, 60)]
    report = prune(perceptron(), batches, 0.5, loss_fn=loss, samples=40, progress=False)
    assert report.stages[0].samples == 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which compiling imports
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_an_artifact_of_a_wrapped_network(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = perceptron()
    prune(wrap(model), DATA, 0.5, "magnitude", progress=False).save(tmp_path / "out")
    other = load_pruned(drawn(perceptron), tmp_path / "out")
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_artifact_in_a_narrower_model(tmp_path: Path) -> None:
    model = perceptron()
    with torch.no_grad():
        model[0].weight[:4] *= 1e-9  # type: ignore[index]
    prune(model, DATA, 0.1, "magnitude", progress=False).save(tmp_path / "out")
    narrow = perceptron().half()
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    with pytest.raises(ValueError, match=r"'0.weight' would lose weights, which torch.float16 rounds to zero"):
        load_pruned(narrow, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())
    load_pruned(perceptron(), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="directory must be a path, got 3"):
        load_pruned(perceptron(), 3)  # type: ignore[arg-type]


def test_a_model_on_two_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].to("meta")
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        prune(model, TensorDataset(torch.randn(8, 4), torch.randint(2, (8,))), 0.5, progress=False)


def test_a_gpu_that_is_full_is_not_a_network_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another back end would take more, and other bits."""
    model, tried = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), []

    def full(*arguments: object, **named: object) -> None:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("swap_prune.fisher.capture.OutputGradients.fill_rows", full)
    data = TensorDataset(torch.randn(8, 4), torch.randint(2, (8,)))
    with pytest.raises(ValueError, match="OutOfMemoryError: CUDA out of memory"):
        prune(model, data, 0.5, "lr", progress=False)
    assert tried == [1]
