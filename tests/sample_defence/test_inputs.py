"""Attacked calibration inputs are seen and shifted back; wrong labels and clean samples are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import swap_prune
from swap_prune.defences import parse_defence
from swap_prune.fisher.noise import parse_noise
from swap_prune.losses import CrossEntropy, cross_entropy
from swap_prune.sample_defence.inputs import (
    _is_rarer_than_chance,
    _shifted,
    labels_contradicted,
    shift_back,
    shift_seen,
    straight_shift,
)
from swap_prune.sample_defence.record import SampleDefence
from swap_prune.selection import select_parameters
from swap_prune.training.teaching import Teacher
from tests.cases import ONE, but_long, generator

_CLASSES, _SIZE = 6, 40


def task(count: int, seed: int, apart: float = 1.5) -> tuple[Tensor, Tensor]:
    """Inputs around the centre of their class."""
    centres = apart * torch.nn.functional.one_hot(torch.arange(_SIZE) % _CLASSES).float().T
    labels = torch.randint(_CLASSES, (count,), generator=generator(seed))
    return centres[labels] + torch.randn(count, _SIZE, generator=generator(seed + 1)), labels


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(_SIZE, 64), nn.ReLU(), nn.Linear(64, _CLASSES))
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-3)
        inputs, labels = task(4000, 10)
        for _ in range(150):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
    return model


def disturbed(network: nn.Module, noise: str | None, batches: list[Any]) -> list[Any]:
    return parse_noise(noise).corrupt(batches, generator(3), network, cross_entropy)


def samples(count: int = 300) -> list[Any]:
    inputs, labels = task(count, 20)
    return list(zip(inputs.split(128), labels.split(128), strict=True))


def seen(network: nn.Module, noise: str | None) -> float | None:
    return shift_seen(network, cross_entropy, disturbed(network, noise, samples()), generator(4))


@pytest.mark.parametrize("attack", ["attack=pgd,budget=0.5", "attack=fgsm,budget=0.5"])
def test_an_attack_is_seen_and_undone(network: nn.Module, attack: str) -> None:
    batches = samples()
    attacked = disturbed(network, f"adversarial:{attack}", batches)
    radius = shift_seen(network, cross_entropy, attacked, generator(4))
    assert radius is not None and 0.25 < radius < 1.0
    back = list(shift_back(network, attacked, radius))

    def distance(parts: list[Any]) -> float:
        return float(torch.cat([(a[0] - b[0]).abs() for a, b in zip(parts, batches, strict=True)]).mean())

    assert distance(back) < 0.7 * distance(attacked)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(back, batches, strict=True))
    assert all(float((a[0] - b[0]).abs().max()) <= radius * 1.0001 for a, b in zip(back, attacked, strict=True))


@pytest.mark.parametrize("noise", [None, "labels:fraction=0.05", "labels:fraction=0.25", "labels:fraction=0.6"])
def test_clean_samples_and_wrong_labels_are_no_attack(network: nn.Module, noise: str | None) -> None:
    assert seen(network, noise) is None


@pytest.mark.parametrize("seed", range(3))
def test_the_errors_of_a_network_that_learned_its_samples_by_heart_are_no_attack(seed: int) -> None:
    """They are near, but their inputs are as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(_SIZE, 64), nn.ReLU(), nn.Linear(64, _CLASSES))
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        inputs, labels = task(80, 30, 0.8)
        for _ in range(200):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
    batch = task(500, 50, 0.8)
    with torch.no_grad():
        outputs = model(batch[0])
    assert labels_contradicted(cross_entropy, [outputs], [batch])
    assert shift_seen(model, cross_entropy, [batch], generator(4)) is None


def test_labels_that_are_predicted_less_often_than_by_chance_need_not_be_near(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a network is led to any class by a small shift."""
    monkeypatch.setattr("swap_prune.sample_defence.inputs._is_nearer", lambda reached, led: False)
    radius = seen(network, "adversarial:attack=pgd,budget=0.8")
    assert radius is not None and radius > 0.5
    assert seen(network, "labels:fraction=0.6") is seen(network, "labels:fraction=1") is None
    weak = disturbed(network, "adversarial:attack=pgd,budget=0.3", samples())
    assert shift_seen(network, cross_entropy, weak, generator(4)) is None, "many are still right"


@pytest.mark.parametrize(("right", "classes", "rare"), [(6, 10, True), (7, 10, False), (0, 10, True), (0, 1000, False)])
def test_rarer_than_chance(right: int, classes: int, rare: bool) -> None:
    """Of 256 labels of ten classes 25.6 are right by chance, with a standard error of 4.8: 6.4 are four below."""
    assert _is_rarer_than_chance(torch.arange(256) >= right, classes) is rare


@pytest.mark.parametrize("taken_for_wrong_labels", [False, True])
def test_an_attack_is_looked_for_until_something_was_seen(
    network: nn.Module, taken_for_wrong_labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swap_prune.sample_defence.labels.TEMPERATURES", (1.0,))  # it would pass for one too sure
    model = copy.deepcopy(network)
    selection = select_parameters(model)
    doubts = SampleDefence(Teacher(model, selection, cross_entropy), cross_entropy)
    attacked = disturbed(model, "adversarial:attack=pgd,budget=0.7", samples())
    asked: list[float | None] = []

    def watched(*arguments: Any) -> float | None:
        asked.append(None if taken_for_wrong_labels else shift_seen(*arguments))
        return asked[-1]

    monkeypatch.setattr("swap_prune.sample_defence.record.shift_seen", watched)
    rates, radii = [], []
    for batches in (samples(), attacked, attacked):
        fitting, _, radius = doubts.restore(model, batches, [], generator(5))
        rates.append(doubts.weigh(Teacher(model, selection, cross_entropy).teach(fitting), [])[2])
        radii.append(radius)
    assert len(asked) == 1, "labels that fit are not asked about, and what was seen is not looked for again"
    assert rates[0] is radii[0] is None
    if taken_for_wrong_labels:
        assert rates[1] == rates[2] is not None and rates[1] > 0.3 and radii[1] is radii[2] is None
    else:
        assert rates[1] is rates[2] is None and radii[1] is not None and radii[2] is not None


def test_the_way_back_is_the_dense_networks_where_the_pruned_one_is_crooked(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the radius that was seen first, though no label may be contradicted."""
    monkeypatch.setattr("swap_prune.sample_defence.inputs._LEAST_STRAIGHT", 1.1)
    model = copy.deepcopy(network)
    doubts = SampleDefence(Teacher(model, select_parameters(model), cross_entropy), cross_entropy)
    _, _, radius = doubts.restore(model, disturbed(model, "adversarial:budget=0.7", samples()), [], generator(5))
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight):
            weight.masked_fill_(weight.abs() < weight.abs().quantile(0.8), 0)
    fooled, others = disturbed(model, "adversarial:budget=0.7", samples()), samples()
    fitting, apart, again = doubts.restore(model, fooled, others, generator(6))
    assert again == radius is not None
    for moved, before in ((fitting, fooled), (apart, others)):
        expected = shift_back(network, before, radius)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(moved, expected, strict=True))


def test_the_way_back_of_a_straight_network_is_its_own(network: nn.Module) -> None:
    """As far as it takes, and none at all where nothing fools it."""
    model = copy.deepcopy(network)
    doubts = SampleDefence(Teacher(model, select_parameters(model), cross_entropy), cross_entropy)
    first = disturbed(model, "adversarial:attack=pgd,budget=0.7", samples())
    back, _, radius = doubts.restore(model, first, [], generator(5))
    assert radius is not None and all(map(torch.equal, back[0], next(iter(shift_back(network, first, radius)))))
    with torch.no_grad():
        model[0].weight.masked_fill_(model[0].weight.abs() < model[0].weight.abs().median(), 0)
    fooled = disturbed(model, "adversarial:attack=pgd,budget=0.5", samples())
    fitting, apart, own = doubts.restore(model, fooled, first, generator(6))
    assert own == straight_shift(model, fooled) and 0 < own < radius
    for moved, before in ((fitting, fooled), (apart, first)):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(moved, shift_back(model, before, own), strict=True))
    clean = samples()
    assert doubts.restore(model, clean, [], generator(7)) == (clean, [], 0.0)


def test_a_way_is_straight_where_the_slope_is_the_same_at_both_ends() -> None:
    """Logits that rise with the inputs; or, beside that, turn many times between here and there."""
    weight = 0.2 * torch.randn(200, 6, generator=generator(1))
    x = torch.randn(64, 200, generator=generator(2))

    def straight(inputs: Tensor) -> Tensor:
        return inputs @ weight

    def crooked(inputs: Tensor) -> Tensor:
        return inputs @ weight + torch.sin(60 * inputs) @ weight

    for network, found in ((straight, True), (crooked, False)):
        labels = network(x).topk(2).indices[:, 1]
        radius = straight_shift(network, [(x, labels)])
        assert (radius is not None and radius > 0) == found


def test_labels_are_contradicted_where_more_is_wrong_than_the_network_says(network: nn.Module) -> None:
    def contradicted(noise: str | None) -> bool:
        batches = disturbed(network, noise, samples())
        with torch.no_grad():
            return labels_contradicted(cross_entropy, [network(x) for x, _ in batches], batches)

    assert not contradicted(None)
    assert contradicted("adversarial:budget=0.5") and contradicted("labels:fraction=0.25")


def test_where_there_are_no_single_classes_nothing_is_seen(network: nn.Module) -> None:
    attacked = disturbed(network, "adversarial:budget=0.5", samples())
    soft = [(inputs, nn.functional.one_hot(labels, _CLASSES).float()) for inputs, labels in attacked]
    assert shift_seen(network, CrossEntropy(), soft, generator(4)) is None
    assert shift_seen(network, lambda model, batch: batch[0].sum(1), attacked, generator(4)) is None
    assert shift_seen(network, cross_entropy, [], generator(4)) is None
    two = nn.Sequential(network, nn.Linear(_CLASSES, 2))  # there is no third class to compare with
    assert shift_seen(two, cross_entropy, [(x, y % 2) for x, y in attacked], generator(4)) is None


def test_samples_without_a_label_are_not_asked_and_labels_of_one_byte_are(network: nn.Module) -> None:
    attacked = disturbed(network, "adversarial:budget=0.5", samples())
    unlabelled = [(inputs, labels.masked_fill(labels == 0, -100)) for inputs, labels in attacked]
    small = [(inputs, labels.to(torch.uint8)) for inputs, labels in attacked]
    with torch.no_grad():
        outputs = [network(inputs) for inputs, _ in attacked]
    assert not labels_contradicted(cross_entropy, outputs, unlabelled)
    assert shift_seen(network, cross_entropy, unlabelled, generator(4)) is None
    assert labels_contradicted(cross_entropy, outputs, small)
    assert shift_seen(network, cross_entropy, small, generator(4)) == seen(network, "adversarial:budget=0.5")


@pytest.mark.long
def test_prune_reports_what_it_undid_and_gains_by_it(network: nn.Module) -> None:
    data, test = TensorDataset(*task(600, 30)), task(3000, 40)

    def pruned(defence: str | None) -> tuple[float, list[bool]]:
        model = nn.Sequential(nn.Linear(_SIZE, 64), nn.ReLU(), nn.Linear(64, _CLASSES))
        model.load_state_dict(network.state_dict())
        options: dict[str, Any] = {"samples": 300, "stages": 2, "defence": defence, "progress": False}
        report = swap_prune.prune(model, data, 0.95, "lr", noise="adversarial:budget=0.7", **options)
        accuracy = float((model(test[0]).argmax(1) == test[1]).double().mean())
        return accuracy, ["inputs_shifted_back" in stage.evidence for stage in report.stages]

    defended, undone = pruned("auto")
    bare, left = pruned(None)
    assert all(undone) and not any(left)
    assert defended > bare + 0.02


SAID = {"labels": "% of the calibration labels seem wrong", "inputs": "inputs seem to be attacked"}
SEEN = {"gradients": "noise_seen", "labels": "label_noise", "inputs": "inputs_shifted_back"}


@pytest.mark.parametrize(
    "defence", but_long(["gradients", "labels", "inputs", "labels+inputs", "auto", None], short=["labels"])
)
def test_a_defence_looks_where_it_is_told_to(defence: str | None, network: nn.Module) -> None:
    """Each noise is seen by its own defence alone."""
    sources = {"gradients": "gradient:std=2", "labels": "labels:fraction=0.25", "inputs": "adversarial:budget=0.7"}
    for hit, noise in sources.items():
        model = nn.Sequential(nn.Linear(_SIZE, 64), nn.ReLU(), nn.Linear(64, _CLASSES))
        model.load_state_dict(network.state_dict())
        data = TensorDataset(*task(600, 30))
        options: dict[str, Any] = {"samples": 300, "defence": defence, "progress": False}
        report = swap_prune.prune(model, data, 0.8, ONE, noise=noise, **options)
        looked = {"auto": set(SEEN), None: set()}.get(defence, set((defence or "").split("+")))
        assert (SEEN[hit] in report.stages[0].evidence) == (hit in looked), hit
        said = [name for name, words in SAID.items() if any(words in note for note in report.notes)]
        assert said == [name for name in SAID if name == hit and hit in looked], report.notes
        assert all(f"defence={'+'.join(sorted(looked - {hit})) or 'none'!r}" in report.notes[-1] for hit in said)


@pytest.mark.parametrize("wrong", ["", "+", "labels+", "auto+labels", "wall", 3, True, ["labels"]])
def test_a_defence_that_is_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match="defence must be 'auto', 'none' or None, or some of gradients, labels"):
        parse_defence(wrong)


def test_a_shift_ends_where_the_label_is_likeliest() -> None:
    """The slope of each step is taken where the last one ended: on from the likeliest place nothing leads further."""

    def likeliest_at(place: float) -> Any:
        return lambda inputs: torch.cat([-1000 * (inputs - place).square(), torch.zeros_like(inputs)], dim=1)

    starts, label = torch.tensor([[0.02], [0.0], [-0.03]]), torch.zeros(3, dtype=torch.int64)
    for place in (0.05, -0.06):
        ends = _shifted(likeliest_at(place), starts, label, 0.1, 2)
        assert float((ends - place).abs().max()) <= 0.025 + 1e-6, "a step is a quarter of the radius"
    outside = _shifted(likeliest_at(1.0), starts, label, 0.1, 2)
    torch.testing.assert_close(outside, starts + 0.1)
