"""Analog memory: each effect alone against its closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from swap_prune.fisher.noise import AnalogMemory
from swap_prune.selection import select_parameters
from swap_prune.surgery.weights import temporary_weights
from tests.cases import generator, normal

IDEAL = AnalogMemory(programming=0.0)
ONE = {"all": slice(0, 40_000)}


def uniform(seed=0):
    """Weights whose conductances fill the range, the largest 1."""
    weights = 2 * torch.rand(40_000, generator=generator(seed), dtype=torch.float64) - 1
    weights[0] = 1
    return weights


def test_ideal_cells_hold_the_weights():
    weights = 7 * uniform()
    torch.testing.assert_close(IDEAL.disturb(weights, generator(), ONE), weights)


@pytest.mark.parametrize("levels", [2, 5, 16])
def test_quantisation_goes_to_the_nearest_level(levels):
    weights = 3 * uniform()
    read = replace(IDEAL, levels=levels).disturb(weights, generator(), ONE)
    step = 3 / (levels - 1)
    assert len(read.unique()) == 2 * levels - 1  # both signs share zero
    torch.testing.assert_close((read / step).round() * step, read)
    assert float((read - weights).abs().max()) <= step / 2 + 1e-9
    assert float((read - weights).std()) == pytest.approx(step / math.sqrt(12), rel=0.03)


def test_each_layer_has_its_own_scale():
    weights = torch.cat([100 * uniform(1)[:100], uniform(2)[:100] / 100, torch.zeros(10, dtype=torch.float64)])
    layers = {"a": slice(0, 100), "b": slice(100, 200), "zero": slice(200, 210)}
    read = AnalogMemory(levels=16, programming=0.01, read=0.01, stuck_on=0.1).disturb(weights, generator(), layers)
    assert float((read - weights)[:100].abs().max()) > 1 and not read[200:].any()
    assert float((read - weights)[100:200].abs().max()) < 2.5 * float(weights[100:200].abs().max())


def test_programming_noise_has_its_deviation_and_stays_in_range():
    """In the middle of the range a weight's own cell is off by N(0, 0.05^2), its partner at 0 by the upper half."""
    weights = torch.full((40_000,), 0.5, dtype=torch.float64)
    weights[0] = 1
    error = (AnalogMemory(programming=0.05).disturb(weights, generator(), ONE) - weights)[1:]
    half_mean, half_square = 0.05 / math.sqrt(2 * math.pi), 0.05**2 / 2
    assert float(error.mean()) == pytest.approx(-half_mean, abs=0.002)
    assert float(error.var()) == pytest.approx(0.05**2 + half_square - half_mean**2, rel=0.04)
    read = AnalogMemory(programming=5.0).disturb(weights, generator(), ONE)
    assert float(read.abs().max()) <= 1


def test_read_noise_comes_from_both_cells():
    error = AnalogMemory(programming=0.0, read=0.02).disturb(4 * uniform(), generator(), ONE) - 4 * uniform()
    assert float(error.std()) == pytest.approx(4 * 0.02 * math.sqrt(2), rel=0.02)
    assert float(error.mean()) == pytest.approx(0, abs=5 * 0.08 * math.sqrt(2) / 200)


def test_drift_is_a_power_law():
    weights = uniform()
    for time in (1.0, 10.0, 1e6):
        read = replace(IDEAL, drift=0.07, time=time).disturb(weights, generator(), ONE)
        torch.testing.assert_close(read, weights * time**-0.07)


def test_drift_exponents_spread_from_cell_to_cell():
    weights = uniform()
    read = replace(IDEAL, drift=0.05, spread=0.01, time=1e4).disturb(weights, generator(), ONE)
    exponents = -(read / weights).log() / math.log(1e4)
    assert float(exponents.mean()) == pytest.approx(0.05, abs=5 * 0.01 / 200)
    assert float(exponents.std()) == pytest.approx(0.01, rel=0.02)


def test_stuck_cells_read_nothing_or_everything():
    weights = uniform()
    off = replace(IDEAL, stuck_off=0.2).disturb(weights, generator(), ONE)
    lost = off != weights
    assert not off[lost].any()
    assert float(lost.double().mean()) == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 40_000))
    on = replace(IDEAL, stuck_on=0.1).disturb(weights, generator(), ONE)
    assert float((on == weights).double().mean()) == pytest.approx(0.81, abs=0.01)  # neither cell of the pair
    full = replace(IDEAL, stuck_on=1.0).disturb(weights, generator(), ONE)
    assert not full.any()  # the two cells of a pair cancel


def test_stuck_cells_do_not_drift():
    """After all else has faded, a pair reads 1 or -1 where one cell is stuck on, and 0 where none or both are."""
    read = replace(IDEAL, stuck_on=0.1, time=1e12, drift=1.0).disturb(uniform(), generator(), ONE)
    torch.testing.assert_close(read, read.round())
    for value in (1, -1):
        assert float((read.round() == value).double().mean()) == pytest.approx(0.09, abs=5 * math.sqrt(0.09 / 40_000))


def test_settings_differ_in_nothing_but_themselves():
    """The programming noise of one seed is the same with and without drift."""
    weights, noise = uniform(), AnalogMemory(programming=0.03)
    young, old = (replace(noise, time=t).disturb(weights, generator(3), ONE) for t in (1.0, 100.0))
    torch.testing.assert_close(old, young * 100**-0.05)


def test_a_seed_repeats_and_another_does_not():
    weights, noise, state = uniform(), AnalogMemory(read=0.01), torch.get_rng_state()
    before = weights.clone()
    first, again, other = (noise.disturb(weights, generator(seed), ONE) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(weights, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_replaced_for_a_while_and_given_back_bit_by_bit(dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    model[0].weight.data[0, 0] = float("nan")
    selection = select_parameters(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameter, other = model[0].weight, normal(18, dtype=torch.float32)

    def unchanged():
        return all(torch.equal(v.view(torch.uint8), before[k].view(torch.uint8)) for k, v in model.state_dict().items())

    with temporary_weights(model, selection, other):
        assert torch.equal(selection.read(model), other.to(dtype).float())
        assert torch.equal(model[0].bias, before["0.bias"])
    assert unchanged() and model[0].weight is parameter
    with pytest.raises(KeyboardInterrupt), temporary_weights(model, selection, other):
        model[1].weight.data.zero_()
        raise KeyboardInterrupt
    assert unchanged()


def test_cells_are_stuck_off_and_on_apart():
    """As many of either as is said, and none both: an off cell reads 0, an on cell 1."""
    memory = AnalogMemory(programming=0.0, stuck_off=0.3, stuck_on=0.3)
    read = memory._cells(torch.full((20_000,), 0.5), generator(3))
    shares = [float((read == value).double().mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.02)
