"""Gauss-Newton rows: against the matrix itself, written out, and gradients through mini-batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from swap_prune.fisher.capture import sketch
from swap_prune.fisher.capture.sketch import CurvatureSketch, sketch_curvature, sketch_draws, sketch_rows
from swap_prune.losses import CrossEntropy, GaussNewtonLoss, cross_entropy
from swap_prune.samples.batches import batch_size, slice_batch
from swap_prune.selection import select_parameters
from tests.cases import generator


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


def labelled(n: int, *shape: int, classes: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    state = generator(1)
    return torch.randn(n, *shape, generator=state, dtype=dtype), torch.randint(classes, (n,), generator=state)


def all_signs(size: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_root_over_all_signs_is_the_second_derivative_of_the_loss(temperature: float) -> None:
    z, label = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64), torch.tensor(2)
    signs = all_signs(4)
    loss = CrossEntropy(temperature)
    roots = loss.curvature_root(z.expand(len(signs), 4), (None, label.expand(len(signs))), signs)

    def tempered(outputs: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, label)

    expected = torch.autograd.functional.hessian(tempered, z / temperature)
    torch.testing.assert_close(roots.T @ roots / len(signs), expected)


def test_positions_share_the_root_and_those_without_a_target_have_none() -> None:
    state = generator(3)
    z = torch.randn(1, 3, 2, generator=state, dtype=torch.float64)
    targets = torch.tensor([[1, 2]])
    signs = all_signs(6).view(-1, 3, 2)

    def second_moment(labels: Tensor) -> Tensor:
        outputs = z.expand(len(signs), 3, 2)
        roots = CrossEntropy(1.0).curvature_root(outputs, (None, labels.expand(len(signs), 2)), signs).flatten(1)
        return roots.T @ roots / len(signs)

    def mean_loss(outputs: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.view(1, 3, 2), targets, ignore_index=-100)

    torch.testing.assert_close(second_moment(targets), torch.autograd.functional.hessian(mean_loss, z.flatten()))
    targets = torch.tensor([[1, -100]])
    torch.testing.assert_close(second_moment(targets), torch.autograd.functional.hessian(mean_loss, z.flatten()))


def product_of(loss: GaussNewtonLoss, model: nn.Module, batch: Any, signs: Tensor) -> Tensor:
    """``<z, L xi>``, summed over the samples."""
    root = loss.curvature_root(loss.outputs(model, batch).detach(), batch, signs)
    return CurvatureSketch(loss)(model, (batch, root)).sum()


def test_rows_are_draws_from_the_gauss_newton_matrix() -> None:
    """Over all signs the mean of g g^T of one sample is J^T H J, written out."""
    model, (x, y) = perceptron(), labelled(1, 5)
    selection = select_parameters(model, ("Linear",), ())
    weights = {name: dict(model.named_parameters())[name].detach() for name in selection.names}
    jacobians = jacrev(lambda w: functional_call(model, w, (x,))[0])(weights)
    J = torch.cat([jacobians[name].reshape(3, -1) for name in selection.names], 1)
    q = (model(x)[0] / 4).softmax(0).detach()
    expected = J.T @ (torch.diag(q) - torch.outer(q, q)) @ J
    rows = []
    for signs in all_signs(3):
        product = product_of(cross_entropy, model, (x, y), signs[None])
        gradients = torch.autograd.grad(product, [dict(model.named_parameters())[name] for name in selection.names])
        rows.append(torch.cat([g.flatten() for g in gradients]))
    G = torch.stack(rows)
    torch.testing.assert_close(G.T @ G / len(G), expected)


def test_captured_rows_are_those_of_the_signs_drawn() -> None:
    model, batch = perceptron(), labelled(7, 5)
    selection = select_parameters(model, ("Linear",), ())
    capture = sketch_curvature(model, selection, [batch], cross_entropy, generator(5), in_batches=False)
    signs = sketch.draw_signs(model(batch[0]), generator(5))
    parameters = [dict(model.named_parameters())[name] for name in selection.names]
    for i, row in enumerate(capture.factor.matrix):
        value = product_of(cross_entropy, model, slice_batch(batch, i, i + 1), signs[i : i + 1])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
        torch.testing.assert_close(row, expected)
    torch.testing.assert_close(capture.losses, cross_entropy(model, batch).detach())


def test_a_loss_that_fails_beyond_the_first_samples_is_named() -> None:
    class Late(CrossEntropy):
        def losses(self, outputs: Tensor, batch: Any) -> Tensor:
            if len(outputs) == 5:
                raise KeyError("sample 5")
            return super().losses(outputs, batch)

    model, selection = perceptron(), select_parameters(perceptron(), ("Linear",), ())
    with pytest.raises(ValueError, match="failed on a calibration batch"):
        sketch_curvature(model, selection, [labelled(7, 5), labelled(5, 5)], Late(), generator(5), in_batches=False)


@pytest.mark.parametrize(
    ("n", "size", "parts"),
    [(32, 16, 2), (40, 16, 3), (33, 16, 3), (130, 16, 9), (1, 16, 1), (40, 20, 2), (40, 2, 20), (9, 99, 1)],
)
def test_mini_batch_rows_go_through_the_statistics_of_their_batch(n: int, size: int, parts: int) -> None:
    """One row a batch, the gradient of the scaled product with BatchNorm in training mode."""
    model = normalised().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = labelled(n, 1, 6, 6, classes=4, dtype=torch.float32)
    selection = select_parameters(model, ("Conv2d", "Linear"), ())
    how: dict[str, Any] = {"in_batches": True, "mini_batch": size}
    capture = sketch_curvature(model, selection, [batch], cross_entropy, generator(2), **how)
    rows = capture.factor.matrix
    assert rows.shape == (parts, selection.total) and sketch_rows(n, **how) >= len(rows)
    assert len(capture.losses) == n
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module.training for module in model.modules())
    model.train()
    state = generator(2)
    first = slice_batch(batch, 0, n // parts)  # parts are alike
    outputs = model(first[0])
    parameters = [dict(model.named_parameters())[name] for name in selection.names]
    root = cross_entropy.curvature_root(outputs.detach(), first, sketch.draw_signs(outputs, state))
    product = (outputs * root).sum()
    gradients = torch.autograd.grad(product / batch_size(first) ** 0.5, parameters)
    torch.testing.assert_close(rows[0], torch.cat([g.flatten() for g in gradients]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(capture.losses[: len(first[1])], cross_entropy.losses(outputs, first).detach())
    assert len(capture.sizes) == parts
    torch.testing.assert_close(capture.sizes[0], root.square().sum(1).mean().sqrt())


def test_weights_without_gradients_are_left_without() -> None:
    model, batch = normalised(), labelled(20, 1, 6, 6, classes=4, dtype=torch.float32)
    model.requires_grad_(False)
    selection = select_parameters(model, ("Conv2d", "Linear"), ())
    rows = sketch_curvature(model, selection, [batch], cross_entropy, generator(2), in_batches=True).factor.matrix
    assert bool((rows != 0).any())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        CrossEntropy(temperature)


def test_what_counts_as_a_loss_that_knows_its_curvature() -> None:
    assert isinstance(cross_entropy, GaussNewtonLoss)
    assert not isinstance(lambda model, batch: model(batch), GaussNewtonLoss)


def test_samples_give_several_rows_of_draws_of_their_own_where_they_are_few() -> None:
    model, batches = perceptron(), [labelled(4, 5), labelled(3, 5)]
    selection = select_parameters(model, ("Linear",), ())
    capture = sketch_curvature(model, selection, batches, cross_entropy, generator(5), in_batches=False, draws=3)
    assert capture.factor.shape[0] == len(capture.sizes) == 14 and len(capture.losses) == 7, (
        "of three classes, two each"
    )
    state, expected, sizes = generator(5), [], []
    for batch in batches:
        z = model(batch[0])
        for _ in range(2):
            root = cross_entropy.curvature_root(z.detach(), batch, sketch.draw_signs(z, state))
            for i in range(len(root)):
                gradients = torch.autograd.grad((z[i] * root[i]).sum(), [*model.parameters()], retain_graph=True)
                by_name = dict(zip(dict(model.named_parameters()), gradients, strict=True))
                expected.append(torch.cat([by_name[name].flatten() for name in selection.names]))
            sizes.append(root.norm(dim=1))
    torch.testing.assert_close(capture.factor.matrix, torch.stack(expected))
    torch.testing.assert_close(capture.sizes, torch.cat(sizes))
    losses = [cross_entropy.losses(model(batch[0]), batch).detach() for batch in batches]
    torch.testing.assert_close(capture.losses, torch.cat(losses))


@pytest.mark.parametrize(
    ("samples", "weights", "draws"),
    [(1, 100, 8), (50, 100, 8), (200, 100, 5), (512, 100, 2), (513, 100, 1), (1024, 100, 1), (50, 1_000_000, 2)],
)
def test_signs_are_drawn_more_often_for_few_samples_while_rows_take_little(
    samples: int, weights: int, draws: int
) -> None:
    assert sketch_draws(samples, weights) == draws
    assert sketch_draws(samples, 2**31) == 1
