"""The metric: against loops over weights, and against rescaling a network's layers, outputs and inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from swap_prune.problem import PruningProblem
from swap_prune.regression.metric import damped_metric, diagonal_metric
from swap_prune.selection import Layer, select_parameters
from tests.cases import generator

SHAPES = ((3, 4), (2, 3, 2, 2), (5,), (4, 1, 3, 3))


def layers() -> list[Layer]:
    found, start = [], 0
    for number, shape in enumerate(map(torch.Size, SHAPES)):
        found.append(Layer(str(number), slice(start, start + shape.numel()), shape))
        start += shape.numel()
    return found


def fisher() -> Tensor:
    total = layers()[-1].place.stop
    return torch.rand(total, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1


def test_diagonal_metric() -> None:
    f = torch.tensor([0.0, 1.0, 5.0])
    torch.testing.assert_close(diagonal_metric(f, 0.5), torch.tensor([1.0, 2.0, 6.0]))
    assert torch.equal(diagonal_metric(torch.zeros(3), 1.0), torch.ones(3))
    assert torch.equal(f, torch.tensor([0.0, 1.0, 5.0]))


def test_every_metric_is_what_a_loop_over_weights_says() -> None:
    f = fisher()
    for layer in layers():
        own = f[layer.place].view(layer.shape)
        mean = own.mean()
        for index in torch.cartesian_prod(*map(torch.arange, layer.shape)).view(-1, len(layer.shape)).tolist():
            at = tuple(index)
            alike = own[at[0]].mean() * own[:, at[1]].mean() / mean + 0.01 * mean if len(at) > 1 else mean
            place = layer.place.start + int(torch.arange(own.numel()).view(layer.shape)[at])
            for metric, b in (("diagonal", f.mean()), ("layer", mean), ("factored", alike)):
                found = damped_metric(f, 3.0, metric, layers())[place]
                torch.testing.assert_close(found, own[at] + 3 * b)
    assert torch.equal(damped_metric(f, 3.0, "identity", layers()), torch.ones_like(f))


def usual_weights() -> Tensor:
    """Weights of layers with a gain of 2 each; that of a vector tells nothing."""
    parts = []
    for layer in layers():
        part = torch.randn(layer.shape.numel(), generator=generator(3), dtype=torch.float64)
        parts.append(part / part.norm() * 2 * layer.shape[0] ** 0.5)
    parts[2] *= 1e5
    return torch.cat(parts)


@pytest.mark.parametrize("metric", ["diagonal", "layer", "factored"])
@pytest.mark.parametrize("unit", [1e-6, 0.04, 25.0, 1e6])
def test_a_layer_in_a_unit_of_its_own_is_measured_as_if_it_were_in_the_usual_one(metric: str, unit: float) -> None:
    f, w = fisher(), usual_weights()
    expected = damped_metric(f, 1.0, metric, layers())
    assert torch.equal(damped_metric(f, 1.0, metric, layers(), reference=w), expected)
    place = layers()[1].place
    f[place] /= unit**2
    w[place] *= unit
    expected[place] /= unit**2
    torch.testing.assert_close(damped_metric(f, 1.0, metric, layers(), reference=w), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("metric", ["diagonal", "layer", "factored"])
def test_units_that_differ_a_little_are_left_and_so_are_layers_without_weights(metric: str) -> None:
    f, w = fisher(), usual_weights()
    w[layers()[0].place] *= 19
    w[layers()[1].place] = 0
    assert torch.equal(damped_metric(f, 1.0, metric, layers(), reference=w), damped_metric(f, 1.0, metric, layers()))
    assert torch.equal(
        damped_metric(f, 1.0, metric, layers(), reference=0 * w), damped_metric(f, 1.0, metric, layers())
    )


@pytest.mark.parametrize("metric", ["layer", "factored"])
def test_scaling_a_layer_scales_its_own_metric_alone(metric: str) -> None:
    f = fisher()
    place = layers()[1].place
    scaled = f.clone()
    scaled[place] *= 9
    expected = damped_metric(f, 1.0, metric, layers())
    expected[place] *= 9
    torch.testing.assert_close(damped_metric(scaled, 1.0, metric, layers()), expected)


@pytest.mark.parametrize("of", ["outputs", "inputs"])
def test_the_factored_metric_follows_the_scale_of_outputs_and_inputs(of: str) -> None:
    shape = torch.Size((6, 5))
    f = fisher()[: shape.numel()].view(shape)
    scale = torch.logspace(0, 2, shape[0 if of == "outputs" else 1], dtype=f.dtype)
    scale = scale.unsqueeze(1) if of == "outputs" else scale

    def b(values: Tensor) -> Tensor:
        """The factored guess itself, without the share of the layer's mean."""
        m = damped_metric(values.reshape(-1), 1.0, "factored", [Layer("w", slice(0, shape.numel()), shape)])
        return m.view(shape) - values - 0.01 * values.mean()

    outer = torch.outer(f.mean(1), f.mean(0))
    torch.testing.assert_close(b(outer * scale), outer * scale)  # of rank 1: the guess is exact at any scale


@pytest.mark.parametrize("groups", [2, 6])
def test_the_groups_of_a_convolution_have_inputs_of_their_own(groups: int) -> None:
    convolution = nn.Conv2d(6, 12, 3, groups=groups)
    selection = select_parameters(nn.Sequential(convolution, nn.Conv2d(12, 4, 1)))
    assert selection.groups == {"0.weight": groups}
    outputs, inputs = (torch.rand(n, generator=generator(n)) + 0.1 for n in (12, 6))
    own = outputs.view(groups, -1, 1) * inputs.view(groups, 1, -1)  # what each output has of the inputs of its group
    f = torch.cat([own.reshape(12, -1, 1, 1).expand(convolution.weight.shape).reshape(-1), torch.rand(48)])
    problem = PruningProblem(torch.ones(len(f)), 3, selection=selection)
    size = convolution.weight.numel()
    m = damped_metric(f, 1.0, "factored", problem.layers(), problem.groups())[:size]
    torch.testing.assert_close(m, 2 * f[:size] + 0.01 * f[:size].mean())  # of rank 1 in each group: the guess is exact


@pytest.mark.parametrize("metric", ["diagonal", "layer", "factored"])
def test_weights_without_gradients_have_a_metric_above_zero(metric: str) -> None:
    f = fisher()
    f[layers()[1].place] = 0
    assert bool((damped_metric(f, 1.0, metric, layers()) > 0).all())
    assert torch.equal(damped_metric(torch.zeros_like(f), 1.0, metric, layers()), torch.ones_like(f))
