"""Doubt about labels: found where they were altered, at the rate at which they were, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swap_prune.losses import CrossEntropy
from swap_prune.sample_defence.labels import doubt_labels

CLASSES = 10


def drawn(n: int, seed: int = 0, sharpness: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits of a calibrated network and labels drawn from its own predictions."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, CLASSES, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def doubt(logits: Tensor, labels: Tensor) -> float:
    found = doubt_labels(CrossEntropy(), [logits], [(logits, labels)])
    return 0.0 if found is None else found.rate


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("seed", range(5))
def test_labels_from_a_calibrated_network_are_believed(seed: int, sharpness: float) -> None:
    assert doubt(*drawn(500, seed, sharpness)) == 0


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_the_rate_of_replaced_labels_is_found(rate: float) -> None:
    logits, labels = drawn(4000)
    generator = torch.Generator().manual_seed(1)
    replaced = torch.rand(len(labels), generator=generator) < rate
    labels = torch.where(replaced, torch.randint(CLASSES, labels.shape, generator=generator), labels)
    assert doubt(logits, labels) == pytest.approx(rate, abs=0.04)


@pytest.mark.parametrize("temperature", [1.5, 3.0, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_is_too_sure_of_itself_is_not_contradicted_by_labels(temperature: float, seed: int) -> None:
    """As on inputs unlike those of training; labels that were replaced are found beside that."""
    logits, labels = drawn(4000, seed)
    assert doubt(temperature * logits, labels) == 0
    generator = torch.Generator().manual_seed(seed)
    replaced = torch.rand(len(labels), generator=generator) < 0.25
    mixed = torch.where(replaced, torch.randint(CLASSES, labels.shape, generator=generator), labels)
    found = doubt_labels(CrossEntropy(), [temperature * logits], [(logits, mixed)])
    assert found is not None and found.rate == pytest.approx(0.25, abs=0.04) and found.temperature == temperature
    calibrated = doubt_labels(CrossEntropy(), [logits], [(logits, mixed)])
    assert calibrated is not None and calibrated.temperature == 1.0
    trusts = found.trust(temperature * logits, mixed), calibrated.trust(logits, mixed)
    torch.testing.assert_close(*trusts, atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [30.0, 300.0, 3000.0])
def test_a_network_whose_logits_are_huge_is_not_contradicted_either(temperature: float) -> None:
    logits, labels = drawn(4000)
    assert doubt(temperature * logits, labels) == 0


def test_trust_is_the_posterior_of_bayes() -> None:
    logits, labels = drawn(2000)
    wrong = (labels + 1) % CLASSES
    mixed = torch.cat([labels[:1000], wrong[1000:]])
    found = doubt_labels(CrossEntropy(), [logits], [(logits, mixed)])
    assert found is not None
    trust = found.trust(logits, mixed)
    q = logits.double().softmax(1)[torch.arange(2000), mixed]
    expected = (1 - found.rate) * q / ((1 - found.rate) * q + found.rate / CLASSES)
    assert torch.allclose(trust.double(), expected, atol=1e-6)
    assert trust[:1000].mean() > 0.7 > 0.3 > trust[1000:].mean()


def test_where_labels_are_no_single_classes_there_is_no_doubt() -> None:
    logits, labels = drawn(500)
    wrong = (labels + 1) % CLASSES
    assert doubt(logits, wrong) > 0.5
    soft = torch.nn.functional.one_hot(wrong, CLASSES).float()
    assert doubt_labels(CrossEntropy(), [logits], [(logits, soft)]) is None
    assert doubt_labels(lambda model, batch: wrong, [logits], [(logits, wrong)]) is None
    assert doubt_labels(CrossEntropy(), [], []) is None
    tokens = [(torch.zeros(2, n), torch.zeros(2, n).long()) for n in (3, 5)]  # of several lengths
    assert doubt_labels(CrossEntropy(), [torch.zeros(2, CLASSES, n) for n in (3, 5)], tokens) is None
