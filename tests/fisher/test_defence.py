"""Low-rank rows: against the singular value decomposition, harmless on clean gradients, and against noise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import LR, prune
from swap_prune.fisher import defence as defence_module
from swap_prune.fisher.capture import capture_gradients
from swap_prune.fisher.defence import LowRank, low_rank_rows, middle_mean, outer_product_layers
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.noise import GradientNoise
from swap_prune.losses import CrossEntropy, LossFn, cross_entropy
from swap_prune.selection import Selection, select_parameters
from swap_prune.stages.trials import Trials
from tests.cases import generator, normal
from tests.test_pipeline import small_data, small_network


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


def perceptron() -> tuple[nn.Module, Selection, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))
    batch = torch.randn(40, 30, generator=generator(1)), torch.randint(4, (40,), generator=generator(2))
    return model, select_parameters(model, ("Linear",), ()), batch


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 7)])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_best_matrix_of_a_rank(shape: tuple[int, int], rank: int) -> None:
    u, _, v = torch.linalg.svd(normal(8, *shape, seed=3), full_matrices=False)
    values = torch.tensor([3.0, 2.0, *[0.5] * 4], dtype=torch.float64)[: min(shape)]
    values = values if rank == 2 else values.index_fill(0, torch.tensor(1), 0.5)
    rows = (u * values) @ v
    expected = (u[..., :rank] * values[:rank]) @ v[:, :rank]
    torch.testing.assert_close(low_rank_rows(rows, rank), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_rows_of_any_size_are_cut_to_a_rank(size: float) -> None:
    rows = normal(5, 30, 40).float()
    expected = low_rank_rows(rows, 2)
    torch.testing.assert_close(low_rank_rows(rows * size, 2) / size, expected, rtol=1e-4, atol=1e-5)


def test_outer_products_and_zeros_stay_as_they_are() -> None:
    rows = normal(7, 5, 1, seed=4) * normal(7, 1, 8, seed=5)
    rows[3] = 0
    torch.testing.assert_close(low_rank_rows(rows, 1), rows)


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
    monkeypatch.setattr(defence_module, "_without_other_uses", lambda *given: tuple(given[-1]))
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


def test_no_noise_is_seen_on_clean_gradients_and_some_on_noisy_ones() -> None:
    model, selection, batch = perceptron()
    defence = LowRank.of(model, selection, cross_entropy, batch, per_sample=True)
    factor = capture_gradients(model, selection, [batch], cross_entropy).factor
    assert len(defence.exact) == 3 and defence.noise_seen(factor) == 0
    assert defence.noise_seen(GradientNoise(std=0.5, fraction=0.1).apply(factor, generator(3))) > 0


def test_the_middle_mean_leaves_out_what_hits_fewer_than_three_eighths_of_the_rows_at_either_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = normal(40, seed=7)
    rows = true.repeat(16, 1)
    for row, sign in ((0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, -1), (7, -1), (8, -1), (9, -1)):
        rows[row] += sign * 1e6 * normal(40, seed=8 + row).abs()
    torch.testing.assert_close(middle_mean(rows), true)
    assert (middle_mean(torch.cat([rows, rows[:2]])) > true + 1e3).any(), "eight of eighteen are too many"
    honest = normal(1000, 30, seed=9)
    middle = middle_mean(honest)
    assert (middle - honest.mean(0)).abs().max() < 4 / 1000**0.5, "of honest rows it is about the mean"
    assert torch.equal(middle_mean(rows[:1]), rows[0])
    whole = middle_mean(rows)
    monkeypatch.setattr("swap_prune.fisher.defence._SORTED", 100)
    assert torch.equal(middle_mean(rows), whole), "six columns at a time, and four at the end"


def test_noise_on_gradients_of_mini_batches_is_seen_in_those_of_samples_and_left_out_of_slopes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where BatchNorm is recalibrated; 512 samples make 32 rows and as many gradients for a slope."""
    slopes: list[torch.Tensor] = []

    def watched(self: Trials, weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        slopes.append(slope(self, weights, kept))
        return slopes[-1]

    slope = Trials.slope
    monkeypatch.setattr(Trials, "slope", watched)
    method = LR(ridge=0.025, damping=1.0, metric="diagonal", swaps=0, floor=0)
    data = TensorDataset(small_data(700).tensors[0], torch.zeros(700).long())  # all slopes go one way
    first = {}
    for name, noise, defence in (
        ("clean", None, "auto"),
        ("held", "gradient:std=8,fraction=0.25", "auto"),
        ("left", "gradient:std=8,fraction=0.25", None),
    ):
        slopes.clear()
        settings = {"samples": 512, "noise": noise, "defence": defence, "progress": False}
        report = prune(small_network(), data, 0.5, method, **settings)
        first[name] = slopes[0]
        assert ("noise_seen" in report.stages[0].evidence) == (name == "held")
    cosine = {name: float(torch.cosine_similarity(first[name], first["clean"], dim=0)) for name in ("held", "left")}
    assert cosine["held"] > 0.9 > 0.7 > cosine["left"], cosine


class Squeezed(nn.Module):
    """Gives logits of no class for a sample alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x).squeeze()
        return y


class Regularised(CrossEntropy):
    """A loss whose gradients are of full rank, and whose Gauss-Newton rows are not."""

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        return super().__call__(model, batch) + 1e-2 * sum(p.square().sum() for p in model.parameters())


def sure_of_itself() -> nn.Module:
    model = small_network()
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
    return model


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (Squeezed, None),
        (lambda: nn.Sequential(small_network(), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 3)), None),
        (small_network, Regularised()),
        (sure_of_itself, None),
    ],
)
def test_clean_mini_batches_are_not_noisy_whatever_the_network(make: Callable[[], nn.Module], loss: LossFn) -> None:
    report = prune(make(), small_data(100), 0.5, "lr", samples=64, loss_fn=loss, progress=False)
    assert "noise_seen" not in report.stages[0].evidence and report.sparsity == pytest.approx(0.5, abs=0.02)


def test_most_of_the_noise_goes_and_the_signal_stays() -> None:
    model, selection, batch = perceptron()
    defence = LowRank.of(model, selection, cross_entropy, batch, per_sample=True)
    clean = capture_gradients(model, selection, [batch], cross_entropy).factor.matrix
    torch.testing.assert_close(defence.clean_rows_(DenseFactor(clean.clone())).matrix, clean, atol=1e-6, rtol=1e-4)
    noisy = GradientNoise(std=2, fraction=0.25).apply(DenseFactor(clean), generator(3)).matrix
    before = (noisy - clean).norm()
    after = (defence.clean_rows_(DenseFactor(noisy.clone())).matrix - clean).norm()
    assert after < 0.6 * before


def test_convolutions_keep_a_few_outer_products_where_rows_are_of_single_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 3))
    selection = select_parameters(model, ("Conv2d", "Linear"), ())
    batch = torch.randn(9, 2, 6, 6), torch.randint(3, (9,))
    rows = normal(9, selection.total, seed=6, dtype=torch.float32)
    defence = LowRank.of(model, selection, cross_entropy, batch, per_sample=True)
    cleaned = defence.clean_rows_(DenseFactor(rows.clone())).matrix
    ranks = torch.linalg.matrix_rank(cleaned[:, :108].reshape(9, 6, 18), rtol=1e-4)
    assert ranks.tolist() == [3] * 9
    mean = defence.mean_row(DenseFactor(rows.clone()))  # where a low rank would cut the signal, the mean is plain
    torch.testing.assert_close(mean, torch.cat([rows[:, :108].mean(0), cleaned[:, 108:].mean(0)]))
    mini_batches = LowRank.of(model, selection, cross_entropy, batch, per_sample=False)
    assert torch.equal(mini_batches.clean_rows_(DenseFactor(rows.clone())).matrix, rows)


@pytest.mark.parametrize("method", ["lr", "obd"])
def test_clean_runs_are_the_same_with_and_without_a_defence(method: str) -> None:
    model, _, batch = perceptron()
    other = copy.deepcopy(model)
    report = prune(model, TensorDataset(*batch), 0.7, method, samples=25, stages=2, progress=False)
    prune(other, TensorDataset(*batch), 0.7, method, samples=25, stages=2, defence=None, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "noise_seen" not in report.stages[0].evidence and report.settings["defence"] == "auto"


@pytest.mark.parametrize("method", ["lr", "obd"])
def test_noisy_runs_say_what_was_seen_and_come_out_otherwise(method: str) -> None:
    model, _, batch = perceptron()
    other = copy.deepcopy(model)
    spec = "gradient:std=2,fraction=0.25"
    report = prune(model, TensorDataset(*batch), 0.7, method, samples=25, noise=spec, progress=False)
    prune(other, TensorDataset(*batch), 0.7, method, samples=25, noise=spec, defence="none", progress=False)
    assert report.stages[0].evidence["noise_seen"] > 0.05
    assert not torch.equal(model[1].weight, other[1].weight)


def test_a_defence_that_is_not_known() -> None:
    model, _, batch = perceptron()
    with pytest.raises(ValueError, match=r"defence must be 'auto', 'none' or None, or some of .* got 'shield'"):
        prune(model, TensorDataset(*batch), 0.5, defence="shield")


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
