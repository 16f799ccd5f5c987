"""The paper's gradient noise and poisoned rows: what they hit, how strongly, in how much memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.noise import GradientNoise, PoisonedRows
from tests.cases import generator, normal

LAYERS = {"a": slice(0, 150), "b": slice(150, 200)}
MODELS = (
    GradientNoise(3.0, 1.0),
    GradientNoise(3.0, 0.5, "layer", 2),
    PoisonedRows("scale", 0.4),
    PoisonedRows("gaussian", 0.4),
    PoisonedRows("omniscient", 0.4),
)


def noise_of(model, matrix, seed=0, layers=None):
    return model.apply(DenseFactor(matrix), generator(seed), layers).matrix - matrix


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


def test_rows_get_noise_of_their_own_unless_they_share_a_mini_batch():
    matrix = normal(7, 500, seed=4) * torch.arange(1, 8, dtype=torch.float64)[:, None]
    deviations = matrix.std(1, correction=0, keepdim=True)
    lone = noise_of(GradientNoise(1.0, 1.0), matrix) / deviations
    assert float((torch.corrcoef(lone) - torch.eye(7, dtype=torch.float64)).abs().max()) < 0.2
    shared = noise_of(GradientNoise(1.0, 0.3, batch=3), matrix) / deviations
    for start, stop in ((0, 3), (3, 6), (6, 7)):
        torch.testing.assert_close(shared[start:stop], shared[start].expand(stop - start, -1))
    assert not ((shared[0] != 0) == (shared[3] != 0)).all()


def test_layers_get_their_own_hits_in_their_own_units():
    matrix = normal(400, 200, seed=5)
    matrix[:, LAYERS["a"]] *= 1e-3
    noise = noise_of(GradientNoise(2.0, 0.1, "layer"), matrix, layers=LAYERS)
    for part, hit in ((LAYERS["a"], 15), (LAYERS["b"], 5)):
        drawn, own = noise[:, part], matrix[:, part].std(1, correction=0, keepdim=True)
        assert (drawn != 0).sum(1).tolist() == [hit] * 400
        assert float((drawn / own)[drawn != 0].std()) == pytest.approx(2.0, rel=0.1)
    with pytest.raises(ValueError, match="scope=layer"):
        noise_of(GradientNoise(scope="layer"), matrix)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind", ["scale", "gaussian", "omniscient"])
def test_number_of_rows_poisoned(kind, fraction):
    hit = (noise_of(PoisonedRows(kind, fraction, 2.0), normal(40, 30, seed=6)) != 0).any(1)
    assert int(hit.sum()) == round(40 * fraction)


def test_what_an_attacker_writes():
    matrix = normal(50, 4_000, seed=7) + 0.5
    flipped = noise_of(PoisonedRows("scale", 0.2, -1.0), matrix) + matrix
    hit = (flipped != matrix).any(1)
    torch.testing.assert_close(flipped[hit], -matrix[hit])
    sent = noise_of(PoisonedRows("omniscient", 0.2, 3.0), matrix) + matrix
    hit = (sent != matrix).any(1)
    torch.testing.assert_close(sent[hit], -3 * matrix[~hit].mean(0).expand(10, -1))
    drawn = noise_of(PoisonedRows("gaussian", 0.2, 5.0), matrix) + matrix
    hit = (drawn != matrix).any(1)
    sizes = drawn[hit].square().mean(1).sqrt() / matrix[hit].square().mean(1).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 5.0), rtol=0.06, atol=0)
    assert float(drawn[hit].mean()) == pytest.approx(0, abs=5 * 5 * 1.12 / math.sqrt(10 * 4_000))


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_seed_repeats_and_another_does_not(model):
    matrix = normal(9, 200, seed=8)
    state = torch.get_rng_state()
    assert torch.equal(noise_of(model, matrix, 1, LAYERS), noise_of(model, matrix, 1, LAYERS))
    assert not torch.equal(noise_of(model, matrix, 1, LAYERS), noise_of(model, matrix, 2, LAYERS))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_apply_leaves_the_factor_alone_and_the_pipelines_form_needs_no_other(model, dtype):
    matrix = normal(9, 200, seed=9, dtype=dtype)
    before = matrix.clone()
    noisy = model.apply(DenseFactor(matrix), generator(), LAYERS)
    assert torch.equal(matrix, before) and noisy.matrix.dtype == dtype
    assert not torch.equal(noisy.matrix, before)
    in_place = model.apply_(DenseFactor(matrix), generator(), LAYERS)
    assert in_place.matrix is matrix and torch.equal(matrix, noisy.matrix)


class LargestTensor(TorchDispatchMode):
    """Watches for the largest tensor that does not lie in G's own memory."""

    def __init__(self, matrix):
        super().__init__()
        self.own, self.numel = matrix.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.own:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_pipelines_form_allocates_vectors_only(model):
    matrix = normal(30, 200, seed=10)
    with LargestTensor(matrix) as watch:
        model.apply_(DenseFactor(matrix), generator(), LAYERS)
    assert 0 < watch.numel <= 200


@pytest.mark.parametrize(
    "model",
    [GradientNoise(0.0, 0.5), GradientNoise(2.0, 0.0), GradientNoise(2.0, 0.001), PoisonedRows("scale", 0.5, 1.0)],
)
def test_no_noise(model):
    assert not noise_of(model, normal(3, 20, seed=11)).any()


def test_a_constant_row_has_no_deviation_to_measure_by():
    assert not noise_of(GradientNoise(4.0, 1.0), torch.full((2, 30), 0.5)).any()


def test_few_rows_are_poisoned_as_often_as_many():
    """Gradients of a few batches: a tenth of four is none by rounding, and four in ten draws by right."""
    rows, source = normal(4, 30, seed=6), generator(2)
    noise = PoisonedRows("scale", 0.1, 100.0)
    hits = [int((noise.apply(DenseFactor(rows), source).matrix != rows).any(1).sum()) for _ in range(2_000)]
    assert set(hits) == {0, 1} and sum(hits) == pytest.approx(800, abs=5 * 22)


@pytest.mark.long
def test_the_unit_of_short_rows_is_the_deviation_of_the_population():
    matrix = normal(20_000, 2, seed=8)
    noise = noise_of(GradientNoise(1.0, 1.0), matrix) / matrix.std(1, correction=0, keepdim=True)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.03)  # with that of a sample it would be 1.41
