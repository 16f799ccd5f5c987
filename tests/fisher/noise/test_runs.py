"""Noise in whole runs: paired with clean ones, where it acts and where not, recorded, and nothing left behind."""

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune import load_pruned, prune
from swap_prune.fisher.noise import NOISE_MODELS, NoiseModel
from swap_prune.losses import cross_entropy
from swap_prune.surgery.batchnorm import batchnorm_layers
from tests.cases import ONE, but_long, generator, normal

SPECS = (
    "gradient:std=4,fraction=0.25,scope=layer,batch=4",
    "input:kind=occlusion,severity=5,fraction=0.5",
    "labels:fraction=0.5",
    "analog:levels=8,read=0.1,stuck_off=0.1",
    "adversarial:steps=2,budget=0.5",
    "poison:kind=omniscient,fraction=0.3",
)
ALL = "+".join(SPECS)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3), nn.BatchNorm1d(3)
    )


def data(n=150):
    return TensorDataset(normal(n, 1, 6, 6, seed=1, dtype=torch.float32), torch.arange(n) % 3)


@dataclass(frozen=True)
class Watch(NoiseModel):
    """Sees what every stage draws, and changes nothing."""

    seen: list

    def corrupt(self, batches, generator, model, loss_fn):
        self.seen.extend(images.clone() for images, _ in batches)
        return batches


@pytest.mark.long
@pytest.mark.parametrize("method", ["lr", "ewr"])
def test_noisy_and_clean_runs_of_a_seed_see_the_same_samples_in_every_stage(method):
    draws = []
    for noise in (None, ALL):
        watch = Watch([])
        prune(network(), data(), 0.7, method, samples=32, stages=3, seed=4, noise=[watch, noise])
        draws.append(torch.cat(watch.seen))
    assert len(draws[0]) >= 3 * 32 and torch.equal(draws[0], draws[1])


@pytest.mark.long
def test_watching_is_free():
    """A chain that changes nothing gives the same bits as no noise."""
    watched, clean = network(), network()
    prune(watched, data(), 0.7, "ewr", samples=32, stages=2, noise=Watch([]))
    prune(clean, data(), 0.7, "ewr", samples=32, stages=2)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), clean.parameters(), strict=True))


@pytest.mark.parametrize("spec", but_long([*SPECS, ALL], short=["labels:fraction=0.5"]))
def test_every_noise_changes_the_answer_repeatably_at_the_same_sparsity(spec, tmp_path):
    first, again, clean = network(), network(), network()
    report = prune(first, data(), 0.7, ONE, samples=40, stages=2, noise=spec)
    prune(again, data(), 0.7, ONE, samples=40, stages=2, noise=spec)
    dense = prune(clean, data(), 0.7, ONE, samples=40, stages=2)
    assert report.kept == dense.kept
    assert torch.equal(first[4].weight, again[4].weight) and not torch.equal(first[4].weight, clean[4].weight)
    report.save(tmp_path / "out")
    load_pruned(network(), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["noise"]
    assert stored == report.settings["noise"]
    named = [part["model"] for part in (stored if isinstance(stored, list) else [stored])]
    assert named == [NOISE_MODELS[part.split(":")[0]].__name__ for part in spec.split("+")]


def test_held_out_samples_are_noisy_and_recalibration_is_not():
    """The loss tells the phases apart: in recalibration BatchNorm is in training mode and tracks its statistics."""
    original = {image.numpy().tobytes() for image, _ in data()}
    seen = {"recalibration": set(), "elsewhere": set()}
    model = network()
    layer = batchnorm_layers(model)[0]

    def loss_fn(net, batch):
        if not torch._C._functorch.is_batchedtensor(batch[0]):
            phase = "recalibration" if layer.training and layer.track_running_stats else "elsewhere"
            seen[phase] |= {image.detach().numpy().tobytes() for image in batch[0]}
        return cross_entropy(net, batch)

    prune(model, data(), 0.7, "lr", loss_fn=loss_fn, samples=40, stages=2, noise="input")
    assert seen["recalibration"] <= original and seen["recalibration"]
    held_out = seen["elsewhere"] - original
    assert len(held_out) > 40


def test_analog_noise_acts_on_the_gradients_and_not_on_the_reference():
    """With every cell of every pair stuck the network reads as zero; LR still starts from the real weights."""
    model = nn.Linear(36, 3, bias=False)
    images = TensorDataset(data().tensors[0].flatten(1), data().tensors[1])
    before = model.weight.detach().clone()
    report = prune(model, images, 0.0, "lr", samples=40, noise="analog:stuck_on=1")
    assert torch.equal(model.weight, before)
    assert report.stages[0].loss == pytest.approx(math.log(3))


@pytest.mark.parametrize("fails", ["capture", "corrupt"])
def test_a_failure_leaves_the_network_as_it_was(fails):
    model, calls = network(), 0
    before = copy.deepcopy(model.state_dict())

    def loss_fn(net, batch):
        nonlocal calls
        calls += 1
        return cross_entropy(net, batch) * (float("nan") if calls > (6 if fails == "capture" else 0) else 1)

    noise = "analog" if fails == "capture" else "analog+adversarial"
    with pytest.raises(ValueError, match="not finite"):
        prune(model, data(), 0.7, "lr", loss_fn=loss_fn, samples=40, stages=4, noise=noise, recalibrate_batchnorm=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_noise_without_gradients_has_nothing_to_act_on():
    noisy, clean = network(), network()
    prune(noisy, data(), 0.7, "magnitude", noise=ALL)
    prune(clean, data(), 0.7, "magnitude")
    assert torch.equal(noisy[4].weight, clean[4].weight)


def test_an_object_of_ones_own():
    class Shrink:
        def __init__(self, by):
            self.by = by

        def apply(self, factor, state):
            assert torch.rand(1, generator=state) != torch.rand(1, generator=generator())
            return type(factor)(factor.matrix / self.by)

    report = prune(network(), data(), 0.7, "lr", samples=40, noise=[Shrink(2), "poison"])
    assert report.settings["noise"][0] == {"model": "Shrink", "by": 2}
