"""The paper's gradient noise: which entries it hits, how strongly, and how it is asked for."""

import math

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.noise import NOISE_MODELS, GradientNoise, parse_noise
from tests.cases import generator, normal


def noise_of(model, matrix, seed=0):
    return model.apply(DenseFactor(matrix), generator(seed)).matrix - matrix


@pytest.mark.parametrize(("fraction", "hit"), [(0.0, 0), (0.1, 20), (0.25, 50), (1.0, 200)])
def test_number_of_entries_hit_in_each_row(fraction, hit):
    noise = noise_of(GradientNoise(2.0, fraction), normal(15, 200, seed=1))
    assert (noise != 0).sum(1).tolist() == [hit] * 15


@pytest.mark.parametrize("std", [0.5, 4.0])
def test_moments_in_units_of_the_rows_own_deviation(std):
    """Rows of different scale and mean; with N = 200 x 2,000 draws the standard error of the deviation is 0.1 %."""
    scales = torch.logspace(-3, 3, 200, dtype=torch.float64)[:, None]
    matrix = scales * (normal(200, 8_000, seed=2) + 1)
    noise = noise_of(GradientNoise(std, 0.25), matrix)
    drawn = (noise / matrix.std(1, correction=0, keepdim=True))[noise != 0]
    assert drawn.numel() == 200 * 2_000
    assert float(drawn.mean()) == pytest.approx(0, abs=5 * std / math.sqrt(drawn.numel()))
    assert float(drawn.std()) == pytest.approx(std, rel=0.006)
    assert float((drawn / std).pow(4).mean()) == pytest.approx(3, abs=0.1)  # Gaussian


def test_every_entry_is_as_likely_to_be_hit():
    hits = (noise_of(GradientNoise(1.0, 0.2), normal(4_000, 50, seed=3)) != 0).double().mean(0)
    assert float((hits - 0.2).abs().max()) < 5 * math.sqrt(0.2 * 0.8 / 4_000)


def test_rows_get_noise_of_their_own():
    noise = noise_of(GradientNoise(1.0, 1.0), normal(1, 500, seed=4).expand(2, 500).clone())
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.2


def test_a_seed_repeats_and_another_does_not():
    matrix, model = normal(5, 40, seed=5), GradientNoise(1.0, 0.5)
    state = torch.get_rng_state()
    assert torch.equal(noise_of(model, matrix, 1), noise_of(model, matrix, 1))
    assert not torch.equal(noise_of(model, matrix, 1), noise_of(model, matrix, 2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_given_is_left_alone(dtype):
    matrix = normal(5, 40, seed=6, dtype=dtype)
    before = matrix.clone()
    noisy = GradientNoise(3.0, 1.0).apply(DenseFactor(matrix), generator())
    assert torch.equal(matrix, before) and noisy.matrix.dtype == dtype
    assert not torch.equal(noisy.matrix, before)


@pytest.mark.parametrize("model", [GradientNoise(0.0, 0.5), GradientNoise(2.0, 0.0), GradientNoise(2.0, 0.001)])
def test_no_noise(model):
    assert not noise_of(model, normal(3, 20, seed=7)).any()


def test_a_constant_row_has_no_deviation_to_measure_by():
    assert not noise_of(GradientNoise(4.0, 1.0), torch.full((2, 30), 0.5)).any()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, None),
        ("gradient", GradientNoise()),
        ("gradient:", GradientNoise()),
        ("gradient:std=4,fraction=0.25", GradientNoise(4.0, 0.25)),
        ("gradient:fraction=1", GradientNoise(fraction=1.0)),
        (GradientNoise(2.0, 0.5), GradientNoise(2.0, 0.5)),
    ],
)
def test_noise_from_text(spec, expected):
    assert parse_noise(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "noise must be one of"),
        ("pink", "'pink'"),
        ("gradient:colour=3", "colour"),
        ("gradient:std=much", "std.*much"),
        ("gradient:std", "std"),
        ("gradient:std=-1", "std"),
        ("gradient:std=nan", "std"),
        ("gradient:std=inf", "std"),
        ("gradient:fraction=1.5", "fraction"),
        ("gradient:fraction=-0.1", "fraction"),
        ("gradient:fraction=nan", "fraction"),
    ],
)
def test_noise_that_is_not_understood(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_noise(spec)


def test_every_model_has_usable_defaults():
    for name in NOISE_MODELS:
        assert noise_of(parse_noise(name), normal(3, 50, seed=8)).any()
