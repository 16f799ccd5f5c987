"""Noise models asked for by text and objects, chained, recorded, and their own random state."""

import json
from dataclasses import dataclass

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.noise import (
    NOISE_MODELS,
    AdversarialInputs,
    AnalogMemory,
    GradientNoise,
    InputNoise,
    LabelNoise,
    NoiseChain,
    NoiseModel,
    PoisonedRows,
    parse_noise,
)
from swap_prune.fisher.noise.base import RowsOnly
from tests.cases import generator, normal


@dataclass(frozen=True)
class Add(NoiseModel):
    """Adds a number at every hook, so that order can be seen with Multiply."""

    by: float

    def corrupt(self, batches, generator, model, loss_fn):
        return [batch + self.by for batch in batches]

    def disturb(self, weights, generator, layers):
        return weights + self.by

    def apply(self, factor, generator, layers=None):
        return DenseFactor(factor.matrix + self.by)


@dataclass(frozen=True)
class Multiply:
    """An object that knows nothing of NoiseModel."""

    by: float

    def apply(self, factor, generator):
        return DenseFactor(factor.matrix * self.by)


@dataclass(frozen=True)
class Needs:
    """A model whose setting has no default."""

    size: float

    def apply(self, factor, generator):
        return factor


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (None, ()),
        ([], ()),
        ("gradient", (GradientNoise(),)),
        ("gradient:", (GradientNoise(),)),
        ("gradient:std=4,fraction=0.25", (GradientNoise(4.0, 0.25),)),
        ("gradient:fraction=1,scope=layer,batch=16", (GradientNoise(fraction=1.0, scope="layer", batch=16),)),
        ("gradient:std=1e+1+labels:kind=pair", (GradientNoise(10.0), LabelNoise("pair"))),
        ("input:kind=blur, severity=5 + labels", (InputNoise("blur", 5), LabelNoise())),
        (["analog:levels=16", PoisonedRows()], (AnalogMemory(levels=16), PoisonedRows())),
        (["adversarial:norm=l1+poison", "gradient"], (AdversarialInputs(norm="l1"), PoisonedRows(), GradientNoise())),
        (GradientNoise(2.0, 0.5), (GradientNoise(2.0, 0.5),)),
        (NoiseChain((GradientNoise(),)), (GradientNoise(),)),
        (
            [NoiseChain((GradientNoise(), LabelNoise())), None, "poison"],
            (GradientNoise(), LabelNoise(), PoisonedRows()),
        ),
    ],
    ids=str,
)
def test_noise_from_text_and_objects(noise, expected):
    assert parse_noise(noise).models == expected


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("", "noise must be one of gradient, input"),
        ("pink", "'pink'"),
        ("gradient+", "noise must be one of"),
        ("gradient,std=2", "noise must be one of"),
        ("gradient:colour=3", "colour.*batch, fraction, scope, std"),
        ("gradient:std=much", "std.*much"),
        ("gradient:std", "std"),
        ("gradient:std=-1", "std"),
        ("gradient:std=1,batch=2,std=4", "once, got 'std' twice in 'gradient:std=1,batch=2,std=4'"),
        ("gradient:std=nan", "std"),
        ("gradient:std=inf", "std"),
        ("gradient:fraction=1.5", r"fraction.*\[0, 1\].*1.5"),
        ("gradient:fraction=-0.1", "fraction"),
        ("gradient:fraction=nan", "fraction"),
        ("gradient:scope=column", "scope.*row, layer.*column"),
        ("gradient:batch=0", "batch"),
        ("gradient:batch=1.5", "batch.*whole"),
        ("input:kind=rain", "kind.*gaussian, impulse, blur, occlusion.*rain"),
        ("input:severity=6", "severity"),
        ("input:severity=0", "severity"),
        ("input:fraction=2", "fraction"),
        ("labels:kind=random", "kind"),
        ("labels:classes=1", "classes"),
        ("analog:levels=1", "levels"),
        ("analog:programming=-1", "programming"),
        ("analog:time=0.5", "time"),
        ("analog:stuck_off=0.7,stuck_on=0.4", "stuck_off and stuck_on must be together at most 1, got 0.7 and 0.4"),
        ("analog:stuck_on=1.5", r"stuck_on.*\[0, 1\]"),
        ("gradient:batch=1" + 400 * "0", "batch.*whole"),
        ("adversarial:attack=cw", "attack.*fgsm, pgd"),
        ("adversarial:norm=l0", "norm"),
        ("adversarial:budget=-1", "budget"),
        ("adversarial:steps=0", "steps"),
        ("poison:kind=silent", "kind"),
        ("poison:kind=gaussian,strength=-1", "strength"),
        ("poison:strength=inf", "strength"),
        ("needs", "needs size"),
        (3, "noise must be text"),
        (GradientNoise, "noise must be text"),
        (["gradient", b"labels"], "noise must be text"),
    ],
    ids=str,
)
def test_noise_that_is_not_understood(noise, message, monkeypatch):
    monkeypatch.setitem(NOISE_MODELS, "needs", Needs)
    with pytest.raises(ValueError, match=message):
        parse_noise(noise)


@pytest.mark.parametrize(("setting", "value"), [("std", "4"), ("std", True), ("batch", 2.0), ("scope", None)])
def test_settings_of_the_wrong_type(setting, value):
    with pytest.raises(ValueError, match=setting):
        GradientNoise(**{setting: value})


def test_a_registered_class_of_ones_own_is_found_by_name(monkeypatch):
    monkeypatch.setitem(NOISE_MODELS, "needs", Needs)
    assert parse_noise("needs:size=2.5").settings() == {"model": "Needs", "size": 2.5}


def test_a_chain_passes_each_hook_on_in_order():
    chain = parse_noise([Add(1.0), Multiply(3.0), Add(10.0)])
    matrix, state = torch.zeros(2, 4), generator()
    assert chain.apply(DenseFactor(matrix), state).matrix.unique().tolist() == [13]
    assert chain.apply_(DenseFactor(matrix), state).matrix.unique().tolist() == [13]
    assert not matrix.any()
    assert chain.disturb(torch.zeros(4), state, {}).unique().tolist() == [11]
    assert chain.corrupt([torch.zeros(1)], state, None, None)[0].tolist() == [11]
    assert chain.corrupt([], state, None, None) == []


def test_an_empty_chain_and_the_base_class_change_nothing():
    factor, weights, batches = DenseFactor(torch.ones(2, 3)), torch.ones(3), [torch.ones(1)]
    for noise in (NoiseChain(), NoiseModel()):
        assert noise.apply(factor, generator()) is factor and noise.apply_(factor, generator()) is factor
        assert noise.disturb(weights, generator(), {}) is weights
        assert noise.corrupt(batches, generator(), None, None) is batches


def test_a_chain_draws_from_one_state_and_repeats():
    chain, matrix = parse_noise("gradient+gradient+poison:kind=gaussian"), normal(6, 50, seed=1)
    first, again, other = (chain.apply(DenseFactor(matrix), generator(seed)).matrix for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("noise", "recorded"),
    [
        (None, None),
        ("poison:fraction=0.2", {"model": "PoisonedRows", "kind": "scale", "fraction": 0.2, "strength": 10.0}),
        (
            [Multiply(2), "labels:kind=pair"],
            [
                {"model": "Multiply", "by": 2},
                {"model": "LabelNoise", "kind": "pair", "fraction": 0.2, "classes": 0, "key": ""},
            ],
        ),
        (
            Multiply({"a": (1, None), "b": torch.ones(1)}),
            {"model": "Multiply", "by": {"a": [1, None], "b": "tensor([1.])"}},
        ),
    ],
    ids=str,
)
def test_what_is_recorded(noise, recorded):
    settings = parse_noise(noise).settings()
    assert settings == recorded and json.loads(json.dumps(settings)) == recorded


@dataclass(frozen=True, slots=True)
class Slotted(NoiseModel):
    std: float = 1.0


def test_the_fields_of_a_class_with_slots_are_recorded():
    assert Slotted(4.0).settings() == {"model": "Slotted", "std": 4.0}
    assert RowsOnly(Slotted(4.0)).settings() == {"model": "Slotted", "std": 4.0}
