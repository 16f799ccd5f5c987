"""Networks, losses and data as strangers bring them: each either works, or is refused with a way out."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections import UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import random_unstructured, remove
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from swap_prune import LR, FineTune, TokenCrossEntropy, finetune, keep_masks, load_pruned, masks_of, plan, prune
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.network import aliasing
from swap_prune.samples.batches import batch_size
from swap_prune.schedule import keep_count
from swap_prune.selection import select_parameters
from tests.cases import blurred_classes, but_long, generator, trained

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


@pytest.mark.long
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
@pytest.mark.parametrize("wrap", but_long([nn.DataParallel, torch.compile]))
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
    with pytest.raises(ValueError, match=r"a path must be .* got 3"):
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

    monkeypatch.setattr("swap_prune.fisher.capture.rows.OutputGradients.fill_rows", full)
    data = TensorDataset(torch.randn(8, 4), torch.randint(2, (8,)))
    with pytest.raises(MemoryError, match=r"CUDA out of memory.*say with memory= how much"):
        prune(model, data, 0.5, "lr", progress=False)
    assert tried == [1]


def normalised() -> nn.Module:
    return drawn(lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))


def spoiled(value: float, at: int = -1) -> Tensor:
    inputs = INPUTS.clone()
    inputs[at, 3] = value
    return inputs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["data", "recalibration_data"])
def test_a_bad_sample_does_not_get_into_batchnorm(where: str, value: float) -> None:
    model = normalised()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = {"data": DATA, where: TensorDataset(spoiled(value), LABELS)}
    with pytest.raises(ValueError, match="NaN"):
        prune(model, sparsity=0.5, method="magnitude", progress=False, **data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("where", ["data", "recalibration_data"])
def test_what_is_no_data_is_refused_by_name(where: str) -> None:
    with pytest.raises(ValueError, match=rf"^{where} must be a Dataset or an iterable of batches .*, got a int"):
        prune(normalised(), sparsity=0.5, method="magnitude", progress=False, **{"data": DATA, where: 3})  # type: ignore[arg-type]


def own_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("inputs", "labels", "words"),
    [
        (spoiled(float("nan")), LABELS, "not finite"),
        (INPUTS, torch.cat([LABELS[:-1], torch.tensor([50])]), "labels out of range"),
    ],
)
@pytest.mark.parametrize("stages", [1, "auto"])
def test_a_bad_sample_among_those_held_out_is_refused(inputs: Tensor, labels: Tensor, words: str, stages: Any) -> None:
    """Every candidate would have the same loss, infinity, and nothing would be chosen."""
    batches = [(inputs[:40], labels[:40]), (inputs[40:], labels[40:])]
    order = batches if stages == 1 else batches[::-1]  # what is held out is drawn last, or first
    with pytest.raises(ValueError, match=words):
        prune(perceptron(), order, 0.5, "lr", stages=stages, samples=80 if stages == 1 else 20, progress=False)


def test_a_loss_of_ones_own_is_checked_on_what_is_held_out() -> None:
    with pytest.raises(ValueError, match="not finite on 1 of"):
        prune(perceptron(), [(spoiled(float("nan")), LABELS)], 0.5, "lr", loss_fn=own_loss, progress=False)


def test_a_model_without_values(tmp_path: Path) -> None:
    prune(perceptron(), DATA, 0.5, "magnitude", progress=False).save(tmp_path / "out")
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        load_pruned(perceptron().to("meta"), tmp_path / "out")
    with pytest.raises(ValueError, match="meta device"):
        prune(perceptron().to("meta"), DATA, 0.5, progress=False)


def test_an_artifact_is_written_into_a_directory_that_is_there(tmp_path: Path) -> None:
    """A mount point cannot be replaced, and its parent need not be writable."""
    model, there = perceptron(), tmp_path / "there"
    report = prune(model, DATA, 0.5, "magnitude", progress=False)
    there.mkdir()
    before = there.stat().st_ino
    (tmp_path / "link").symlink_to(there)
    report.save(tmp_path / "link")
    assert there.stat().st_ino == before and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in there.iterdir()) == ["report.json", "weights.safetensors"]
    load_pruned(perceptron(), there)
    with pytest.raises(ValueError, match="not empty"):
        report.save(there)


class Tied(nn.Module):
    """Two parameters over one memory."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False)
        both = torch.randn(96, generator=torch.Generator().manual_seed(0))
        self.down.weight.data = both[:48].view(6, 8)
        self.up.weight.data = both[:48].view(6, 8).T if transposed else both[48:].view(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(self.down(x).relu())
        return up


def test_parameters_that_share_memory() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[0]).square().mean(1)

    with pytest.raises(ValueError, match=r"'down.weight' and 'up.weight' share memory.*leave 'down.weight' out by"):
        prune(Tied(transposed=True), DATA, 0.5, "lr", loss_fn=loss, progress=False)
    with pytest.raises(ValueError, match=r"'down.weight' and 'up.weight' share memory"):  # which would be pruned too
        prune(Tied(transposed=True), DATA, 0.5, "lr", loss_fn=loss, ignore=["up.weight"], progress=False)
    model = perceptron()
    model.register_buffer("view", model[2].weight.detach()[1:])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"'2.weight' and 'view' share memory"):
        prune(model, DATA, 0.5, "magnitude", progress=False)
    prune(model, DATA, 0.5, "magnitude", ignore=["2"], progress=False)
    model = perceptron()
    model.register_buffer("same", model[2].weight)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"'2.weight' and 'same' share memory"):  # buffers are given back
        prune(model, DATA, 0.5, "magnitude", progress=False)
    report = prune(Tied(transposed=False), DATA, 0.5, "lr", loss_fn=loss, progress=False)
    assert report.kept == 48 and report.layers["down.weight"].kept + report.layers["up.weight"].kept == 48


def test_parameters_of_one_flat_buffer_are_compared_with_their_neighbours_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(200)))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    overlap, compared = aliasing._overlap, 0

    def counted(one: Tensor, other: Tensor) -> bool:
        nonlocal compared
        compared += 1
        return overlap(one, other)

    monkeypatch.setattr(aliasing, "_overlap", counted)
    assert len(select_parameters(model).names) == 200 and compared == 0
    base, views = torch.zeros(60), {}
    for number in range(40):  # some of them every second or third number
        start, step = int(torch.randint(40, (), generator=generator(number))), 1 + number % 3
        views[str(number)] = base[start : start + 1 + number % 9 : step]
    expected = {(a, b) for a, b in itertools.combinations(views, 2) if overlap(views[a], views[b])}
    found = list(aliasing._overlapping(list(views.items()), views))
    assert {tuple(sorted(pair, key=int)) for pair in found} == expected and len(found) == len(expected) > 20
    assert compared < len(views) ** 2 / 4
    compared = 0
    assert {pair for pair in aliasing._overlapping(list(views.items()), ["3"])} == {p for p in found if "3" in p}
    assert compared < 40, "buffers that share memory with each other alone are none of our business"


def test_masks_of_torch_are_to_be_made_permanent_first() -> None:
    model = perceptron()
    random_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"'weight' of '0' .* mask .*torch.nn.utils.prune.remove\(module, 'weight'\)"):
        prune(model, DATA, 0.5, "magnitude", progress=False)
    remove(model[0], "weight")  # type: ignore[index]
    report = prune(model, DATA, 0.5, "magnitude", progress=False)
    assert sum(int(p.count_nonzero()) for p in (model[0].weight, model[2].weight)) == report.kept == 88  # type: ignore


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_whole_dtype(dtype: torch.dtype) -> None:
    usual, other = perceptron(), perceptron()
    prune(usual, DATA, 0.5, "lr", progress=False)
    prune(other, TensorDataset(INPUTS, LABELS.to(dtype)), 0.5, "lr", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), other.parameters(), strict=True))


def test_labels_as_probabilities_of_another_precision() -> None:
    shares = functional.one_hot(LABELS, 3).double() * 0.9 + 0.1 / 3
    report = prune(perceptron(), TensorDataset(INPUTS, shares), 0.5, "lr", progress=False)
    assert report.kept == 88


def test_probabilities_of_positions_are_refused() -> None:
    model = drawn(lambda: nn.Conv2d(3, 2, 1))
    data = TensorDataset(torch.randn(8, 3, 4, 4), torch.full((8, 2, 4, 4), 0.5))
    with pytest.raises(ValueError, match=r"probabilities of 2 classes, \(n, 2\)"):
        prune(model, data, 0.5, "lr", progress=False)


@dataclass
class Record:
    inputs: Tensor
    labels: Tensor


class Opaque:
    """A batch without tensors in sight."""

    def __init__(self, *parts: Tensor) -> None:
        self.inputs, self.labels = parts


@pytest.mark.parametrize("kind", [Record, Opaque])
def test_batches_as_objects(kind: Any) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch.inputs), batch.labels, reduction="none")

    batches = [kind(INPUTS[i : i + 20], LABELS[i : i + 20]) for i in (0, 20, 40, 60)]
    model = normalised()
    report = prune(model, batches, 0.5, "lr", loss_fn=loss, samples=40, progress=False)
    assert not any("BatchNorm" in note for note in report.notes)
    assert float(model[1].running_mean.abs().sum()) > 0, "recalibrated"  # type: ignore[operator, union-attr]
    if kind is Record:
        assert report.stages[0].samples == 40
        plain = normalised()
        prune(
            plain,
            [(one.inputs, one.labels) for one in batches],
            0.5,
            "lr",
            loss_fn=own_loss,
            samples=40,
            progress=False,
        )
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


class Neighbours(nn.Module):
    """Mixes the entries of a sample by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(8).to_sparse())
        self.net = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(torch.sparse.mm(self.adjacency, x.T).T)
        return y


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("finetune", [None, FineTune(epochs=1, batch_size=16)])
def test_a_sparse_buffer(tmp_path: Path, finetune: FineTune | None) -> None:
    report = prune(drawn(Neighbours), DATA, 0.5, "lr", finetune=finetune, progress=False)
    assert report.kept == 12
    with pytest.raises(ValueError, match=r"more than dense tensors.*'adjacency'"):
        report.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_as_numbers_of_numpy() -> None:
    method = LR(ridge=np.float32(0.25), iterations=np.int64(3))
    report = prune(
        perceptron(), DATA, np.float64(0.5), method, min_keep=np.float32(0.125), stages=np.int64(2), progress=False
    )
    assert report.kept == 88 and len(report.stages) == 2
    assert json.loads(json.dumps(report.to_dict()))["settings"]["method"]["ridge"] == 0.25
    with pytest.raises(ValueError, match="seed must be below"):
        finetune(perceptron(), DATA, seed=2**63)
    model = perceptron()
    prune(model, DATA, 0.5, "magnitude", progress=False)
    finetune(model, DATA, FineTune(epochs=np.int64(1), lr=np.float32(0.01)), seed=np.int64(1), progress=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["wanda", "lr"])
def test_a_compiled_network_runs_as_it_was_written(method: str) -> None:
    usual, wrapped = normalised(), torch.compile(normalised(), backend="eager")
    wrapped.eval()(INPUTS)
    prune(usual, DATA, 0.5, method, progress=False)
    prune(wrapped, DATA, 0.5, method, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), wrapped.parameters(), strict=True))


def test_training_in_inference_mode() -> None:
    model = perceptron()
    prune(model, DATA, 0.5, "magnitude", progress=False)
    with torch.inference_mode():
        report = finetune(model, DATA, FineTune(epochs=1), progress=False)
    assert report.steps == 1


NARROW = [(INPUTS[:40], LABELS[:40]), (INPUTS[40:, :7], LABELS[40:])]
NUMBERED = [(INPUTS[:40], LABELS[:40]), (INPUTS[40:], LABELS[40:] + 50)]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "lr", "woodfisher"])
@pytest.mark.parametrize("make", [perceptron, normalised])
def test_a_later_batch_of_another_shape(method: str, make: Callable[[], nn.Module]) -> None:
    if method == "magnitude" and make is perceptron:
        return  # it looks at no batch
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"failed on a .*batch .*\(tensor \(\d+, 7\)|shapes"):
        prune(model, NARROW, 0.5, method, samples=80, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("batches", [NARROW, NUMBERED])
def test_a_later_batch_that_cannot_be_trained_on(batches: list[tuple[Tensor, Tensor]]) -> None:
    model = perceptron()
    prune(model, DATA, 0.5, "magnitude", progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"failed on a training batch \(tensor \(40, [78]\)"):
        finetune(model, batches, FineTune(epochs=1), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_that_cannot_be_trained_or_computed_with() -> None:
    frozen = perceptron().requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="nothing to train"):
        prune(frozen, DATA, 0.5, "magnitude", finetune=FineTune(), progress=False)
    narrow = perceptron()
    narrow[0].weight = nn.Parameter(narrow[0].weight.detach().to(torch.float8_e4m3fn))  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"'0.weight' is float8_e4m3fn.*before quantising"):
        prune(narrow, DATA, 0.5, "magnitude", progress=False)


def test_a_method_that_states_no_fields_and_a_step_that_is_too_long() -> None:
    class Bare:
        name, needs_gradients, needs_inputs, needs_held_out = "bare", False, False, False

        def solve(self, problem: object, generator: object) -> None: ...

    with pytest.raises(ValueError, match="Bare must be a dataclass"):
        prune(perceptron(), DATA, 0.5, Bare(), progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr of fine-tuning must be a finite number"):
        FineTune(lr=1e39)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = x.unsqueeze(1) * torch.linspace(0, 1, 5).view(1, 5, 1)
        y: Tensor = self.head(self.mix(z, z, z, need_weights=False)[0].mean(1))
        return y


def test_attention_prunes_without_a_word_of_torchs_own() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert prune(drawn(Attending), DATA, 0.5, "obd", progress=False).kept == 44
    assert not [str(one.message) for one in said]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def pairs(n: int = 32) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return [(inputs, inputs[:, :3].argmax(1))]


@pytest.mark.parametrize("call", [prune, finetune])
def test_a_device_without_values_is_refused_and_the_model_stays(call: Any) -> None:
    model = small()
    arguments = {"sparsity": 0.5} if call is prune else {"masks": {}}
    with pytest.raises(ValueError, match="device 'meta' cannot be used"):
        call(model, pairs(), device="meta", progress=False, **arguments)
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("scale", [1e-19, 1e-22, 1e-25, 1e-40])
def test_swaps_of_weights_that_are_next_to_nothing_come_to_an_end(scale: float) -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    assert prune(model, pairs(), 0.5, "cbs", progress=False).kept == 180


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which compiling imports
@pytest.mark.parametrize("wrap", but_long([nn.DataParallel, torch.compile]))
@pytest.mark.parametrize("written", ["plain", "wrapped"])
def test_what_a_wrapper_puts_before_names_may_be_in_the_file_or_in_the_model(
    wrap: Any, written: str, tmp_path: Path
) -> None:
    plain, wrapped = small(), wrap(small())
    first, second = (plain, wrapped) if written == "plain" else (wrapped, plain)
    prune(first, pairs(), 0.5, "magnitude", progress=False).save(tmp_path / "pruned")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    load_pruned(second, tmp_path / "pruned")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


def test_one_sample_has_no_statistics_and_rows_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    report = prune(model, pairs(1), 0.5, "lr", progress=False)
    assert report.kept == 36 and report.stages[0].evidence["not_recalibrated"]


@pytest.mark.parametrize("noise", [None, "labels+adversarial+gradient", "analog+poison+input"])
@pytest.mark.parametrize("method", but_long(["ewr", "cbs", "sparsegpt"], short=["cbs", "sparsegpt"]))
def test_the_default_device_of_torch_is_not_where_numbers_are_drawn(method: str, noise: str | None) -> None:
    model, other = perceptron(), perceptron()
    with torch.device("meta"):
        prune(model, DATA, 0.5, method, samples=32, stages=2, noise=noise, progress=False)
    prune(other, DATA, 0.5, method, samples=32, stages=2, noise=noise, progress=False)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_need_of_memory_is_that_of_the_run_whatever_is_set_around(around: Callable[[], Any]) -> None:
    model = drawn(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 3)))
    images = TensorDataset(torch.randn(40, 3, 32, 32, generator=GENERATOR), torch.arange(40) % 3)
    expected = plan(model, images, samples=30, memory="8GB").forecasts
    with around():
        found = plan(model, images, samples=30, memory="8GB").forecasts
    for one, other in zip(found, expected, strict=True):  # beyond what the process holds already
        needs = [max(sizes) - min(sizes) for sizes in (one.phases.values(), other.phases.values())]
        assert needs[0] == needs[1] > 0, one.name


def test_sparse_inputs_are_refused_in_words() -> None:
    ((inputs, labels),) = pairs()
    with pytest.raises(ValueError, match=r"a batch holds a sparse tensor .* give a dense one"):
        prune(small(), [(inputs.to_sparse(), labels)], 0.5, "lr", progress=False)


def test_packed_sequences_are_refused_in_words() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 6) for n in (4, 3, 1)])
    with pytest.raises(ValueError, match=r"holds a PackedSequence, .* padded"):
        prune(small(), [(packed, torch.zeros(3).long())], 0.5, "lr", progress=False)


def test_an_expanded_buffer_does_not_stand_in_the_way_of_the_message() -> None:
    model = small()
    model.register_buffer("scale", torch.ones(1).expand(6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="fine-tuning diverged"):
        finetune(model, pairs(), FineTune(lr=1e30, epochs=3), masks={}, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_are_a_mapping() -> None:
    with pytest.raises(ValueError, match="masks must map names of parameters to boolean tensors, got a list"):
        finetune(small(), pairs(), masks=[1], progress=False)  # type: ignore[arg-type]


class Twice(nn.Module):
    """Layers as attributes and in a Sequential, and a block that is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.again = nn.ModuleList([nn.Linear(8, 8)] * 3)
        self.net = nn.Sequential(self.first, self.norm, nn.ReLU(), *self.again, self.last)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs


class Once(Twice):
    """The same network, each module with one name."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        outputs: Tensor = self.last(self.again[0](self.again[0](self.again[0](x))))
        return outputs


def told_by_the_first(n: int = 200) -> TensorDataset:
    x = torch.randn(n, 10, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, 0] > 0).long())


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"storage": "matrix-free"}, marks=pytest.mark.long),
        {"finetune": FineTune(epochs=1)},
        {"stages": 2},
    ],
)
@pytest.mark.parametrize("method", ["lr", "obd"])
def test_modules_of_two_names(method: str, options: dict[str, Any]) -> None:
    models = []
    for kind in (Once, Twice):
        torch.manual_seed(0)
        model = kind()
        before = dict(model.named_parameters())
        given = {name: (id(p), p.requires_grad) for name, p in before.items()}
        report = prune(model, told_by_the_first(), 0.5, method, samples=64, progress=False, **options)
        assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == given
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())
        assert report.kept == report.total // 2 == sum(int((p != 0).sum()) for p in before.values() if p.ndim == 2)
        assert not any("weights kept are zero" in note for note in report.notes)
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), "the same network"


class Counting(nn.Module):
    """Writes to one buffer, replaces another, and resizes a third whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 2)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("sizes", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.calls = self.calls + 1
        self.sizes.resize_(len(self.sizes) + 1)
        outputs: Tensor = self.layer(x)
        return outputs


def test_buffers_that_a_network_changes_when_it_is_called_are_given_back() -> None:
    x, y = told_by_the_first().tensors
    for labels, fails in ((y, False), (y + 5, True)):
        model = Counting()
        buffers = dict(model.named_buffers())
        if fails:
            with pytest.raises(ValueError, match="label"):
                prune(model, TensorDataset(x, labels), 0.5, "lr", samples=64, progress=False)
        else:
            prune(model, TensorDataset(x, labels), 0.5, "lr", samples=64, progress=False)
        assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
        assert (int(model.seen), int(model.calls), model.sizes.tolist()) == (0, 0, [0.0])


def test_a_loss_that_fails_with_weights_that_were_tried_says_so_in_a_line() -> None:
    x, _ = told_by_the_first().tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2, bias=False))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not bool(model[0].weight.all()):
            raise RuntimeError("the scale must be positive\nbut is\ntensor(0)")
        return (model(batch[0]) - batch[1]).square().sum(1)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"with weights that pruning tried \(RuntimeError: the scale must") as caught:
        prune(model, TensorDataset(x, x[:, :2]), 0.9, "lr", loss_fn=loss, samples=64, progress=False)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Proud(nn.Module):
    """Refuses to work without any weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        if not bool(outputs.any()):
            raise RuntimeError("dead network")
        return outputs


def test_a_network_need_not_work_without_any_weight() -> None:
    report = prune(Proud(), told_by_the_first(), 0.5, "lr", samples=64, progress=False)
    assert report.kept == 10


def test_what_is_no_network_no_path_or_has_no_shape_is_refused_in_words(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(10, 2)), told_by_the_first()
    report = prune(model, x, 0.5, "magnitude", progress=False)
    report.save(tmp_path / "saved")
    for call in (
        lambda: prune(model, x, 0.5, "lr", scratch=5, samples=64, progress=False),  # type: ignore[arg-type]
        lambda: report.save(5),  # type: ignore[arg-type]
        lambda: report.save(""),
        lambda: load_pruned(model, None),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="a path must be"):
            call()
    for call in (
        lambda: load_pruned(None, tmp_path / "saved"),  # type: ignore[arg-type]
        lambda: finetune(None, x, progress=False),  # type: ignore[arg-type]
        lambda: masks_of(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got a NoneType"):
            call()
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialised"):
        load_pruned(nn.Sequential(nn.LazyLinear(2)), tmp_path / "saved")


def test_an_expanded_parameter_is_refused_by_its_name() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))
    model[0].weight = nn.Parameter(torch.randn(1, 10).expand(20, 10))
    with pytest.raises(ValueError, match=r"'0.weight' was expanded.*ignore=\['0.weight'\]"):
        prune(model, told_by_the_first(), 0.5, "magnitude", progress=False)
    assert prune(model, told_by_the_first(), 0.5, "magnitude", ignore=["0.weight"], progress=False).kept == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_are_a_valueerror_with_workers_and_without(workers: int) -> None:
    class Missing(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            if index == 77:
                raise FileNotFoundError("no such file: 77.jpg")
            return super().__getitem__(index)

    loader = DataLoader(Missing(*told_by_the_first().tensors), batch_size=16, num_workers=workers)
    model = nn.Sequential(nn.Linear(10, 2))
    with pytest.raises(ValueError, match=r"the calibration data failed.*no such file: 77\.jpg"):
        prune(model, loader, 0.5, "lr", samples=200, progress=False)


def test_inputs_and_targets_of_another_number() -> None:
    x, y = told_by_the_first().tensors
    with pytest.raises(ValueError, match=r"there are 79 targets and 80 inputs\. Samples are the first dimension"):
        prune(nn.Sequential(nn.Linear(10, 2)), [(x[:80], y[:79])], 0.5, "lr", progress=False)


def test_a_report_names_large_layers_that_were_left_alone() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look, self.read, self.head = nn.Embedding(50, 10), nn.GRU(10, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.read(self.look(x))[0][:, -1])
            return outputs

    data = TensorDataset(torch.randint(50, (40, 5)), torch.randint(2, (40,)))
    weights = 3 * 8 * 10 + 3 * 8 * 8
    report = prune(Tagger(), data, 0.5, "magnitude", progress=False)
    share = round(100 * weights / (weights + 16))
    assert report.notes == [
        f"{weights} weights, {share} % of all, were left alone: targets does not name their layers (GRU)"
    ]
    for options in ({"targets": ["Linear"]}, {"ignore": ["GRU"]}, {"targets": ["Linear", "GRU"]}):
        assert prune(Tagger(), data, 0.5, "magnitude", progress=False, **options).notes == []  # type: ignore[arg-type]


class Amp(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("around", [False, True], ids=["alone", "within another"])
@pytest.mark.parametrize("inside", ["the network", "the loss"])
def test_autocast_within_a_network_sees_the_weights_that_are_tried(inside: str, around: bool) -> None:
    def network() -> nn.Module:
        return drawn(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside == "the loss"):
            return functional.cross_entropy(model(batch[0]), batch[1], reduction="none").float()

    data = TensorDataset(INPUTS, network()(INPUTS).argmax(1))
    plain, cast = network(), network()
    options: dict[str, Any] = {"loss_fn": loss, "samples": 100, "finetune": FineTune(epochs=2), "progress": False}
    expected = prune(plain, data, 0.8, "lr", **options | {"loss_fn": None, "finetune": options["finetune"]})
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        found = prune(Amp(cast) if inside == "the network" else cast, data, 0.8, "lr", **options)
        assert torch.is_autocast_enabled("cpu") == around
    first, second = (report.stages[0].evidence for report in (expected, found))
    losses = [one["held_out_loss"] for one in second["candidates"]]
    assert len(set(losses)) > 1, "not those of one network"
    assert second["finetune_loss"][0] > 0.05 and first["finetune_loss"][0] > 0.05
    assert torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(INPUTS[i], LABELS[i]) for i in range(80)], r"gives single samples, .*DataLoader\(data, batch_size=64\)"),
        ([(INPUTS[i], int(LABELS[i])) for i in range(80)], "gives single samples"),
        (TensorDataset(INPUTS, functional.one_hot(LABELS, 3)), r"one-hot, or of several labels: .*argmax\(1\)"),
        (TensorDataset(INPUTS, LABELS[:, None]), r"as a column: take targets.squeeze\(1\)"),
        (None, "got None, and method 'ewr' reads it"),
    ],
)
def test_data_that_nearly_fit(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(perceptron(), data, 0.5, samples=32, progress=False)


def test_methods_without_data_need_none() -> None:
    assert prune(perceptron(), None, 0.5, "magnitude", stages=2, progress=False).sparsity == 0.5
    normalised = drawn(lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)))
    with pytest.raises(ValueError, match="got None, and recalibrate_batchnorm reads it"):
        prune(normalised, None, 0.5, "magnitude", progress=False)
    with pytest.raises(ValueError, match="got None, and finetune reads it"):
        prune(perceptron(), None, 0.5, "magnitude", finetune=FineTune(epochs=1), progress=False)
    with pytest.raises(ValueError, match="got None, and stages='auto' reads it"):
        prune(perceptron(), None, 0.5, "magnitude", stages="auto", progress=False)
    prune(normalised, None, 0.5, "magnitude", recalibration_data=DATA, progress=False)
    prune(normalised, None, 0.75, "magnitude", recalibrate_batchnorm=False, progress=False)


def test_batches_that_a_collate_function_unpacks_are_taken_as_they_come() -> None:
    """As of data sets that hold whole batches: ``batch_size=1`` and a collate function that takes the first."""
    seen: list[int] = []

    class Batches(Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return INPUTS[8 * index : 8 * index + 8], LABELS[8 * index : 8 * index + 8]

    def first(items: list[Any]) -> Any:
        seen.append(len(items))
        return items[0]

    loader = DataLoader(Batches(), batch_size=1, shuffle=True, collate_fn=first)
    report = prune(perceptron(), loader, 0.5, "lr", samples=40, progress=False)
    assert report.stages[0].samples == 40 and not report.notes and set(seen) == {1}


def test_a_collate_function_gets_no_more_than_a_batch_of_the_loader() -> None:
    seen: list[int] = []

    def strict(items: list[Any]) -> Any:
        seen.append(len(items))
        return default_collate(items)

    loader = DataLoader(DATA, batch_size=6, shuffle=True, collate_fn=strict)
    assert prune(perceptron(), loader, 0.5, "lr", samples=40, progress=False).stages[0].samples == 40
    assert max(seen) == 6


def test_data_in_the_order_of_their_classes_are_noted() -> None:
    def network() -> nn.Module:
        return drawn(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10)))

    labels = torch.arange(80) // 8
    batches = [(INPUTS[i : i + 8], labels[i : i + 8]) for i in range(0, 80, 8)]
    note = "the 24 calibration labels are of 3 of 10 classes: data that are read in order should be shuffled"
    report = prune(network(), batches, 0.5, "lr", samples=24, progress=False)
    assert any(text.startswith(note) for text in report.notes)
    report = prune(network(), TensorDataset(INPUTS, labels), 0.5, "lr", samples=24, progress=False)
    assert not any("classes" in text for text in report.notes)


def test_frozen_layers_are_noted() -> None:
    model = perceptron()
    model[0].requires_grad_(False)
    note = "parameters that require no gradient were pruned too (0.weight): ignore= leaves them alone"
    assert note in prune(model, DATA, 0.5, "lr", samples=32, progress=False).notes
    assert note not in prune(model, DATA, 0.6, "lr", samples=32, ignore=["0"], progress=False).notes
    model.requires_grad_(False)  # a network that is only used
    assert note not in prune(model, DATA, 0.7, "lr", samples=32, progress=False).notes


def test_errors_of_the_callers_own_code_say_on_what() -> None:
    def strict(net: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) < 5:
            raise ValueError("five at least")
        return functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    words = r"failed on a cut of 2 of the \d+ samples of a batch, .*: ValueError: five at least"
    with pytest.raises(ValueError, match=words):
        prune(perceptron(), DATA, 0.5, "lr", samples=32, loss_fn=strict, progress=False)
    with pytest.raises(ValueError, match="for a loss module or function L"):
        prune(perceptron(), DATA, 0.5, "lr", samples=32, loss_fn=functional.mse_loss, progress=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_have_lost_their_classes() -> None:
    for made in (torch.jit.script(perceptron()), torch.jit.trace(perceptron(), INPUTS[:2])):
        with pytest.raises(ValueError, match="a scripted or traced model cannot be pruned: prune the one that it was"):
            prune(made, DATA, 0.5, "magnitude", progress=False)
    exported = torch.export.export(perceptron(), (INPUTS[:2],)).module()
    with pytest.raises(ValueError, match="an exported graph has lost its classes: prune before"):
        prune(exported, DATA, 0.5, "magnitude", progress=False)


def test_a_layer_may_be_kept_whole() -> None:
    report = prune(perceptron(), DATA, 0.5, "lr", samples=32, min_keep={"2": 1.0}, progress=False)
    assert report.layers["2.weight"].sparsity == 0 and report.sparsity == pytest.approx(0.5, abs=0.01)


class Squared:
    """The squared error, with a divergence that is wrong on demand."""

    def __init__(self, wrong: Callable[[Tensor], Tensor] = lambda divergence: divergence) -> None:
        self.wrong = wrong

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.losses(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch[1][:, None]).square().sum(1)

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        return signs

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        return self.wrong((outputs - teacher).square().sum(1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda divergence: -divergence, "must grow as outputs leave the teacher's, .* check its sign"),
        (lambda divergence: divergence.mean(), r"must return one value a sample, \(n,\), got \(\)"),
        (lambda divergence: 1.0, r"must return one value a sample, \(n,\), got float"),
        (
            lambda divergence: divergence / divergence,
            "not finite on 32 of 32 samples, .*: take differences of log_softmax",
        ),
    ],
)
def test_a_divergence_that_is_none_is_refused(wrong: Callable[[Tensor], Tensor], words: str) -> None:
    prune(perceptron(), DATA, 0.5, "lr", samples=32, loss_fn=Squared(), progress=False)
    with pytest.raises(ValueError, match=words):
        prune(perceptron(), DATA, 0.5, "lr", samples=32, loss_fn=Squared(wrong), progress=False)


def test_a_handful_of_samples_is_noted() -> None:
    for samples, noted in ((8, True), (48, False)):
        report = prune(perceptron(), DATA, 0.5, "lr", samples=samples, progress=False)
        assert any("are too few to choose settings by" in note for note in report.notes) == noted


class Altering(nn.Module):
    """Normalises its inputs where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x.sub_(1.0).div_(2.0))
        return outputs


@pytest.mark.parametrize("call", [prune, finetune])
def test_a_network_that_writes_to_its_inputs_is_refused_and_they_stay(call: Callable[..., Any]) -> None:
    inputs = INPUTS.clone()
    model = Altering()
    masks = {"masks": {"inner.0.weight": torch.ones(16, 8, dtype=torch.bool)}} if call is finetune else {}
    with pytest.raises(ValueError, match="changes its inputs in place"):
        call(model, [(inputs, LABELS)], **masks, progress=False)
    assert torch.equal(inputs, INPUTS)


class Listed(nn.Module):
    """Reads one weight from a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)
        self.kept = [self.second.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ self.kept[0].T


def test_a_weight_that_is_not_read_from_its_module_is_refused_unless_left_out() -> None:
    model = drawn(Listed)
    for method in ("lr", "obd"):
        with pytest.raises(ValueError, match="does not read all selected weights from the modules"):
            prune(model, DATA, 0.5, method, samples=32, progress=False)
    report = prune(model, DATA, 0.5, "obd", samples=32, progress=False, ignore=["second"])
    assert report.kept == 64


def test_rows_are_compared_where_there_are_gradients() -> None:
    """A weight that is used twice, once outside its layer, and a loss that is zero for nearly all samples."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(torch.tanh(self.layer(x)), self.layer.weight.T)

    def hinge(model: nn.Module, batch: Any) -> Tensor:
        return functional.relu(model(batch[0])[:, 0] - batch[1])

    model = drawn(Tied)
    with torch.no_grad():
        limits = torch.full((80,), 100.0)
        limits[60:] = model(INPUTS[60:])[:, 0] - 1
    batches, selection = [(INPUTS, limits)], select_parameters(model)
    rows = capture_gradients(model, selection, batches, hinge)
    expected = capture_gradients(model, selection, batches, hinge, backend="loop")
    torch.testing.assert_close(rows.factor.row_span(0, 80), expected.factor.row_span(0, 80))
    assert rows.backend == "hooks"


def test_losses_that_mix_many_samples_are_refused_though_two_alone_do_not_show_it() -> None:
    def contrastive(model: nn.Module, batch: Any) -> Tensor:
        z = functional.normalize(model(batch[0]), dim=1)
        return functional.cross_entropy(100 * z @ z.T, torch.arange(len(z)), reduction="none")

    model = nn.Sequential(nn.Linear(8, 3, bias=False))
    apart = torch.cat([torch.eye(8)[:2] * 9, INPUTS[2:40]])
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3, 8))
    with pytest.raises(ValueError, match="depends on the others in its batch"):
        prune(model, [(apart, LABELS[:40])], 0.5, "obd", loss_fn=contrastive, samples=40, progress=False)


def test_zeros_that_named_targets_leave_out_are_not_lost() -> None:
    model = drawn(lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 3)))
    prune(model, DATA, 0.5, "magnitude", progress=False)
    with pytest.raises(ValueError, match="hold zeros too"):
        finetune(model, DATA, targets=["Linear"], progress=False)


def test_an_artifact_of_complex_numbers_is_read_back(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = perceptron()
        model.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))
        return model

    model = made()
    model.phase += 1j  # type: ignore[operator]
    prune(model, DATA, 0.5, "magnitude", progress=False).save(tmp_path / "out")
    assert torch.equal(load_pruned(made(), tmp_path / "out").phase, model.phase)  # type: ignore[arg-type]


def test_gradients_that_are_all_zero_are_noted() -> None:
    report = prune(perceptron(), DATA, 0.5, "obd", samples=32, loss_fn=vanishing, progress=False)
    assert any(note.startswith("all gradients of the calibration samples are zero") for note in report.notes)
    assert not any(
        "are zero" in note for note in prune(perceptron(), DATA, 0.5, "obd", samples=32, progress=False).notes
    )


def vanishing(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).sum(1) * 0


@pytest.mark.long
def test_layers_may_be_in_any_unit() -> None:
    """The same network, its first layer in thousandths and its last in thousands, is pruned about as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, y = blurred_classes(1200)
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        trained(model, x, y, 300)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight *= 1e-3
        other[0].bias *= 1e-3
        other[2].bias *= 1e-3
        other[4].weight *= 1e3
        torch.testing.assert_close(other(x), model(x), rtol=1e-3, atol=1e-3)
    losses = []
    for network in (model, other):
        prune(network, TensorDataset(x[:600], y[:600]), 0.9, "lr", samples=300, progress=False)
        with torch.no_grad():
            losses.append(float(functional.cross_entropy(network(x[600:]), y[600:])))
    assert losses[1] < losses[0] + 0.03


class Watched(nn.Module):
    """Has a layer that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        self.unused(hidden.detach())
        return self.last(hidden)


@pytest.mark.parametrize("method", ["lr", "ewr", "obd"])
@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_zeros_are_as_many_as_asked_for_where_no_gradient_reaches_a_layer(method: str, sparsity: float) -> None:
    """What an earlier stage has removed of such a layer stays zero, and is not kept in the place of other weights."""
    report = prune(drawn(Watched), DATA, sparsity, method, samples=60, stages=4, progress=False)
    total = 8 * 16 + 16 * 32 + 16 * 3
    assert (report.total, report.kept) == (total, int(total * (1 - sparsity)))
    assert [note for note in report.notes if "zero" in note] == []


class UnitRows(nn.Linear):
    """Divides each row of its weight by its length, which may be none."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


@pytest.mark.parametrize(("method", "noted"), [("obd", True), ("lr", True), ("lr", False)])
def test_a_network_that_gives_no_number_any_more_is_noted(method: str, *, noted: bool) -> None:
    model = drawn(lambda: nn.Sequential(UnitRows(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    targets, sparsity = (["UnitRows"], 0.9) if noted else (["2"], 0.5)
    notes = prune(model, DATA, sparsity, method, targets=targets, samples=60, progress=False).notes
    said = [note for note in notes if note.startswith("the pruned network gives no finite loss")]
    assert len(said) == noted
    assert bool(model(INPUTS).isfinite().all()) != noted


class Graph:
    """A sample whose length is that of its fields, as a record is indexed by name."""

    def __init__(self, values: Tensor, label: Tensor) -> None:
        self.values, self.label = values, label

    def __len__(self) -> int:
        return 3

    def keys(self) -> list[str]:
        return ["values", "label", "edges"]

    def __getitem__(self, name: str) -> Tensor:
        return {"values": self.values, "label": self.label}[name]


class Frame(Graph):
    """A table, whose length is that of its rows."""

    def __len__(self) -> int:
        return len(self.label)


def test_a_table_counts_as_its_rows() -> None:
    def loss(model: nn.Module, frame: Frame) -> Tensor:
        return functional.cross_entropy(model(frame["values"]), frame["label"], reduction="none")

    frames = [Frame(INPUTS[i : i + 8], LABELS[i : i + 8]) for i in range(0, 80, 8)]
    report = prune(perceptron(), frames, 0.5, "obd", loss_fn=loss, samples=40, progress=False)
    assert report.stages[0].samples == 40


def test_a_length_that_is_that_of_fields_is_not_counted() -> None:
    words = defaultdict(list, text=["a", "b", "c"], label=[0, 1, 2])
    assert batch_size(words) == 1 and set(words) == {"text", "label"}


def test_objects_that_are_indexed_by_name_are_one_sample_each() -> None:
    def loss(model: nn.Module, graph: Graph) -> Tensor:
        return functional.cross_entropy(model(graph["values"])[None], graph["label"][None], reduction="none")

    graphs = [Graph(*DATA[i]) for i in range(80)]
    report = prune(perceptron(), graphs, 0.5, "obd", loss_fn=loss, samples=50, progress=False)
    assert report.stages[0].samples == 50 and report.notes == []


def test_what_fails_on_a_whole_batch_is_not_laid_to_its_cutting() -> None:
    def mistyped(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch[0]).loggits, batch[1], reduction="none")

    words = r"^the loss failed on a calibration batch .*: AttributeError: 'Tensor' object has no attribute 'loggits'"
    with pytest.raises(ValueError, match=words) as refused:
        prune(perceptron(), DATA, 0.5, loss_fn=mistyped, samples=32, progress=False)
    assert "cut" not in str(refused.value)


class Experts(nn.Module):
    """A stack of matrices, (experts, outputs, inputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.last = nn.Parameter(torch.randn(2, 16, 8)), nn.Linear(16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(inputs @ self.stack.sum(0).T))


def test_a_pattern_in_a_stack_of_matrices_is_noted() -> None:
    notes = {
        targets: prune(drawn(Experts), DATA, 0.5, "magnitude", targets=targets, pattern="2:4", progress=False).notes
        for targets in (("Experts",), ("last",))
    }
    assert notes["last",] == []
    assert [note.partition(":")[0] for note in notes["Experts",]] == ["pattern 2"]
    assert "runs along the second of three dimensions of stack: leave them out" in notes["Experts",][0]


class Conv1D(nn.Module):
    """A linear layer as transformers has it for GPT-2: its weight is (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight = 8, nn.Parameter(torch.randn(8, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


def test_a_pattern_along_outputs_is_noted() -> None:
    def network() -> nn.Module:
        return nn.Sequential(Conv1D(), nn.ReLU(), nn.Linear(8, 4))

    report = prune(drawn(network), DATA, 0.5, "magnitude", targets=("Conv1D",), pattern="2:4", progress=False)
    assert any(note.startswith("pattern 2:4 runs along the outputs of 0.weight, their second") for note in report.notes)
    others = prune(drawn(network), DATA, 0.5, "magnitude", pattern="2:4", progress=False).notes
    assert not any("pattern" in note for note in others)


def test_gradients_that_only_training_would_have_are_refused() -> None:
    """A reentrant checkpoint behind a layer that is not selected gives what is in it gradients only in training."""

    class Hidden(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.embed, self.body, self.last = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.reentrant = reentrant

        def forward(self, words: Tensor) -> Tensor:
            seen = self.embed(words).mean(1)
            inner = checkpoint(lambda x: torch.relu(self.body(x)), seen, use_reentrant=self.reentrant)
            return self.last(inner)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    data = TensorDataset(torch.randint(20, (60, 5)), torch.randint(4, (60,)))
    for method in ("obd", "lr"):
        model = drawn(lambda: Hidden(reentrant=True))
        before = copy.deepcopy(model.state_dict())
        with (
            pytest.raises(ValueError, match=r"'body.weight' would get gradients in training.*use_reentrant=False"),
            warnings.catch_warnings(action="ignore"),  # torch's own, that no input requires a gradient
        ):
            prune(model, data, 0.5, method, samples=32, progress=False)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        report = prune(drawn(lambda: Hidden(reentrant=False)), data, 0.5, method, samples=32, progress=False)
        assert not any("no gradient" in note for note in report.notes)


@pytest.mark.parametrize("method", ["obd", "lr"])
def test_gradients_of_what_else_a_loss_trains_are_left_alone(method: str) -> None:
    """A loss with a parameter of its own, which an optimiser steps when it has its gradient; and an idle layer."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)  # type: ignore[no-any-return]

    scale = nn.Parameter(torch.ones(()))
    scale.register_post_accumulate_grad_hook(lambda parameter: parameter.data.add_(1))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return functional.cross_entropy(scale * model(batch[0]), batch[1], reduction="none")

    report = prune(drawn(Idle), DATA, 0.5, method, loss_fn=loss, samples=32, progress=False)
    assert any(note.startswith("no gradient reaches idle.weight") for note in report.notes)
    assert scale.grad is None and float(scale.detach()) == 1


def test_parameters_of_one_dimension_have_to_be_named() -> None:
    words = "targets pattern '1' matches no parameter of two dimensions: name others, such as '1.bias'"
    with pytest.raises(ValueError, match=words):
        prune(nn.Sequential(nn.Linear(8, 3), nn.LayerNorm(3)), DATA, 0.5, targets="1", progress=False)


def test_a_model_that_wraps_its_logits_is_told_the_loss_that_takes_them() -> None:
    @dataclass
    class Wrapped:
        logits: Tensor

    class Wrapping(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return Wrapped(super().forward(inputs))

    with pytest.raises(ValueError, match=r"got a Wrapped: pass loss_fn=swap_prune.TokenCrossEntropy\(\)"):
        prune(Wrapping(8, 3), DATA, 0.5, samples=32, progress=False)
    assert prune(Wrapping(8, 3), DATA, 0.5, loss_fn=TokenCrossEntropy(), samples=32, progress=False).kept == 12


def test_what_was_pruned_by_another_call_stays_zero_in_fine_tuning() -> None:
    model = drawn(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)))
    prune(model, DATA, 0.8, "magnitude", targets=["0", "2"], progress=False)
    before = masks_of(model, targets=["0", "2"])
    prune(model, DATA, 0.5, "magnitude", targets=["4"], finetune=FineTune(epochs=1, lr=0.1), progress=False)
    after = masks_of(model)
    assert all(torch.equal(after[name], mask) for name, mask in before.items())
    assert int(after["4.weight"].sum()) == 24


@pytest.mark.parametrize("ignore", [(), ("2",)])
def test_zeros_that_are_kept_in_fine_tuning_are_noted_and_ignoring_trains_them(ignore: tuple[str, ...]) -> None:
    model = drawn(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    nn.init.eye_(model[2].weight)
    settings = {"finetune": FineTune(epochs=1, lr=0.1), "ignore": ignore, "progress": False}
    report = prune(model, DATA, 0.5, "magnitude", targets=["0"], **settings)
    assert int(model[2].weight.count_nonzero()) == (64 if ignore else 8)
    assert any(note.startswith("zeros of 2.weight, which") for note in report.notes) != bool(ignore)


def test_new_layers_that_begin_at_zero_are_pointed_out() -> None:
    model = perceptron()
    prune(model, DATA, 0.5, "magnitude", progress=False)
    model.append(nn.Linear(3, 3, bias=False))
    nn.init.zeros_(model[3].weight)
    with pytest.warns(UserWarning, match=r"^zero throughout, and kept so, .*: 3\.weight; .* ignore= names them$"):
        finetune(model, DATA, FineTune(epochs=1), progress=False)
    assert not bool(model[3].weight.any())
    with warnings.catch_warnings(action="error"):
        finetune(model, DATA, FineTune(epochs=1, lr=0.1), ignore=["3"], progress=False)
    assert bool(model[3].weight.any())


def test_masks_of_frozen_layers_hold_by_themselves() -> None:
    model = perceptron()
    prune(model, DATA, 0.5, "magnitude", progress=False)
    model.requires_grad_(False).append(nn.Linear(3, 3))
    keep_masks(model, torch.optim.SGD(model[3].parameters(), 0.1), ignore=["3"]).remove()
    with pytest.raises(ValueError, match="the optimizer holds none of the 2 masked parameters"):
        keep_masks(model.requires_grad_(True), torch.optim.SGD(model[3].parameters(), 0.1), ignore=["3"])


class Handful:
    """Some samples; nobody knows how many."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels


class Counted(Handful):
    """The same, counted."""

    def __len__(self) -> int:
        return len(self.labels)


@pytest.mark.parametrize(("kind", "noted"), [(Handful, True), (Counted, False)])
def test_it_is_noted_where_nothing_is_held_out(kind: type[Handful], noted: bool) -> None:
    def loss(model: nn.Module, batch: Handful) -> Tensor:
        return functional.cross_entropy(model(batch.inputs), batch.labels, reduction="none")

    data = [kind(*DATA[i : i + 8]) for i in range(0, 80, 8)]
    report = prune(perceptron(), data, 0.5, "lr", loss_fn=loss, progress=False)
    assert any(note.startswith("no sample was held out to choose settings by") for note in report.notes) == noted
    assert report.stages[0].evidence.get("nothing_held_out", False) == noted


def test_outputs_are_a_tensor() -> None:
    class Named(Squared):
        def outputs(self, model: nn.Module, batch: Any) -> Any:
            return {"logits": model(batch[0])}

        def losses(self, outputs: Any, batch: Any) -> Tensor:
            return (outputs["logits"] - batch[1][:, None]).square().sum(1)

    with pytest.raises(ValueError, match=r"outputs of Named must return one tensor, \(n, \.\.\.\), got a dict"):
        prune(perceptron(), DATA, 0.5, "lr", samples=32, loss_fn=Named(), progress=False)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("call", [prune, plan])
def test_lazy_normalisation_is_told_apart_from_inference_mode(call: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="is not initialised: run the model once"):
        call(model, DATA, 0.5)


class Cosine(nn.Module):
    """Does not see that all weights shrink alike, and pools texts of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(50, 33), nn.Linear(33, 65, bias=False)
        self.head, self.classes = nn.Linear(65, 37, bias=False), nn.Parameter(torch.randn(5, 37))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.head(torch.relu(self.body(self.table(tokens).mean(1))))
        return 10 * functional.normalize(hidden, dim=1) @ functional.normalize(self.classes, dim=1).T


def test_networks_that_do_not_see_the_scale_of_their_weights_are_not_refused() -> None:
    """With batches of one, products of the same numbers round otherwise at other addresses."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = Cosine()
        texts = [(torch.randint(50, (1, 3 + i % 7)), torch.randint(5, (1,))) for i in range(40)]
        report = prune(model, texts, 0.5, "obd", samples=30, progress=False)
        assert report.kept == report.total // 2


class Branch(nn.Module):
    """Has a residual branch that may have died."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.inner.weight *= scale

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        return self.last(hidden + self.outer(torch.relu(self.inner(hidden))))


@pytest.mark.parametrize("scale", [1e-18, 1e-20, 1e-38])
def test_a_branch_whose_weights_have_decayed_does_not_stop_the_others(scale: float) -> None:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(200, 8), torch.randint(3, (200,)))
    model = Branch(scale)
    report = prune(model, data, 0.8, "lr", progress=False)
    assert report.kept == keep_count(report.total, 0.8)
    assert report.layers["first.weight"].kept > 0 and all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("method", but_long(["lr", "chita", "obd"], short=["chita", "obd"]))
def test_the_default_dtype_of_the_caller_makes_no_difference(method: str) -> None:
    def pruned(dtype: torch.dtype) -> nn.Module:
        model = perceptron()
        torch.set_default_dtype(dtype)
        try:
            prune(model, DATA, 0.5, method, samples=64, noise="gradient:std=1,fraction=0.25", progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
        return model

    expected = pruned(torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        assert all(map(torch.equal, pruned(dtype).parameters(), expected.parameters())), dtype


class Expanded(nn.Module):
    """Has a buffer that holds each of its numbers many times."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 3)
        self.register_buffer("mask", torch.full((1, 3), scale).expand(4, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs) * self.mask[0]


def test_expanded_buffers_are_saved_and_loaded(tmp_path: Path) -> None:
    model = Expanded()
    prune(model, DATA, 0.5, "lr", samples=64, progress=False).save(tmp_path / "out")
    loaded = load_pruned(Expanded(), tmp_path / "out")
    assert torch.equal(loaded.body.weight, model.body.weight)
    other = Expanded(scale=2.0)
    before = other.body.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'mask' is an expanded tensor, .* in Expanded, and .* holds other values"):
        load_pruned(other, tmp_path / "out")
    assert torch.equal(other.body.weight, before)


@pytest.mark.parametrize(("sizes", "fitted"), [((16, 16, 16, 16, 1), 48), ((4, 4, 4, 4, 4, 4, 4, 1), 24)])
def test_a_mask_that_all_samples_share(sizes: tuple[int, ...], fitted: int) -> None:
    """Batches longer than it stay whole; one sample that is left over has no variance for BatchNorm."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

        def forward(self, parts: tuple[Tensor, Tensor]) -> Tensor:
            outputs: Tensor = self.body(parts[0] @ parts[1])
            return outputs

    x, y = told_by_the_first().tensors
    ends = itertools.accumulate(sizes)
    data = [((x[end - n : end], torch.eye(10)), y[end - n : end]) for n, end in zip(sizes, ends, strict=True)]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    settings = {"loss_fn": loss_fn, "samples": 40, "finetune": FineTune(epochs=1)}
    report = prune(Masked(), data, 0.5, "lr", progress=False, **settings)  # type: ignore[arg-type]
    assert report.kept == 48 and report.stages[0].samples == fitted
    assert not any("BatchNorm" in note or "held out" in note for note in report.notes)


def test_an_embedding_whose_gradients_are_sparse() -> None:
    class Bag(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.look, self.head = nn.Embedding(20, 8, sparse=sparse), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.look(x).mean(1))
            return outputs

    torch.manual_seed(1)
    data = TensorDataset(torch.randint(20, (60, 5)), torch.randint(3, (60,)))
    found = []
    for sparse in (False, True):
        model = Bag(sparse)
        prune(model, data, 0.5, "obd", targets=["Embedding"], progress=False)
        found.append(model.look.weight.detach().clone())
    torch.testing.assert_close(*found)


def test_a_plan_of_what_are_no_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data must be a Dataset or an iterable of batches .*, got a int"):
        plan(nn.Linear(10, 2), 5, 0.5, "lr")
