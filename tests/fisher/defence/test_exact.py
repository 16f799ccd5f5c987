"""Which layers have gradients of rank 1."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.fisher.defence import exact as exact_module
from swap_prune.fisher.defence.exact import outer_product_layers
from swap_prune.losses import cross_entropy
from swap_prune.selection import select_parameters
from tests.cases import generator
from tests.fisher.defence.test_gradients import perceptron


class Mixed(nn.Module):
    """One Linear of each kind: plain, over tokens, shared, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.shared = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.shared.weight
        self.plain = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).tanh().mean(1)
        return self.plain(self.tied(self.shared(self.twice(self.twice(x).tanh()).tanh())))


def test_which_layers_have_gradients_of_rank_one() -> None:
    torch.manual_seed(0)
    model = Mixed()
    selection = select_parameters(model, ("Linear",), ())
    batch = torch.randn(4, 5, 6), torch.randint(3, (4,))
    assert outer_product_layers(model, selection, cross_entropy, batch) == ("plain.weight",)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    selection = select_parameters(conv, ("Conv2d", "Linear"), ())
    batch = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    assert outer_product_layers(conv, selection, cross_entropy, batch) == ("2.weight",)


class Again(nn.Module):
    """Calls one layer twice, with one vector a sample each time, and another with several vectors of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.folded, self.head = nn.Linear(6, 6), nn.Linear(3, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        outputs: Tensor = self.head(torch.relu(self.folded(x.reshape(-1, 3)).reshape(-1, 6)))
        return outputs


def test_layers_that_see_several_vectors_of_a_sample_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their calls alone: no gradient need be looked at."""
    monkeypatch.setattr(exact_module, "_without_other_uses", lambda *given: tuple(given[-1]))
    torch.manual_seed(0)
    model = Again()
    batch = torch.randn(4, 6), torch.randint(3, (4,))
    assert outer_product_layers(model, select_parameters(model), cross_entropy, batch) == ("head.weight",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_no_other_use(dtype: torch.dtype) -> None:
    model, selection, (x, y) = perceptron()
    found = outer_product_layers(model.to(dtype), selection, cross_entropy, (x.to(dtype), y))
    assert found == ("1.weight", "3.weight", "5.weight")


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.middle = nn.Linear(12, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.encode(x).tanh()).tanh()
        return nn.functional.linear(hidden, self.encode.weight.T)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("noise", [False, True])
def test_weights_that_are_used_outside_their_layer_have_gradients_of_higher_rank(penalty: float, noise: bool) -> None:
    """In a decoder that shares them, or in a penalty; noise of a user's own is another each time, and is seen."""
    model, state = TiedAutoencoder(), generator(1)

    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        outputs = net(batch[0])
        if noise and outputs.requires_grad:
            weight = net.middle.weight  # type: ignore[union-attr]
            outputs = outputs + (weight * torch.randn(5, 5, generator=state)).sum() * outputs.detach()
        squares = sum(parameter.square().sum() for parameter in net.parameters())
        losses: torch.Tensor = (outputs - batch[0]).square().sum(1) + penalty * squares
        return losses

    batch = (torch.randn(30, 12, generator=generator(2)),)
    selection = select_parameters(model)
    found = outer_product_layers(model, selection, loss_fn, batch)
    assert found == (("encode.weight", "middle.weight") if noise else () if penalty else ("middle.weight",))
    if not noise:
        report = prune(model, [batch], 0.5, "lr", loss_fn=loss_fn, samples=20, progress=False)
        assert "noise_seen" not in report.stages[0].evidence


class Flattened(nn.Module):
    """A Linear layer over tokens that come as rows of a matrix, and one that is called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x.reshape(-1, 6)).tanh()
        return self.head(input=hidden.reshape(len(x), -1, 8).mean(1))


def test_tokens_in_rows_are_not_taken_for_samples() -> None:
    torch.manual_seed(0)
    model, batch = Flattened(), (torch.randn(9, 5, 6), torch.randint(3, (9,)))
    selection = select_parameters(model, ("Linear",), ())
    assert outer_product_layers(model, selection, cross_entropy, batch) == ("head.weight",)
    for method in ("lr", "wanda", "sparsegpt", "cbs"):
        report = prune(copy.deepcopy(model), TensorDataset(*batch), 0.5, method, progress=False)
        assert "noise_seen" not in report.stages[0].evidence


def doubled(layer: nn.Linear) -> None:
    """Let a hook of the user's own make a layer's weight from another parameter."""
    layer.source = nn.Parameter(layer.weight.detach() / 2)
    del layer.weight
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", 2 * module.source))


def test_weights_that_hooks_make_from_others_and_biases_have_no_such_rows() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(9, 6), torch.arange(9) % 3)
    doubled(model[0])
    selection = select_parameters(model, ("Linear", "2.bias"), ())
    assert outer_product_layers(model, selection, cross_entropy, batch) == ("2.weight",)
    report = prune(model, TensorDataset(*batch), 0.5, "lr", targets=("2.weight", "2.bias"), progress=False)
    assert report.total == 27 and "noise_seen" not in report.stages[0].evidence
