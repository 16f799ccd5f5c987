"""The whole of pruning on small networks: exact counts, determinism, failure without damage."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import swap_prune
from swap_prune import METHODS, FineTune, plan, prune
from swap_prune.selection import layer_floors, select_parameters
from tests.cases import but_long


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


def small_data(n: int = 60, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator))


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if p.ndim >= 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", but_long([0.0, 0.1, 0.5, 0.9, 0.98, 0.999], short=[0.0, 0.1, 0.5, 0.9, 0.999]))
def test_zeros_are_exact(method: str, sparsity: float) -> None:
    model = small_network()
    report = prune(model, small_data(), sparsity, method, samples=40, stages=2)
    expected = report.total - math.floor(report.total * (1 - sparsity))
    assert report.total == 36 + 144 * 12 + 36
    assert zeros(model) == expected
    assert report.kept == report.total - expected
    assert report.sparsity == pytest.approx(expected / report.total)
    assert sum(layer.kept for layer in report.layers.values()) == report.kept


def with_an_idle_layer() -> nn.Module:
    """The last but one layer has weights so small that a global comparison empties it."""
    model = small_network()
    with torch.no_grad():
        model[4].weight.mul_(1e-4)
    return model


@pytest.mark.parametrize(
    "method", but_long(sorted(METHODS.keys() - {"sparsegpt"}), short=METHODS.keys() - {"chita", "ewr"})
)
@pytest.mark.parametrize("stages", [1, 3])
def test_a_share_of_each_layer_is_kept(method: str, stages: int) -> None:
    config = METHODS[method](scope="global") if method in ("magnitude", "wanda") else METHODS[method]()
    free, held = with_an_idle_layer(), with_an_idle_layer()
    data, settings = small_data(), {"samples": 40, "stages": stages, "min_keep": 0.03}
    if method == "magnitude":
        report = prune(free, data, 0.97, config, samples=40, stages=stages)
        assert report.layers["4.weight"].kept == 0 and any("4.weight" in note for note in report.notes)
    report = prune(held, data, 0.96, config, **settings)  # type: ignore[arg-type]
    least = {"0.weight": 2, "4.weight": 52, "6.weight": 2}
    assert all(report.layers[name].kept >= count for name, count in least.items())
    assert report.kept == math.floor(report.total * (1 - 0.96)) and report.settings["min_keep"] == 0.03
    if method == "magnitude":
        largest = with_an_idle_layer()[4].weight.abs().flatten().topk(52).indices
        assert bool((held[4].weight.flatten()[largest] != 0).all())


def test_layers_have_shares_of_their_own() -> None:
    """The idle layer keeps what its name asks for, and the larger of two shares; the others compete."""
    report = prune(
        with_an_idle_layer(), small_data(), 0.96, "magnitude", min_keep={"4": 0.03, "re:4.w.*": 0.02, "6.weight": 0.5}
    )
    assert report.layers["4.weight"].kept == 52 and report.layers["6.weight"].kept >= 18
    assert report.kept == math.floor(report.total * (1 - 0.96))
    assert report.settings["min_keep"] == {"4": 0.03, "re:4.w.*": 0.02, "6.weight": 0.5}
    for shares, words in (
        ({"5": 0.1}, r"min_keep pattern '5' matches nothing that is pruned \(0.weight, .*"),
        ({"4.bias": 0.1}, "min_keep pattern '4.bias' matches nothing that is pruned"),
        ({"4": 1.1}, "min_keep must lie in .*, got 1.1 for '4'"),
        ({"4": "x"}, "min_keep must lie in .*, got 'x' for '4'"),
        ({"4": 0.5}, "keeps at least 864 of"),
        ({3: 0.5}, "min_keep must hold non-empty strings, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            prune(small_network(), small_data(), 0.9, "magnitude", min_keep=shares)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.07, 0.1, 0.29, 0.57, np.float32(0.07), np.float32(0.29)])
def test_a_share_is_rounded_up_and_not_one_more(share: float) -> None:
    """0.07 of 100 weights are seven, though 0.07 * 100 is above it in floating point."""
    model = nn.Linear(10, 10)
    floors = layer_floors(model, select_parameters(model), share, 90)
    assert floors == {"weight": round(100 * float(share))}


def test_a_share_that_cannot_be_kept_is_refused() -> None:
    before = copy.deepcopy(small_network().state_dict())
    for share, words in ((-0.1, "min_keep must lie"), (1.1, "min_keep must lie"), (0.2, "keeps at least")):
        with pytest.raises(ValueError, match=words):
            prune(small_network(), small_data(), 0.9, "magnitude", min_keep=share)
    model = with_an_idle_layer()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'sparsegpt' kept 1 weights of '0.weight', and min_keep asks for 2"):
        prune(model, small_data(), 0.96, "sparsegpt", samples=40, min_keep=0.03)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(small_network().state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize("method", ["ewr", "sparsegpt", "magnitude"])
def test_a_network_with_its_channels_last_is_pruned_alike(method: str) -> None:
    usual, last = small_network().double(), small_network().double().to(memory_format=torch.channels_last)
    data = [(inputs.double(), labels) for inputs, labels in DataLoader(small_data(), batch_size=20)]
    for model in (usual, last):
        prune(model, data, 0.7, method, samples=60, stages=2)
    for (name, a), b in zip(usual.state_dict().items(), last.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("method", but_long(METHODS, short=METHODS.keys() - {"cbs", "chita", "woodfisher"}))
def test_same_seed_gives_the_same_bits_and_leaves_the_global_random_state(method: str) -> None:
    first, second = small_network(), small_network()
    state = torch.get_rng_state()
    prune(first, small_data(), 0.7, method, samples=30, stages=3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    prune(second, small_data(), 0.7, method, samples=30, stages=3, seed=5)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_another_seed_draws_other_samples() -> None:
    first, second = small_network(), small_network()
    prune(first, small_data(), 0.7, "lr", samples=30, seed=0)
    prune(second, small_data(), 0.7, "lr", samples=30, seed=1)
    assert not torch.equal(first[4].weight, second[4].weight)


@pytest.mark.long
def test_second_order_update_lowers_the_loss_of_a_trained_network() -> None:
    """LR and EWR beat magnitude where the Fisher matrix is the whole story: a trained network, many samples."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 20, generator=generator) * torch.logspace(-1, 1, 20)
    labels = (inputs @ torch.randn(20, 4, generator=generator)).argmax(1)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 4))
    optimiser = torch.optim.Adam(dense.parameters(), lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.cross_entropy(dense(inputs), labels).backward()
        optimiser.step()
    losses = {}
    for method in ("magnitude", "lr", "ewr"):
        model = copy.deepcopy(dense)
        prune(model, TensorDataset(inputs, labels), 0.7, method, samples=400, stages=5)
        losses[method] = nn.functional.cross_entropy(model(inputs), labels).item()
    assert losses["lr"] < 0.8 * losses["magnitude"]
    assert losses["ewr"] < 0.8 * losses["magnitude"]


def test_tied_weights_are_counted_once_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(tokens).mean(1))

    torch.manual_seed(0)
    model = Tied()
    data = [(torch.randint(11, (20, 5)), torch.randint(11, (20,)))]
    report = prune(model, data, 0.5, "lr")
    assert report.total == 66 and report.kept == 33
    assert model.head.weight is model.embed.weight
    assert int((model.embed.weight == 0).sum()) == 33


def test_dict_batches_and_a_custom_loss() -> None:
    model = nn.Linear(5, 1)
    batches = [{"x": torch.randn(8, 5), "y": torch.randn(8, 1)} for _ in range(3)]
    report = prune(
        model, batches, 0.4, "ewr", loss_fn=lambda net, b: (net(b["x"]) - b["y"]).square().mean(1), samples=24
    )
    assert report.kept == 3 and report.stages[0].samples == 20  # a fifth is held out


def test_batchnorm_is_recalibrated_unless_switched_off_and_modes_come_back() -> None:
    model, frozen = small_network(), small_network()
    model.train()
    model[0].eval()
    before = model[1].running_var.clone()
    prune(model, small_data(), 0.8, "magnitude")
    assert model.training and not model[0].training and model[1].momentum == 0.1
    assert not torch.equal(model[1].running_var, before)
    prune(frozen, small_data(), 0.8, "magnitude", recalibrate_batchnorm=False)
    assert torch.equal(frozen[1].running_var, before)
    expected = model[0](small_data().tensors[0]).var((0, 2, 3))
    assert torch.allclose(model[1].running_var, expected, rtol=0.02)


def test_statistics_that_do_not_fit_are_repaired_before_pruning_and_reported() -> None:
    model = small_network()
    model[1].running_mean -= 50
    report = prune(model, small_data(), 0.5, "lr", samples=40)
    assert any("BatchNorm" in note for note in report.notes)
    assert prune(small_network(), small_data(), 0.5, "magnitude", recalibrate_batchnorm=False).notes == []


def test_a_failure_in_a_later_stage_leaves_the_model_as_it_was() -> None:
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")
        return loss * float("nan") if calls > 12 else loss

    with pytest.raises(ValueError, match="not finite"):
        prune(model, small_data(), 0.5, "lr", loss_fn=loss_fn, stages=50, samples=20)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_fewer_samples_than_asked_for_are_used_and_noted() -> None:
    report = prune(small_network(), small_data(20), 0.5, "lr", samples=64)
    assert report.stages[0].samples == 16  # a fifth is held out
    assert any("fewer than the 64" in note for note in report.notes)


def test_half_precision_weights_keep_the_sparsity() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)).to(torch.bfloat16)
    data = [(torch.randn(16, 16, dtype=torch.bfloat16), torch.randint(3, (16,)))]
    report = prune(model, data, 0.75, "lr", samples=16)
    assert report.kept == math.floor(report.total * 0.25)
    assert model[0].weight.dtype == torch.bfloat16


def test_noise_changes_the_answer_and_is_recorded() -> None:
    clean, noisy = small_network(), small_network()
    prune(clean, small_data(), 0.7, "lr", samples=30)
    report = prune(noisy, small_data(), 0.7, "lr", samples=30, noise="gradient:std=4,fraction=0.25")
    assert report.settings["noise"] == {
        "model": "GradientNoise",
        "std": 4.0,
        "fraction": 0.25,
        "scope": "row",
        "batch": 1,
    }
    assert not torch.equal(clean[4].weight, noisy[4].weight)


def filled(value: float) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[1].weight[2, 5] = value
    return model


def late_nan() -> torch.Tensor:
    inputs = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs[7] = torch.nan
    return inputs


BAD = {
    "sparsity above": ({"sparsity": 1.0}, "sparsity"),
    "sparsity below": ({"sparsity": -0.1}, "sparsity"),
    "sparsity nan": ({"sparsity": float("nan")}, "sparsity"),
    "sparsity text": ({"sparsity": "0.5"}, "sparsity"),
    "method": ({"method": "sgd"}, "method"),
    "method class": ({"method": swap_prune.EWR}, "method"),
    "schedule": ({"schedule": "wavy"}, "schedule"),
    "stages": ({"stages": 0}, "stages"),
    "samples": ({"samples": 0}, "samples"),
    "seed": ({"seed": -1}, "seed"),
    "seed too large": ({"seed": 2**63}, "seed"),
    "targets": ({"targets": ("Conv9d",)}, "Conv9d"),
    "ignore": ({"ignore": ("re:nothing",)}, "nothing"),
    "regex": ({"targets": ("re:(",)}, "regular expression"),
    "nothing left": ({"ignore": ("re:.*",)}, "nothing to prune"),
    "noise": ({"noise": "gradient:std=x"}, "std"),
    "finetune": ({"finetune": {"epochs": 1}}, "finetune must be a swap_prune.FineTune"),
    "finetune diverges": ({"finetune": FineTune(lr=1e30, batch_size=8), "stages": 2}, "lower lr"),
    "memory": ({"memory": "lots"}, "memory"),
    "memory too small": ({"memory": "1KB"}, "memory"),
    "empty loader": ({"data": []}, "empty"),
    "no data": ({"data": None}, "data"),
    "tensor as data": ({"data": torch.zeros(3)}, "data"),
    "labels": ({"data": [(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]}, "labels out of range"),
    "negative labels": ({"data": [(torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]))]}, "labels out of range"),
    "not pairs": ({"data": [torch.zeros(4, 1, 8, 8)]}, "inputs, targets"),
    "wrong shape": ({"data": [(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())]}, "failed on a calibration batch"),
    "one output": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))}, "the model has one output: pass loss_fn="),
    "regression": ({"data": [(torch.zeros(4, 1, 8, 8), torch.randn(4, 3))]}, "are not: pass loss_fn="),
    "floats": ({"data": [(torch.zeros(4, 1, 8, 8), torch.zeros(4))]}, "are not: pass loss_fn="),
    "detached loss": ({"loss_fn": lambda net, b: net(b[0]).sum(1).detach(), "method": "obd"}, "does not depend on"),
    "weights nan": ({"model": filled(torch.nan), "method": "magnitude"}, "must be finite; '1.weight'"),
    "weights inf": ({"model": filled(torch.inf), "method": "wanda"}, "must be finite; '1.weight'"),
    "inputs nan": ({"data": [(torch.full((9, 1, 8, 8), torch.nan), torch.arange(9) % 3)], "method": "wanda"}, "finite"),
    "late nan": ({"data": [(late_nan(), torch.arange(9) % 3)], "method": "sparsegpt"}, "inputs of '.*' are not finite"),
    "device": ({"device": "cuda:97"}, "device 'cuda:97' cannot be used"),
    "device name": ({"device": "abacus"}, "device 'abacus' cannot be used"),
    "no targets": ({"targets": None}, "targets must be a string or a sequence of strings"),
    "a number ignored": ({"ignore": 5}, "ignore must be a string or a sequence of strings"),
    "schedule list": ({"schedule": []}, "schedule must be one of"),
    "scalar loss": ({"loss_fn": lambda net, b: net(b[0]).mean()}, "one loss a sample"),
    "infinite loss": ({"loss_fn": lambda net, b: net(b[0]).sum(1) / 0}, "not finite"),
    "loss not a tensor": ({"loss_fn": lambda net, b: [1.0]}, "tensor"),
    "gradient nan": ({"loss_fn": lambda net, b: (net(b[0]).sum(1) * 0).sqrt()}, "gradient is not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_value_error_and_changes_nothing(case: str) -> None:
    changes, message = BAD[case]
    model = changes.get("model", small_network())
    before = copy.deepcopy(model.state_dict())
    changes = {name: value for name, value in changes.items() if name != "model"}
    arguments = {"data": small_data(), "method": "lr", "samples": 20, "recalibrate_batchnorm": False} | changes
    with pytest.raises(ValueError, match=message):
        prune(model, **arguments)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_an_exhausted_generator_is_refused_and_a_fresh_one_is_remembered() -> None:
    loader = DataLoader(small_data(), batch_size=16)
    batches = (batch for batch in loader)
    assert prune(small_network(), batches, 0.5, "lr", samples=60, stages=3).stages[2].samples == 48
    with pytest.raises(ValueError, match="exhausted"):
        prune(small_network(), batches, 0.5, "lr")


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to prune"):
        prune(nn.ReLU(), small_data(), 0.5)


@pytest.mark.parametrize("method", but_long(["magnitude", "lr", "ewr"]))
def test_gradual_pruning_trains_under_each_stages_mask(method: str) -> None:
    settings = FineTune(epochs=3, lr=0.05, batch_size=10, distillation=0)  # the dense network was never trained
    models, reports = [small_network() for _ in range(3)], []
    for model, training in zip(models, (settings, settings, None), strict=True):
        arguments = {"samples": 40, "stages": 3, "schedule": "cubic", "finetune": training, "seed": 2}
        reports.append(prune(model, small_data(), 0.8, method, **arguments))
    trained, _, plain = reports
    expected = trained.total - math.floor(trained.total * (1 - 0.8))
    assert [zeros(model) for model in models] == [expected] * 3
    assert trained.kept == trained.total - expected
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert trained.settings["finetune"]["lr"] == 0.05 and "finetune" not in plain.settings
    losses = [stage.evidence["finetune_loss"] for stage in trained.stages]
    assert [len(stage) for stage in losses] == [3, 3, 3] and losses[2][2] < losses[0][0]
    assert all("finetune_loss" not in stage.evidence for stage in plain.stages)
    assert not torch.equal(models[0][6].bias, models[2][6].bias)
    inputs, labels = small_data().tensors
    fit = [nn.functional.cross_entropy(model.eval()(inputs), labels).item() for model in models]
    assert fit[0] < 0.9 * fit[2]
    if method != "magnitude":  # gradients are taken at the fine-tuned weights
        assert trained.stages[0].loss == plain.stages[0].loss
        assert trained.stages[1].loss < plain.stages[1].loss


def test_fine_tuning_reads_the_recalibration_data_and_batchnorm_is_recalibrated_after_it() -> None:
    model, other = small_network(), small_data(30, seed=9)
    seen: list[int] = []

    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if net.training:
            seen.extend(batch[0][:, 0, 0, 0].tolist())
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    arguments = {"loss_fn": loss_fn, "recalibration_data": other, "finetune": FineTune(epochs=1, batch_size=10)}
    prune(model, small_data(), 0.5, "magnitude", **arguments)
    assert sorted(seen) == sorted(other.tensors[0][:, 0, 0, 0].tolist())
    with torch.no_grad():
        assert torch.allclose(model[1].running_mean, model[0](other.tensors[0]).mean((0, 2, 3)), atol=1e-5)


def test_a_failure_after_a_fine_tuned_stage_gives_every_parameter_back() -> None:
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    trained = 0

    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nonlocal trained
        trained += net.training
        if trained > 9:
            assert not torch.equal(net[6].bias, before["6.bias"]), "a stage was fine-tuned"
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    with pytest.raises(KeyboardInterrupt):
        prune(
            model, small_data(), 0.5, "magnitude", loss_fn=loss_fn, stages=3, finetune=FineTune(epochs=1, batch_size=10)
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got a dict"):
        prune({}, small_data())


@pytest.mark.parametrize("size", but_long([1, 2, 25], short=[25]))
def test_how_samples_are_batched_does_not_matter(size: int) -> None:
    """BatchNorm's statistics are those of many samples, however few the loader gives at a time."""
    inputs, labels = small_data(250)[:]
    models = []
    for part in (size, 250):
        model = small_network()
        batches = list(zip(inputs.split(part), labels.split(part), strict=True))
        prune(model, batches, 0.6, "lr", samples=129, progress=False)
        assert int(model[1].num_batches_tracked) > 0
        models.append(model)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    torch.testing.assert_close(models[0][1].running_mean, models[1][1].running_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(models[0][1].running_var, models[1][1].running_var, rtol=1e-3, atol=0)


@pytest.mark.long
def test_one_sample_too_many_changes_little() -> None:
    """257 samples leave one alone in a batch of 128, and it must not switch the statistics of all others off."""
    inputs, labels = small_data(257)[:]
    masks = []
    for samples in (256, 257):
        model = small_network()
        prune(model, TensorDataset(inputs[:samples], labels[:samples]), 0.6, "lr", samples=samples, progress=False)
        masks.append(torch.cat([model[i].weight.flatten() != 0 for i in (0, 4, 6)]))
        with torch.no_grad():
            seen = model[0](inputs[:samples])
        torch.testing.assert_close(model[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=0)
        torch.testing.assert_close(model[1].running_var, seen.var((0, 2, 3)), rtol=1e-3, atol=0)
    assert float((masks[0] == masks[1]).double().mean()) > 0.98, "0.75 where they are switched off"


def test_a_loss_may_take_its_dict_apart() -> None:
    inputs, labels = small_data()[:]

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        wanted = batch.pop("labels")
        return torch.nn.functional.cross_entropy(model(**batch), wanted, reduction="none")

    class Net(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)

    model = Net(nn.Flatten(), nn.Linear(64, 3))
    report = prune(model, [{"images": inputs, "labels": labels}] * 2, 0.5, "lr", loss_fn=loss_fn, progress=False)
    assert report.kept == 96


@pytest.mark.parametrize("around", but_long([torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")]))
@pytest.mark.parametrize("data", but_long([small_data, lambda: [small_data()[:]]]))
def test_what_is_set_around_changes_nothing(around: Callable[[], Any], data: Callable[[], Any]) -> None:
    inside, outside = small_network(), small_network()
    with around():
        prune(inside, data(), 0.7, "ewr", samples=40, progress=False)
    prune(outside, data(), 0.7, "ewr", samples=40, progress=False)
    for name, value in inside.state_dict().items():
        assert torch.equal(value, outside.state_dict()[name]), name


def test_statistics_that_cannot_be_estimated_are_noted() -> None:
    model = small_network()
    before = copy.deepcopy(model[1].state_dict())
    report = prune(model, [small_data()[:1]], 0.5, "magnitude", progress=False)
    assert "BatchNorm's statistics are the old ones: no batch of the data holds two samples" in report.notes
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    assert not any("old ones" in note for note in prune(model, [small_data()[:2]], 0.6, "magnitude").notes)


def test_a_batchnorm_layer_that_the_loss_never_reaches_keeps_its_statistics() -> None:
    class TwoTasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.head, self.other = nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(inputs))

    torch.manual_seed(0)
    model = TwoTasks()
    for layer in (model.body[1], model.other[1]):
        layer.running_mean.fill_(0.7)
        layer.running_var.fill_(2.5)
        layer.num_batches_tracked.fill_(9)
    data = TensorDataset(torch.randn(90, 6), torch.randint(3, (90,)))
    prune(model, data, 0.5, "magnitude", ignore=["other"], progress=False)
    other, own = model.other[1], model.body[1]
    assert bool((other.running_mean == 0.7).all() and (other.running_var == 2.5).all())
    assert int(other.num_batches_tracked) == 9 and not bool((own.running_mean == 0.7).any())


def test_reports_and_plans_can_be_read(tmp_path: Path) -> None:
    model = small_network()
    report = prune(model, small_data(), 0.5, "magnitude", samples=40, stages=2, progress=False)
    first, *lines = str(report).splitlines()
    assert first.startswith(f"magnitude: {report.kept:,} of {report.total:,} weights kept, sparsity 0.5000, 2 stages, ")
    for (name, layer), line in zip(report.layers.items(), lines[: len(report.layers)], strict=True):
        assert line.split() == [name, f"{layer.kept:,}", "of", f"{layer.total:,}", f"{layer.sparsity:.4f}"]
    assert lines[len(report.layers) :] == [f"note: {note}" for note in report.notes]
    run = {"sparsity": 0.5, "method": "lr", "samples": 40, "stages": 2, "checkpoint": tmp_path}
    before = plan(small_network(), small_data(), **run)
    prune(small_network(), small_data(), progress=False, **run)
    for planned in (before, plan(small_network(), small_data(), **run)):
        shown = str(planned).splitlines()
        assert [line.split()[0] for line in shown[:-1]] == [one.name.split()[0] for one in planned.forecasts]
        assert shown[-1] == planned.why and sum(line.endswith("taken") for line in shown[:-1]) == 1
    assert planned.why == "the same as in the finished stages"
