"""Corrupted inputs and wrong labels: how many, how strongly, in which batches."""

import math
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from swap_prune.fisher.noise import InputNoise, LabelNoise
from swap_prune.losses import cross_entropy
from tests.cases import generator, normal

KINDS = ("gaussian", "impulse", "blur", "occlusion")
Pair = namedtuple("Pair", "images labels")


def images(n=40, side=32, seed=0):
    return 3 * normal(n, 2, side, side, seed=seed) + 1


def corrupt(noise, batches, seed=0, model=None):
    return noise.corrupt(batches, generator(seed), model, cross_entropy)


def corrupted(noise, inputs, seed=0):
    ((noisy, _),) = corrupt(noise, [(inputs, torch.zeros(len(inputs)))], seed)
    return noisy


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_noise_in_units_of_the_sample(severity):
    inputs = images() * torch.logspace(-2, 2, 40, dtype=torch.float64)[:, None, None, None]
    noise = (corrupted(InputNoise("gaussian", severity), inputs) - inputs).flatten(1)
    unit = noise / inputs.flatten(1).std(1, correction=0, keepdim=True)
    expected = (0.35, 0.5, 0.8, 1.2, 1.7)[severity - 1]
    assert float(unit.std()) == pytest.approx(expected, rel=0.02)
    assert float(unit.mean()) == pytest.approx(0, abs=5 * expected / math.sqrt(unit.numel()))


@pytest.mark.parametrize("severity", range(1, 6))
def test_impulses_are_the_samples_own_extremes(severity):
    inputs = images()
    noisy = corrupted(InputNoise("impulse", severity), inputs)
    low, high = (bound[:, None] for bound in inputs.flatten(1).aminmax(dim=1))
    flat, changed = noisy.flatten(1), (noisy != inputs).flatten(1)
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    margin = 5 * math.sqrt(share / changed.numel())
    assert float(changed.double().mean()) == pytest.approx(share, abs=margin)
    assert float((changed & (flat == low)).double().mean()) == pytest.approx(share / 2, abs=margin)
    assert bool(((flat == low) | (flat == high) | ~changed).all())


def test_blur_is_a_convolution_with_a_gaussian():
    """An impulse far from the border becomes the kernel; sigma is 0.8 pixels at a side of 32, 1.6 at 64."""
    for side, sigma in ((32, 0.8), (64, 1.6)):
        inputs = torch.zeros(1, 1, side, side, dtype=torch.float64)
        inputs[0, 0, side // 2, side // 3] = 1
        place = torch.arange(side, dtype=torch.float64)
        rows, columns = (torch.exp(-((place - at) ** 2) / (2 * sigma**2)) for at in (side // 2, side // 3))
        expected = torch.outer(rows / rows.sum(), columns / columns.sum())
        torch.testing.assert_close(corrupted(InputNoise("blur", 4), inputs)[0, 0], expected)


def test_blur_keeps_a_constant_and_smooths_more_with_severity():
    constant = torch.full((2, 1, 20, 28), 3.0, dtype=torch.float64)
    torch.testing.assert_close(corrupted(InputNoise("blur", 5), constant), constant)
    spreads = [float(corrupted(InputNoise("blur", severity), images()).std()) for severity in range(1, 6)]
    assert spreads == sorted(spreads, reverse=True) and spreads[4] < 0.6 * spreads[0]


@pytest.mark.parametrize("severity", range(1, 6))
def test_occlusion_is_one_patch_inside_the_image(severity):
    noisy = corrupted(InputNoise("occlusion", severity), images(200, 30) + 100)
    hidden = noisy == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    side = 6 + 3 * (severity - 1)
    rows, columns = hidden[:, 0].any(2), hidden[:, 0].any(1)
    assert hidden[:, 0].sum((1, 2)).tolist() == [side * side] * 200
    for line in (rows, columns):
        assert line.sum(1).tolist() == [side] * 200
        starts = line.double().argmax(1)
        assert int(starts.min()) == 0 and int(starts.max()) == 30 - side


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_a_fraction_of_the_samples_over_all_batches(kind):
    inputs, labels = images(50, 8), torch.arange(50)
    batches = [(inputs[:13], labels[:13]), [inputs[13:14], labels[13:14]], Pair(inputs[14:], labels[14:])]
    before = inputs.clone()
    noisy = corrupt(InputNoise(kind, 5, 0.3), batches)
    assert [type(batch) for batch in noisy] == [tuple, list, Pair]
    changed = torch.cat([batch[0] for batch in noisy]) != inputs
    assert int(changed.flatten(1).any(1).sum()) == 15
    assert torch.equal(torch.cat([batch[1] for batch in noisy]), labels) and torch.equal(inputs, before)
    assert noisy[0][0].dtype == inputs.dtype


@pytest.mark.parametrize("noise", [*(InputNoise(kind) for kind in KINDS if kind != "blur"), LabelNoise(classes=4)])
def test_a_seed_repeats_and_another_does_not(noise):
    batch, state = (images(20, 8), torch.arange(20) % 4), torch.get_rng_state()
    first, again, other = (corrupt(noise, [batch], seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_in_mappings_and_alone():
    x = images(6, 8)
    (noisy,) = corrupt(InputNoise(key="x"), [{"x": x, "y": 3}])
    assert noisy["y"] == 3 and not torch.equal(noisy["x"], x)
    assert not torch.equal(corrupt(InputNoise(), [x])[0], x)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_a_fraction_of_the_labels_over_all_batches(kind, fraction):
    labels = torch.randint(5, (6_000,), generator=generator())
    batches = [(images(n, 2), part) for n, part in zip((7, 5_993), labels.split((7, 5_993)), strict=True)]
    noisy = torch.cat([batch[1] for batch in corrupt(LabelNoise(kind, fraction, 5), batches)])
    error = math.sqrt(6_000 * fraction * (1 - fraction))
    assert abs(int((noisy != labels).sum()) - 6_000 * fraction) <= 5 * error
    assert noisy.dtype == labels.dtype and int(noisy.min()) >= 0 and int(noisy.max()) < 5


def test_a_sample_that_comes_again_has_the_same_label_again():
    """In another batch, at another place, later in the run; but not in a run of another seed."""
    x, labels, source = images(200, 4), torch.arange(200) % 7, generator(1)
    noise = LabelNoise("symmetric", 0.5, 7)
    ((_, first),) = noise.corrupt([(x, labels)], source, None, None)
    torch.rand(5, generator=source)
    again = noise.corrupt([(x.flip(0)[:50], labels.flip(0)[:50]), (x[:150], labels[:150])], source, None, None)
    assert torch.equal(again[0][1], first.flip(0)[:50]) and torch.equal(again[1][1], first[:150])
    assert not torch.equal(corrupt(noise, [(x, labels)], 2)[0][1], first)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "classes"), [(torch.uint8, 200), (torch.int8, 100), (torch.int16, 5)])
def test_labels_of_few_bits_go_to_every_other_class_alike(dtype, classes):
    labels = (torch.arange(20_000) % classes).to(dtype)
    ((_, noisy),) = corrupt(LabelNoise("symmetric", 1.0, classes), [(images(20_000, 2), labels)])
    assert noisy.dtype == dtype and not bool((noisy == labels).any())
    shifts = (noisy.long() - labels.long()) % classes
    counts, expected = shifts.bincount(minlength=classes)[1:], 20_000 / (classes - 1)
    assert float((counts - expected).abs().max()) < 5 * math.sqrt(expected)
    with pytest.raises(ValueError, match=r"300 classes into labels of torch\.uint8: use int64"):
        corrupt(LabelNoise("symmetric", 1.0, 300), [(images(2, 2), torch.zeros(2, dtype=torch.uint8))])


def test_single_labels_may_be_missing():
    labels = torch.tensor([0, -100, 2, -100])
    ((_, noisy),) = corrupt(LabelNoise("pair", 1.0, 3), [(images(4, 2), labels)])
    assert noisy.tolist() == [1, -100, 0, -100]


def test_a_mapping_stays_one_of_its_kind():
    class Named(UserDict):
        def __getattr__(self, name):
            return self.data[name]

    batch = Named(x=images(4, 2), y=torch.tensor([0, 1, 2, 0]))
    (noisy,) = corrupt(LabelNoise("pair", 1.0, 3, "y"), [batch])
    assert isinstance(noisy, Named) and noisy.y.tolist() == [1, 2, 0, 1] and noisy.x is batch.x


def test_a_pair_flip_goes_to_the_next_class():
    labels = torch.arange(40) % 4
    ((_, noisy),) = corrupt(LabelNoise("pair", 1.0, 4), [(images(40, 4), labels)])
    assert noisy.tolist() == [(label + 1) % 4 for label in labels.tolist()]


@pytest.mark.long
def test_a_symmetric_flip_goes_to_every_other_class_alike():
    labels = torch.arange(4).repeat_interleave(3_000)
    ((_, noisy),) = corrupt(LabelNoise("symmetric", 1.0, 4), [(images(12_000, 2), labels)])
    table = torch.bincount(4 * labels + noisy, minlength=16).view(4, 4)
    expected = 1_000 * (1 - torch.eye(4))
    assert float((table - expected).abs().max()) < 5 * math.sqrt(1_000) and not table.diagonal().any()


def test_classes_are_those_of_the_network_unless_given():
    """Labels 0 and 1 alone: pair flips of 1 lead to 2 where the network has three outputs."""
    batch = (normal(30, 4, dtype=torch.float32), torch.arange(30) % 2)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ((_, noisy),) = corrupt(LabelNoise("pair", 1.0), [batch], model=model)
    assert noisy.unique().tolist() == [1, 2]
    assert model.training and int(model[1].num_batches_tracked) == 0
    ((_, noisy),) = corrupt(LabelNoise("pair", 1.0, 2), [batch])
    assert noisy.unique().tolist() == [0, 1]


def test_positions_without_a_label_stay_without():
    labels = torch.randint(3, (400, 6), generator=generator())
    labels[:, 4:] = -100
    (noisy,) = corrupt(LabelNoise("symmetric", 0.5, 3, "y"), [{"x": images(400, 2), "y": labels}])
    assert bool((noisy["y"][:, 4:] == -100).all())
    wrong = (noisy["y"] != labels)[:, :4]
    assert abs(int(wrong.sum()) - 800) < 5 * 20 and {0, 4} < set(wrong.sum(1).tolist()), "each position by itself"


BAD = {
    "tokens": (InputNoise(), (torch.zeros(3, 4).long(), torch.zeros(3).long()), "floating-point"),
    "no key": (InputNoise(), {"x": torch.zeros(2, 3)}, r"\['x'\].*key=''"),
    "other key": (LabelNoise(key="z"), {"x": torch.zeros(2, 3)}, "key='z'"),
    "no tensor": (InputNoise(), ("text", torch.zeros(1)), "tensor"),
    "no labels": (LabelNoise(classes=3), torch.zeros(2, 3), "labels"),
    "one part": (LabelNoise(classes=3), (torch.zeros(2, 3),), "labels"),
    "soft labels": (LabelNoise(classes=3), (torch.zeros(2, 3), torch.zeros(2, 3)), "class indices"),
    "label out of range": (LabelNoise(classes=3), (torch.zeros(2, 3), torch.tensor([0, 3])), "labels out of range"),
    "no images": (InputNoise("blur"), (torch.zeros(2, 3), torch.zeros(2)), "channels, side.*kind=gaussian"),
    "classes not known": (LabelNoise(), (torch.zeros(2, 3), torch.zeros(2).long()), "set classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_batches_that_noise_cannot_read(case):
    noise, batch, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        corrupt(noise, [batch], model=nn.Linear(5, 3))
