"""The defence of gradients: harmless on clean ones, and against noise, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import LR, prune
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.defence import gradients as gradients_module
from swap_prune.fisher.defence.exact import outer_product_layers
from swap_prune.fisher.defence.gradients import (
    DefendedLayer,
    GradientDefence,
    layers_of,
    lies_elsewhere,
    look_noise,
    overwritten,
    rank_noise,
)
from swap_prune.fisher.defence.looks import choose_average
from swap_prune.fisher.defence.treatment import Treatment
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.noise import GradientNoise
from swap_prune.losses import CrossEntropy, LossFn, cross_entropy
from swap_prune.network.modes import batch_statistics
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.selection import Selection, select_parameters
from swap_prune.stages.trials import Trials
from swap_prune.surgery.weights import temporary_weights
from swap_prune.training.teaching import taught_losses
from tests.cases import but_long, generator
from tests.test_pipeline import small_data, small_network


def perceptron() -> tuple[nn.Module, Selection, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))
    batch = torch.randn(40, 30, generator=generator(1)), torch.randint(4, (40,), generator=generator(2))
    return model, select_parameters(model, ("Linear",), ()), batch


LAYERS = {"1.weight": (20, 30), "3.weight": (12, 20), "5.weight": (4, 12)}


def rows_and_layers() -> tuple[Tensor, dict[str, DefendedLayer]]:
    """Return G of the perceptron, and its layers, all of rank 1."""
    model, selection, batch = perceptron()
    exact = outer_product_layers(model, selection, cross_entropy, batch)
    assert exact == tuple(LAYERS)
    rows = capture_gradients(model, selection, [batch], cross_entropy).factor
    assert isinstance(rows, DenseFactor)
    return rows.matrix, layers_of(selection, exact)


def noisy(rows: Tensor, seed: int, std: float = 2.0) -> Tensor:
    return GradientNoise(std=std, fraction=0.25).apply(DenseFactor(rows), generator(seed)).matrix


def by_looks(layers: Any, first: Tensor, second: Tensor, beyond: Any, **options: bool) -> GradientDefence:
    return GradientDefence.by_looks(layers, first, second, look_noise(layers, first, second), beyond, **options)


def test_the_layers_are_those_with_entries_as_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 3))
    selection = select_parameters(model, ("Conv2d", "1.weight", "Linear"), ())
    layers = layers_of(selection, ["3.weight"])
    assert {name: (layer.shape, layer.exact) for name, layer in layers.items()} == {
        "0.weight": ((6, 18), False),
        "1.weight": ((1, 6), False),
        "3.weight": ((3, 24), True),
    }
    assert [layer.fixed_rank for layer in layers.values()] == [3, None, 1]


def test_energy_outside_rank_one_is_noise_where_rows_have_that_rank() -> None:
    rows, layers = rows_and_layers()
    clean = rank_noise(DenseFactor(rows), layers)
    assert clean.keys() == LAYERS.keys() and max(clean.values()) < 1e-6
    assert min(rank_noise(DenseFactor(noisy(rows, 3, 0.5)), layers).values()) > 1e-3
    assert rank_noise(DenseFactor(rows), layers_of(perceptron()[1], ())) == {}


def test_only_the_layers_that_noise_is_in_are_treated() -> None:
    rows, layers = rows_and_layers()
    first, second = rows.clone(), rows.clone()
    own = layers["3.weight"].place
    first[:, own], second[:, own] = noisy(rows[:, own], 3), noisy(rows[:, own], 4)
    defence = by_looks(layers, first[:16], second[:16], rank_noise(DenseFactor(first), layers))
    assert defence.treatments.keys() == {"3.weight"} == defence.open and defence.treatments["3.weight"].rank == 1
    assert defence.noise > 0.1
    cleaned = defence.clean_rows_(DenseFactor(first.clone())).matrix
    before, after = ((x[:, own] - rows[:, own]).norm() for x in (first, cleaned))
    assert after < 0.6 * before
    first[:, own] = cleaned[:, own] = 0
    assert torch.equal(first, cleaned)


def test_clean_looks_are_clean_and_noise_that_stays_is_seen_by_rank_alone() -> None:
    rows, layers = rows_and_layers()
    defence = by_looks(layers, rows[:16], rows[:16].clone(), rank_noise(DenseFactor(rows), layers))
    assert defence.noise == 0 and not defence.cleans_slopes and not defence.said()
    same = noisy(rows, 3)
    beyond = rank_noise(DenseFactor(same), layers)
    defence = by_looks(layers, same[:16], same[:16], beyond)
    assert defence.noise == max(beyond.values()) and not defence.open and defence.cleans_slopes
    assert set(defence.treatments.values()) == {Treatment(rank=1)}
    assert defence.said()["1.weight"] == {"rows": "rank 1", "slopes": "mean, rank 1"}
    mixed = {name: layer._replace(exact=name == "5.weight") for name, layer in layers.items()}
    defence = by_looks(mixed, same[:16], same[:16], rank_noise(DenseFactor(same), mixed))
    assert defence.said()["1.weight"] == {"rows": "rank 3", "slopes": "mean"}, "a mean of rows cut to rank 3 is biased"
    assert defence.said()["5.weight"] == {"rows": "rank 1", "slopes": "mean, rank 1"}


def test_slopes_of_mini_batches_are_averaged_by_the_trimmed_mean() -> None:
    rows, layers = rows_and_layers()
    looks = noisy(rows[:16], 3), noisy(rows[:16], 4)
    defence = by_looks(layers, *looks, {}, in_batches=True)
    assert not defence.open and {done["slopes"] for done in defence.said().values()} == {"trimmed mean"}
    assert defence.treatments == by_looks(layers, *looks, {}).treatments


def test_noise_is_seen_in_the_layers_that_it_is_in() -> None:
    rows, layers = rows_and_layers()
    first, own = rows[:2].clone(), layers["3.weight"].place
    first[:, own] = noisy(rows[:2, own], 3)
    seen = look_noise(layers, first, rows[:2])
    assert seen.keys() == {"3.weight"} and seen["3.weight"] > 0.1
    assert look_noise(layers, rows[:2], rows[:2].clone()) == {}


def test_averages_are_settled_once_by_the_second_look_at_a_slope() -> None:
    rows, layers = rows_and_layers()
    defence = GradientDefence(layers, 0.5, open={"1.weight"})
    first, again = noisy(rows, 3), noisy(rows, 4).mean(0)
    found = defence.mean(first, again)
    expected, own = choose_average(first[:, layers["1.weight"].place], again[layers["1.weight"].place], (20, 30))
    assert defence.averages == {"1.weight": expected} and not defence.open and defence.cleans_slopes
    torch.testing.assert_close(found[layers["1.weight"].place], own)
    torch.testing.assert_close(found[layers["3.weight"].place], first[:, layers["3.weight"].place].mean(0))
    torch.testing.assert_close(defence.mean(first), found)


@pytest.mark.parametrize(
    ("asked", "rows", "slopes"),
    [
        ({"low-rank"}, "rank 1", "mean"),
        ({"winsorise", "low-rank"}, "winsorised, rank 1", "mean"),
        ({"trimmed-mean"}, "as they are", "trimmed mean"),
        ({"median-of-means", "winsorise"}, "winsorised", "median of means"),
    ],
)
def test_what_is_asked_for_is_done_to_all_layers(asked: set[str], rows: str, slopes: str) -> None:
    matrix, layers = rows_and_layers()
    defence = GradientDefence.as_asked(layers, asked)
    assert defence.said() == {name: {"rows": rows, "slopes": slopes} for name in LAYERS}
    assert defence.cleans_slopes == (slopes != "mean")
    cleaned = defence.clean_rows_(DenseFactor(noisy(matrix, 3))).matrix
    place = layers["1.weight"].place
    expected = defence.treatments["1.weight"].of(noisy(matrix, 3)[:, place], (20, 30))
    torch.testing.assert_close(cleaned[:, place], expected)


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("noise", "layer", "samples", "defence", "sizes"),
    [
        pytest.param(
            "gradient:std=8,fraction=0.25", nn.BatchNorm1d(144), 512, "auto", [64] * 8, marks=pytest.mark.long
        ),
        pytest.param(
            "poison:fraction=0.2,strength=100", nn.BatchNorm1d(144), 512, "auto", [64] * 8, marks=pytest.mark.long
        ),
        ("gradient:std=8,fraction=0.25", nn.BatchNorm1d(144), 512, None, []),  # no noise is looked for
        ("poison:fraction=0.2,strength=100", nn.BatchNorm1d(144), 1024, "auto", []),  # sixteenths are as large
        pytest.param("gradient:std=8,fraction=0.25", nn.Identity(), 512, "auto", [], marks=pytest.mark.long),
        (None, nn.BatchNorm1d(144), 512, "auto", []),
    ],
)
def test_steps_have_slopes_over_whole_batches_too_where_those_that_are_cleaned_have_statistics_of_a_few(
    noise: str | None,
    layer: nn.Module,
    samples: int,
    defence: str | None,
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems, trials = [], []

    def solve(self: LR, problem: PruningProblem, state: torch.Generator) -> PruningSolution:
        problems.append(problem)
        trials.append(problem.slope.__self__)  # type: ignore[union-attr]
        return real(self, problem, state)

    real = LR.solve
    monkeypatch.setattr(LR, "solve", solve)
    settings = {"samples": samples, "noise": noise, "defence": defence, "progress": False}
    method = LR(ridge=0.025, damping=1.0, metric="diagonal", swaps=0, floor=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 144), copy.deepcopy(layer), nn.ReLU(), nn.Linear(144, 3))
    prune(model, small_data(1300), 0.5, method, **settings)
    (problem,), (asked,) = problems, trials
    assert [len(one.batch[1]) for one in asked.whole] == sizes
    assert (problem.whole_slope is None) == (sizes == [])
    if sizes:
        assert max(len(one.batch[1]) for one in asked.fitting) <= 32
        kept = torch.ones_like(problem.reference, dtype=torch.bool)
        found = replace(asked, noisy=lambda factor: factor).whole_slope(problem.reference, kept)
        parameters = [dict(asked.model.named_parameters())[name] for name in asked.selection.names]
        with temporary_weights(asked.model, asked.selection, problem.reference), batch_statistics(asked.model):
            total = torch.cat([taught_losses(asked.loss_fn, asked.model, one) for one in asked.whole]).mean()
            expected = torch.cat([part.flatten() for part in torch.autograd.grad(total, parameters)])
        torch.testing.assert_close(found, expected)


HARSH = "analog:levels=16,time=1000,stuck_off=0.02,stuck_on=0.01"


@pytest.mark.parametrize("samples", but_long([40, 300]))
def test_noise_that_all_rows_share_is_left_in_them(samples: int) -> None:
    """That of weights keeps the rank of rows; whatever makes them smaller would bring them nearer to a second look."""
    found, seen = [], []
    for defence in ("gradients", None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 3))
        report = prune(model, small_data(700), 0.8, "lr", samples=samples, noise=HARSH, defence=defence, progress=False)
        seen.append(report.stages[0].evidence)
        found.append([parameter.detach() for parameter in model.parameters()])
    assert seen[0]["noise_seen"] > 0.1 and "gradients_cleaned" not in seen[0]
    assert all(map(torch.equal, *found))


def test_noise_lies_elsewhere_where_looks_differ_and_ranks_do_not() -> None:
    rows, layers = rows_and_layers()
    first, second = noisy(rows, 0), noisy(rows, 1)
    shares = look_noise(layers, first, second)
    assert not lies_elsewhere(layers, shares, rank_noise(DenseFactor(first), layers)), "noise on entries has any rank"
    other = rows[torch.randperm(len(rows), generator=generator(7))]
    shares = look_noise(layers, rows, other)
    assert shares and lies_elsewhere(layers, shares, rank_noise(DenseFactor(rows), layers))
    assert not lies_elsewhere(layers, {}, {}), "nothing differs"
    loose = {name: layer._replace(exact=False) for name, layer in layers.items()}
    assert not lies_elsewhere(loose, shares, {}), "no rank tells"


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


@pytest.mark.parametrize("method", ["lr", "obd"])
def test_clean_runs_are_the_same_with_and_without_a_defence(method: str) -> None:
    model, _, batch = perceptron()
    other = copy.deepcopy(model)
    report = prune(model, TensorDataset(*batch), 0.7, method, samples=25, stages=2, progress=False)
    prune(other, TensorDataset(*batch), 0.7, method, samples=25, stages=2, defence=None, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "noise_seen" not in report.stages[0].evidence and report.settings["defence"] == "auto"


@pytest.mark.parametrize("method", but_long(["lr", "obd"], short=["obd"]))
def test_noisy_runs_say_what_was_seen_and_come_out_otherwise(method: str) -> None:
    model, _, batch = perceptron()
    other = copy.deepcopy(model)
    spec = "gradient:std=2,fraction=0.25"
    report = prune(model, TensorDataset(*batch), 0.7, method, samples=25, noise=spec, progress=False)
    prune(other, TensorDataset(*batch), 0.7, method, samples=25, noise=spec, defence="none", progress=False)
    evidence = report.stages[0].evidence
    assert evidence["noise_seen"] > 0.05
    assert evidence["gradients_cleaned"].keys() == {"1.weight", "3.weight", "5.weight"}
    assert not torch.equal(model[1].weight, other[1].weight)


def test_a_defence_that_is_not_known() -> None:
    model, _, batch = perceptron()
    with pytest.raises(ValueError, match=r"defence must be 'auto', 'none' or None, or some of .* got 'shield'"):
        prune(model, TensorDataset(*batch), 0.5, defence="shield")


def convolutions() -> tuple[nn.Module, TensorDataset]:
    """Return a network without a layer whose gradients have rank 1, and data for it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 4), nn.Flatten()
    )
    x = torch.randn(60, 1, 8, 8, generator=generator(3))
    return model, TensorDataset(x, x.flatten(1)[:, :3].argmax(1))


@pytest.mark.parametrize("fisher", but_long(["auto", "empirical"]))
def test_noise_is_seen_where_no_layer_has_rank_one(fisher: str) -> None:
    model, data = convolutions()
    settings = {"samples": 40, "progress": False}
    report = prune(copy.deepcopy(model), data, 0.6, LR(fisher=fisher), noise="gradient:std=4,fraction=0.25", **settings)
    evidence = report.stages[0].evidence
    assert evidence["noise_seen"] > 0.3
    assert {name: done["rows"] for name, done in evidence["gradients_cleaned"].items()} != {}
    report = prune(copy.deepcopy(model), data, 0.6, LR(fisher=fisher), **settings)
    assert not {"noise_seen", "gradients_cleaned"} & report.stages[0].evidence.keys()


@pytest.mark.parametrize("method", ["lr", "obd", "woodfisher", "cbs", "chita"])
def test_every_method_on_gradients_sees_cleaned_rows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = convolutions()
    cleaned: list[bool] = []
    clean = GradientDefence.clean_rows_

    def watched(self: GradientDefence, factor: DenseFactor) -> DenseFactor:
        before = factor.matrix.clone()
        result = clean(self, factor)
        cleaned.append(not torch.equal(result.matrix, before))
        return result

    monkeypatch.setattr(GradientDefence, "clean_rows_", watched)
    prune(model, data, 0.6, method, samples=40, noise="gradient:std=4,fraction=0.25", progress=False)
    assert cleaned == [True]


@pytest.mark.parametrize("asked", ["low-rank+winsorise", "trimmed-mean", "median-of-means+clip", "winsorise"])
@pytest.mark.parametrize("norm", [False, True])
def test_what_is_asked_for_is_done_without_a_look(asked: str, norm: bool) -> None:
    model, data = (small_network(), small_data(80)) if norm else convolutions()
    report = prune(model, data, 0.6, "lr", samples=40, defence=asked, progress=False)
    evidence = report.stages[0].evidence
    assert "noise_seen" not in evidence and len(evidence["gradients_cleaned"]) == len(report.layers)
    done = next(iter(evidence["gradients_cleaned"].values()))
    assert ("rank" in done["rows"], "winsorised" in done["rows"]) == ("low-rank" in asked, "winsorise" in asked)
    assert done["slopes"] == next((kind for kind in ("trimmed mean", "median of means") if kind[:6] in asked), "mean")


@pytest.mark.long
def test_rows_that_are_not_held_as_they_are_are_looked_at_and_left() -> None:
    for storage in ("bfloat16", "mapped"):
        model, data = convolutions()
        settings = {"samples": 40, "storage": storage, "progress": False}
        report = prune(copy.deepcopy(model), data, 0.6, "lr", **settings)
        assert "noise_seen" not in report.stages[0].evidence, "rounding is none"
        report = prune(copy.deepcopy(model), data, 0.6, "lr", defence="winsorise", **settings)
        assert report.stages[0].evidence["noise_left"] == f"rows in {storage} are not cleaned"
    report = prune(model, data, 0.6, "lr", defence="winsorise", storage="low-rank", samples=40, progress=False)
    assert report.stages[0].evidence["noise_left"] == "rows in low-rank are not cleaned"


@pytest.mark.long
def test_poisoned_rows_alone_are_no_noise() -> None:
    model, _, batch = perceptron()
    settings = {"samples": 32, "stages": 6, "noise": "poison:fraction=0.1,strength=100", "progress": False}
    report = prune(model, TensorDataset(*batch), 0.5, LR(first_order=0), **settings)
    assert not any("noise_seen" in stage.evidence for stage in report.stages)
    assert any("rows_clipped" in stage.evidence for stage in report.stages)


def test_ranks_are_looked_at_in_rows_from_all_of_the_factor() -> None:
    rows, layers = rows_and_layers()
    many = rows.repeat(5, 1)
    assert max(rank_noise(DenseFactor(many), layers).values()) < 1e-6
    many[150:] += 0.1 * rows.norm() / rows.numel() ** 0.5 * torch.randn(50, rows.shape[1], generator=generator(5))
    assert min(rank_noise(DenseFactor(many), layers).values()) > 1e-4


def test_rows_of_a_wrong_rank_are_those_that_somebody_has_written() -> None:
    rows, layers = rows_and_layers()
    assert not bool(overwritten(rows, layers).any())
    mixed, other = rows.clone(), rows.mean(0)
    mixed[5] = 0
    mixed[[3, 17]] = other
    mixed[30, layers["3.weight"].place] += 0.1 * rows[31, layers["3.weight"].place]
    mixed[8] *= -100
    assert overwritten(mixed, layers).nonzero().squeeze(1).tolist() == [3, 17, 30]
    inexact = {name: layer._replace(exact=False) for name, layer in layers.items()}
    assert not bool(overwritten(mixed, inexact).any())
    defence = GradientDefence(layers, 0.1, written=overwritten(mixed, layers))
    assert defence.left_out == 3 / 40
    honest = torch.ones(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 17, 30]), False)
    torch.testing.assert_close(defence.mean(mixed), mixed[honest].mean(0))
    cleaned = defence.clean_rows_(DenseFactor(mixed.clone())).matrix
    assert torch.equal(cleaned[honest], mixed[honest]) and not bool(cleaned[~honest].any())
    assert torch.equal(defence.mean(mixed[[3, 17]]), mixed[[3, 17]].mean(0)), "nothing else is there"


def test_noise_in_weights_is_seen() -> None:
    model, _, batch = perceptron()
    report = prune(model, TensorDataset(*batch), 0.5, "lr", samples=32, noise="analog:programming=0.2", progress=False)
    assert report.stages[0].evidence["noise_seen"] > 0.1


def test_slopes_of_a_layer_whose_rows_no_treatment_helps_are_left_to_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, layers = rows_and_layers()
    monkeypatch.setattr(gradients_module, "choose_treatment", lambda *_: Treatment())
    defence = by_looks(layers, noisy(rows[:16], 3), noisy(rows[:16], 4), {})
    assert defence.noise > 0.1 and not defence.open and not defence.cleans_slopes and not defence.said()


@pytest.mark.parametrize("dtype", but_long([torch.bfloat16, torch.float16, torch.float64]))
@pytest.mark.parametrize("fisher", but_long(["auto", "empirical"]))
def test_rounding_is_no_noise(dtype: torch.dtype, fisher: str) -> None:
    """A deep network whose rows and mini-batches are computed in few digits."""
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).to(dtype)
    x = torch.randn(80, 1, 8, 8, generator=generator(3)).to(dtype)
    data = TensorDataset(x, torch.arange(80) % 3)
    for recalibrated in (True, False):
        settings = {"samples": 48, "recalibrate_batchnorm": recalibrated, "progress": False}
        report = prune(copy.deepcopy(model), data, 0.5, LR(fisher=fisher, first_order=0), **settings)
        assert "noise_seen" not in report.stages[0].evidence
