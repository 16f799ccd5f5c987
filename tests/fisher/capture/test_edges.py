"""Rows, sizes and files at the edge of what is told apart."""

import pytest
import torch
from torch import nn

from swap_prune.fisher.backends.half import HalfFactor
from swap_prune.fisher.backends.mapped import MappedFactor
from swap_prune.fisher.capture import sketch
from swap_prune.fisher.capture.footprint import saved_bytes
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.capture.sketch import mini_batches, sketch_curvature
from swap_prune.fisher.defence.exact import outer_product_layers
from swap_prune.fisher.defence.gradients import layers_of, rank_noise
from swap_prune.fisher.defence.outliers import clip_rows_
from swap_prune.fisher.factor import DenseFactor
from swap_prune.losses import cross_entropy
from swap_prune.samples.batches import batch_size
from swap_prune.selection import select_parameters
from swap_prune.surgery.weights import write_weights
from tests.cases import generator, normal
from tests.fisher.backends.test_storage import mapped
from tests.fisher.capture.test_sketch import labelled
from tests.fisher.capture.test_sketch import perceptron as double_perceptron
from tests.fisher.defence.test_gradients import perceptron
from tests.fisher.defence.test_outliers import rows


def test_the_size_expected_of_a_row_is_that_of_its_root():
    model, batch = double_perceptron(), labelled(7, 5)
    selection = select_parameters(model, ("Linear",), ())
    capture = sketch_curvature(model, selection, [batch], cross_entropy, generator(5), in_batches=False)
    z = model(batch[0]).detach()
    root = cross_entropy.curvature_root(z, batch, sketch.draw_signs(z, generator(5)))
    torch.testing.assert_close(capture.sizes, root.flatten(1).norm(dim=1))


def test_a_batch_of_one_sample_is_left_out_where_there_are_others():
    x, y = labelled(17, 5)
    parts = mini_batches([(x[:16], y[:16]), (x[16:], y[16:])])
    assert [batch_size(part) for part in parts] in ([16], [17])
    assert len(mini_batches([(x[:1], y[:1])])) == 1


def test_little_noise_in_one_layer_or_one_row_is_seen():
    model, selection, batch = perceptron()
    layers = layers_of(selection, outer_product_layers(model, selection, cross_entropy, batch))
    clean = capture_gradients(model, selection, [batch], cross_entropy).factor.matrix
    for name, place in selection.slices().items():
        noisy = clean.clone()
        noise = normal(*noisy[:, place].shape, seed=1, dtype=torch.float32)
        noisy[:, place] += noise * (0.05 * noisy[:, place].norm() / noise.norm())
        assert 1e-3 < rank_noise(DenseFactor(noisy), layers)[name] < 5e-3, name
    one = clean.clone()
    one[20] += normal(one.shape[1], seed=2, dtype=torch.float32) * one[20].std()
    assert max(rank_noise(DenseFactor(one), layers).values()) > 1e-4


def test_six_times_the_median_stands_out_where_rows_are_alike():
    matrix = rows()
    matrix[5] *= 6
    assert clip_rows_(DenseFactor(matrix)) == pytest.approx(1 / 40)


def test_a_row_whose_squares_are_too_large_comes_down_to_the_median_and_not_to_nothing():
    matrix = rows()
    matrix[5] *= 1e25
    assert clip_rows_(DenseFactor(matrix)) == pytest.approx(1 / 40)
    norms = torch.linalg.vector_norm(matrix, dim=1)
    assert float(norms[5]) == pytest.approx(float(norms.median()), rel=0.05)


@pytest.mark.parametrize(("size", "clipped"), [(30.0, 0), (100.0, 1)])
def test_the_limit_is_eight_times_the_spread(size, clipped):
    """The upper quartile is e^0.5 times the median, so that the limit is e^4 = 55 times."""
    norms = torch.exp(torch.linspace(-1, 1, 41, dtype=torch.float64))
    norms[-1] = size
    unit = torch.nn.functional.normalize(rows(41).double(), dim=1)
    assert clip_rows_(DenseFactor(unit * norms.unsqueeze(1))) == pytest.approx(clipped / 41)


def test_rows_of_zero_say_nothing_of_the_median():
    matrix = torch.nn.functional.normalize(rows(), dim=1)
    matrix[:30] = 0
    matrix[35] *= 100
    assert clip_rows_(DenseFactor(matrix)) == pytest.approx(1 / 40)
    assert float(matrix[35].norm()) == pytest.approx(1)


def test_the_largest_entry_below_a_power_of_two_is_stored():
    """In [2^15, 2^16) it would round to infinity."""
    row = torch.tensor([[1 - 2.0**-24, 1e-3]])
    torch.testing.assert_close(HalfFactor.of(row, torch.float16).columns(torch.arange(2)), row, rtol=2.0**-11, atol=0)


def test_a_file_of_another_byte_order_or_size_is_refused(tmp_path):
    path = mapped(normal(5, 40).float(), tmp_path).path
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"little"', b'"bigbig"'))
    with pytest.raises(ValueError, match="another format or machine"):
        MappedFactor.open(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"has .* bytes where"):
        MappedFactor.open(path)


def test_weights_are_not_counted_among_what_a_sample_keeps_and_rows_are():
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 30))
    x = torch.randn(1, 300)
    kept = saved_bytes(lambda: model(x), model.parameters())
    assert 4 * 300 <= kept.total < 4 * 300 * 8 and kept.largest <= kept.total
    selection = select_parameters(model)
    batch = torch.randn(40, 300), torch.arange(40) % 3
    from unittest import mock

    with mock.patch("swap_prune.fisher.storage.CHUNK_BYTES", 10 * 4 * selection.total):
        assert capture_gradients(model, selection, [batch], cross_entropy, backend="vmap").chunk in (8, 9)


def test_a_small_negative_weight_keeps_its_sign_in_half_precision():
    model = nn.Linear(3, 1, bias=False).half()
    selection = select_parameters(model)
    write_weights(model, selection, torch.tensor([-1e-12, 1e-12, 0.5]), torch.tensor([True, True, True]))
    least = torch.finfo(torch.float16).smallest_normal
    assert model.weight[0].tolist() == [-least, least, 0.5]
