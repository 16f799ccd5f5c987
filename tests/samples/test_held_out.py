"""Choices by held-out loss: what is chosen is what the held-out samples favour."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import EWR, LR, prune
from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods.contest import _is_starved
from swap_prune.methods.descent import Steps, polyak_length
from swap_prune.methods.pairing import candidates_of, fair_floors
from swap_prune.problem import PruningProblem, PruningSolution
from swap_prune.regression import iht
from swap_prune.regression.iht import SparseFit
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.tuning import Coupling
from swap_prune.samples.batches import batch_size
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.selection import select_parameters
from tests.cases import blurred_classes, trained


def problem_with(held_out: object, n: int = 12, p: int = 40, keep: int = 15) -> PruningProblem:
    """A random problem whose slope is the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 1, p)
    factor = DenseFactor(torch.randn(n, p, generator=generator) * scale)
    slope = torch.randn(p, generator=generator)
    return PruningProblem(torch.randn(p, generator=generator), keep, factor, held_out, lambda w, kept: slope)


@pytest.mark.parametrize("favoured", range(4))
def test_the_candidate_that_held_out_samples_favour_is_taken(favoured: int) -> None:
    seen: list[Tensor] = []

    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        seen.append(w)
        return torch.full((5,), float(len(seen) - 1 != favoured))

    solution = LR(first_order=0, swaps=0).solve(problem_with(held_out), torch.Generator())
    expected = candidates_of(LR())[favoured]
    assert {key: solution.evidence[key] for key in expected._fields} == expected._asdict()
    assert [one["held_out_loss"] for one in solution.evidence["candidates"]].index(0) == favoured
    assert torch.equal(solution.weights, seen[favoured]) and len(seen) == 4
    alone = LR(**expected._asdict(), first_order=0, swaps=0).solve(problem_with(None), torch.Generator())
    assert torch.equal(alone.weights, solution.weights)


def test_the_first_candidate_is_taken_where_nothing_is_held_out() -> None:
    evidence = LR(first_order=0, swaps=0).solve(problem_with(None), torch.Generator()).evidence
    assert (evidence["ridge"], evidence["damping"], evidence["metric"]) == (0.025, 1.0, "diagonal")
    assert "candidates" not in evidence, "it alone is fitted"


@pytest.mark.parametrize(("rows", "weights", "few"), [(1, 9_999, False), (1, 10_001, True), (3, 10_001, False)])
def test_a_small_damping_is_tried_where_rows_are_few(rows: int, weights: int, few: bool) -> None:
    found = candidates_of(LR(), torch.ones(weights), rows)
    usual = candidates_of(LR())
    assert len(found) == 4 and [found[i] for i in (0, 1, 3)] == [usual[i] for i in (0, 1, 3)]
    assert (found[2] == (0.025, 0.03, "diagonal", 0.0)) == few
    (fixed,) = candidates_of(LR(damping=2.0, ridge=0.1, metric="layer", floor=0.3), torch.ones(weights), rows)
    assert fixed == (0.1, 2.0, "layer", 0.3)


def starving(held_out: object, keep: int = 40) -> PruningProblem:
    """A problem whose first layer, 200 of 300 weights, is worth little by the rows of G."""
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False))
    generator = torch.Generator().manual_seed(0)
    scale = torch.cat([torch.full((200,), 1e-3), torch.ones(100)])
    rows, w = torch.randn(12, 300, generator=generator) * scale, torch.randn(300, generator=generator)
    slope = torch.randn(300, generator=generator)
    selection = select_parameters(model)
    return PruningProblem(w, keep, DenseFactor(rows), held_out, lambda w, kept: slope, selection=selection)


def kept_by_layer(kept: Tensor) -> list[int]:
    return [int(part.sum()) for part in kept.split([200, 100])]


def test_floors_are_tried_where_a_layer_is_starved_and_taken_where_held_out_samples_gain() -> None:
    asked: list[list[int]] = []

    def gains(w: Tensor, kept: Tensor) -> Tensor:
        """Samples lose a layer that has fewer than half of what it would keep if all kept alike."""
        asked.append(kept_by_layer(kept))
        return torch.full((5,), 1.0 if asked[-1][0] < 14 else 0.5 + asked[-1][0] / 1000)

    solution = LR(metric="diagonal", damping=1.0, first_order=0, swaps=0).solve(starving(gains), torch.Generator())
    floors = [one["floor"] for one in solution.evidence["candidates"]]
    assert floors == [0.0, 0.5, 0.75, 0.5, 0.75, 0.5, 0.75], "the others begin with the first one's"
    assert asked[0][0] < 14 and [kept[0] for kept in asked[1:]] == [14, 20, 14, 20, 14, 20]
    assert solution.evidence["floor"] == 0.5 and kept_by_layer(solution.kept) == [14, 26]
    again = LR(metric="diagonal", damping=1.0, first_order=0).solve(starving(gains), torch.Generator())
    assert kept_by_layer(again.kept)[0] >= 14, "swaps keep to it"


def test_floors_that_the_others_are_tried_with() -> None:
    """They begin with the first one's, or the low one, and stand with that which gains, beyond an error."""
    method = LR(metric="diagonal", damping=1.0, first_order=0, swaps=0)
    low, all_of_them = (0, 0.5, 0.75, 0.5, 0.75, 0.5, 0.75), (0, 0.5, 0.75) * 3
    for losses, floors, ridge, floor in (
        ((0.7, 0.6, 0.5, 0.9, 0.8, 0.8, 0.4), low, 0.0025, 0.75),
        ((0.7, 0.6, 0.8, 0.4, 0.5, 0.5, 0.5), low, 0.1, 0.5),
        ((0.7, 0.8, 0.6, 0.9, 0.5, 0.7, 0.6), low, 0.1, 0.75),
        ((0.4, 0.6, 0.8, 0.5, 0.9, 0.3, 0.6, 0.7, 0.2), all_of_them, 0.0025, 0.75),
    ):
        left = iter(losses)
        problem = starving(lambda w, kept, left=left: torch.full((5,), next(left)))
        evidence = method.solve(problem, torch.Generator()).evidence
        assert tuple(one["floor"] for one in evidence["candidates"]) == floors
        assert tuple(one["held_out_loss"] for one in evidence["candidates"]) == pytest.approx(losses)
        assert (evidence["ridge"], evidence["floor"]) == (ridge, floor)


def test_a_floor_is_raised_where_held_out_samples_gain_beyond_their_error() -> None:
    method = LR(metric="diagonal", damping=1.0, ridge=0.1, first_order=0, swaps=0)
    for gains, floor in (([0.1, 0.2, 0.1, 0.2], 0.5), ([0.1, -0.1, 0.2, -0.19], 0.0)):
        left = iter([torch.ones(4), torch.ones(4) - torch.tensor(gains), torch.ones(4)])
        evidence = method.solve(starving(lambda w, kept, left=left: next(left)), torch.Generator()).evidence
        assert evidence["floor"] == floor and len(evidence["candidates"]) == 3


def test_a_path_begins_once_in_each_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates with a floor, and with a higher one, begin with the Gram matrix of the same without."""
    columns: list[int] = []
    gram = DenseFactor.gram

    def counted(self: DenseFactor, scale: Tensor) -> Tensor:
        columns.append(int(scale.count_nonzero()))
        return gram(self, scale)

    monkeypatch.setattr(DenseFactor, "gram", counted)
    losses = iter([0.9, 0.8, 0.7] * 4)
    problem = starving(lambda w, kept: torch.full((5,), next(losses)))
    tried = LR(first_order=0, swaps=0).solve(problem, torch.Generator()).evidence["candidates"]
    assert [one["floor"] for one in tried] == [0, 0.5, 0.75, 0.5, 0.75, 0.5, 0.75, 0.5]
    assert columns.count(max(columns)) == 4 and max(columns) > 40


@pytest.mark.parametrize(("floor", "fits", "paths"), [(0, 3, 1), ("auto", 9, 9)])
def test_ridges_share_a_path(floor: object, fits: int, paths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that follow each other with the same metric and floor; after other floors a path is walked again."""
    walked: list[int] = []
    columns: list[int] = []
    path, gram = iht.shrink_support, DenseFactor.gram

    def counted(self: DenseFactor, scale: Tensor) -> Tensor:
        columns.append(int(scale.count_nonzero()))
        return gram(self, scale)

    def watched(problem: WeightedRidge, *rest: object) -> object:
        walked.append(len(problem.floors))
        return path(problem, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(iht, "shrink_support", watched)
    monkeypatch.setattr(DenseFactor, "gram", counted)
    method = LR(metric="diagonal", damping=1.0, first_order=0, floor=floor, swaps=0)
    solution = method.solve(starving(lambda w, kept: torch.ones(5)), torch.Generator())
    assert len(solution.evidence["candidates"]) == fits and len(walked) == paths
    assert sum(count >= 40 for count in columns) == 1, "a Gram matrix is made anew once in a metric"


def test_a_layer_with_as_many_weights_as_its_floor_is_not_starved() -> None:
    problem = starving(None)
    support = torch.cat([torch.arange(14), torch.arange(200, 226)])
    floors = fair_floors(problem, 0.5)
    assert not _is_starved(support, floors) and _is_starved(support[1:], floors)


def test_floors_that_gain_nothing_or_are_not_asked_for_are_left_out() -> None:
    def equal(w: Tensor, kept: Tensor) -> Tensor:
        return torch.ones(5)

    tried = LR(first_order=0, swaps=0).solve(starving(equal), torch.Generator())
    floors = [one["floor"] for one in tried.evidence["candidates"]]
    assert tried.evidence["floor"] == 0.0
    assert floors == [0, 0.5, 0.75, 0, 0.5, 0.75, 0, 0.5, 0.75, 0], "the last one starves no layer"
    for settings, held_out in (({"floor": 0}, equal), ({}, None)):
        alone = LR(first_order=0, swaps=0, **settings).solve(starving(held_out), torch.Generator())
        assert torch.equal(alone.kept, tried.kept) and alone.evidence["floor"] == 0.0
    fixed = LR(first_order=0, swaps=0, floor=0.9).solve(starving(None), torch.Generator())
    assert kept_by_layer(fixed.kept) == [24, 16] and fixed.evidence["floor"] == 0.9
    few = LR(first_order=0, swaps=0, floor=0.9).solve(replace(starving(None), keep=2), torch.Generator())
    assert few.evidence["floor"] == 0.0, "floors of two weights and one would take all, and are not laid"
    paper = EWR(solver="algorithm1", floor=0.9).solve(starving(None), torch.Generator())
    assert kept_by_layer(paper.kept)[0] >= 24


def test_fair_floors_that_are_whole_are_not_rounded_up() -> None:
    problem = PruningProblem(torch.ones(20_000), 1000, DenseFactor(torch.ones(1, 20_000)))
    assert [least for _, least in fair_floors(problem, 0.75)] == [750]


def test_fair_floors_do_not_count_weights_that_stay_zero() -> None:
    problem = starving(None)
    reference, diagonal = problem.reference.clone(), torch.ones_like(problem.reference)
    reference[195:], diagonal[205:] = 0, 0  # of the second layer five could still become something
    zeroed = replace(problem, reference=reference)
    assert [least for _, least in fair_floors(zeroed, 0.5, diagonal)] == [14, 5]
    assert [least for _, least in fair_floors(zeroed, 0.5)] == [14, 7]


def test_fair_floors_are_shares_of_what_layers_would_keep_if_all_kept_alike() -> None:
    problem = starving(None)
    first, second = slice(0, 200), slice(200, 300)
    assert list(fair_floors(problem, 0.5)) == [(first, 14), (second, 7)]
    given = replace(problem, floors=[(second, 20)])
    assert list(fair_floors(given, 0.5)) == [(first, 14), (second, 20)]
    assert list(fair_floors(given, 0.0)) == [(second, 20)]
    crowded = replace(problem, keep=2, floors=[])
    assert list(fair_floors(crowded, 0.5)) == list(fair_floors(crowded, 0.9)) == [], "one weight for each would be all"
    crowded = replace(starving(lambda w, kept: torch.ones(5)), keep=2)
    assert LR(first_order=0).solve(crowded, torch.Generator()).evidence["floor"] == 0


@pytest.mark.parametrize("floor", [-0.1, 1.0, "some", math.nan])
def test_a_floor_that_makes_no_sense_is_refused(floor: object) -> None:
    for method in (LR, EWR):
        with pytest.raises(ValueError, match=r"floor must be 'auto' or lie in \[0, 1\)"):
            method(floor=floor)


@pytest.mark.parametrize(
    ("settings", "candidates"),
    [
        ({}, 4),
        ({"ridge": 0.1}, 4),
        ({"damping": 3.0}, 4),
        ({"metric": "factored"}, 3),
        ({"metric": "layer", "damping": 3.0}, 3),
        ({"metric": "identity"}, 3),
        ({"metric": "layer", "ridge": 0.1}, 2),
    ],
)
def test_what_is_fixed_is_not_chosen(settings: dict, candidates: int) -> None:
    problem = problem_with(lambda w, kept: w.square())
    evidence = LR(first_order=0, **settings).solve(problem, torch.Generator()).evidence
    assert sum("swaps" not in one for one in evidence["candidates"]) == candidates
    assert all(evidence[name] == value for name, value in settings.items())


def test_swaps_stay_where_held_out_samples_gain_by_them() -> None:
    generator = torch.Generator()
    fixed = {"ridge": 0.1, "damping": 1.0, "first_order": 0}
    still = LR(swaps=0, **fixed).solve(problem_with(None), generator)
    swapped = LR(**fixed).solve(problem_with(None), generator)
    assert still.evidence["swaps"] == 0 < swapped.evidence["swaps"]
    assert swapped.evidence["objective"] < still.evidence["objective"]
    for target in (still, swapped):
        problem = problem_with(lambda w, kept, goal=target.weights: (w - goal).square())
        assert torch.equal(LR(**fixed).solve(problem, generator).weights, target.weights)


def test_steps_are_as_long_and_as_many_as_held_out_samples_gain() -> None:
    generator = torch.Generator()
    still = LR(ridge=0.1, damping=1.0, swaps=0, first_order=0).solve(problem_with(None), generator)
    moved = LR(ridge=0.1, damping=1.0, swaps=0, first_order=0.3).solve(problem_with(None), generator)
    assert not torch.equal(still.weights, moved.weights)
    away = still.weights + 100 * (moved.weights - still.weights)  # 30 steps of length 1 away
    for target, steps in ((still.weights, []), (moved.weights, [0.3]), (away, [8.1, 24.3])):
        problem = problem_with(lambda w, kept, goal=target: 1e6 * (w - goal).square())  # Polyak's length is far off
        problem = replace(problem, blank=lambda: torch.full((1,), math.inf))  # of a loss that knows its curvature
        solution = LR(ridge=0.1, damping=1.0, swaps=0).solve(problem, generator)
        assert solution.evidence["first_order"] == pytest.approx(steps)
        if target is not away:
            assert torch.equal(solution.weights, target)
        assert torch.equal(solution.kept, still.kept)


def test_the_first_step_is_no_longer_than_the_loss_can_fall() -> None:
    slope, direction = torch.tensor([3.0, -4.0]), torch.tensor([-6.0, 2.0])
    assert polyak_length(slope, direction, 13.0) == pytest.approx(0.5)  # 13 / 26
    assert polyak_length(slope, -direction, 13.0) == math.inf
    assert polyak_length(slope, 0 * direction, 13.0) == math.inf
    assert polyak_length(slope, direction, -13.0) == math.inf  # a loss below 0 bounds nothing

    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        return (w - goal).square() / 1e2  # so low a loss that a step of 0.3 would promise far more than all of it

    settings = {"ridge": 0.1, "damping": 1.0, "swaps": 0}
    goal = LR(first_order=0.3, **settings).solve(problem_with(None), torch.Generator()).weights
    lengths = LR(**settings).solve(problem_with(held_out), torch.Generator()).evidence["first_order"]
    assert lengths and lengths[0] < 0.3


def test_losses_that_are_not_numbers_are_never_favoured() -> None:
    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        return torch.full((5,), float("nan"))

    solution = LR().solve(problem_with(held_out), torch.Generator())
    assert bool(torch.isfinite(solution.weights).all()) and solution.evidence["first_order"] == []


def test_without_gain_on_held_out_samples_ewr_is_lr() -> None:
    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        return torch.ones(30)

    generator = torch.Generator().manual_seed(0)
    ewr = EWR(epsilon=0.1).solve(problem_with(held_out), generator)
    lr = LR().solve(problem_with(held_out), generator)
    assert torch.equal(ewr.weights, lr.weights) and ewr.evidence["anchor"] == 0


def no_steps(_problem: PruningProblem, _regression: WeightedRidge, fit: SparseFit, *_rest: object) -> Steps:
    return Steps(fit.weights[fit.support], [], [], [])


@pytest.mark.parametrize(("gain", "coupled"), [(0.0, False), (5e-4, False), (2e-3, True)])
def test_a_coupling_that_hardly_gains_is_left(gain: float, coupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However sure the gain is: the samples agree on it."""
    monkeypatch.setattr("swap_prune.methods.ewr.step_down", no_steps)
    problem = problem_with(None)
    paired, other = (
        EWR(epsilon=0.1, anchor=anchor, swaps=0).solve(problem, torch.Generator()) for anchor in (0.0, 1.0)
    )
    assert not torch.equal(paired.weights, other.weights)

    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        own = gain if torch.equal(w, other.weights) else 0.0
        return torch.linspace(0.5, 1.5, 5, dtype=torch.float64) - own

    taken = EWR(anchor=1.0, swaps=0, **{"ridge": 0.025, "damping": 1.0, "metric": "diagonal"})
    monkeypatch.setattr(EWR, "_coupling", lambda *_: (Coupling(1.0, 0.1), {}))  # held-out rows favour it
    monkeypatch.setattr(EWR, "_coupled", lambda *_: (fit_of(other), True))
    solution = taken.solve(problem_with(held_out), torch.Generator())
    assert torch.equal(solution.weights, other.weights if coupled else paired.weights)
    assert solution.evidence["anchor"] == float(coupled)


def fit_of(solution: PruningSolution) -> SparseFit:
    """State a solution as the fit that it came from."""
    return SparseFit(solution.weights, solution.kept.nonzero().squeeze(1), 0.0, 1, True)


@pytest.mark.parametrize(
    ("size", "fitting", "apart"), [(100, 30, 10), (40, 30, 10), (39, 30, 9), (20, 16, 4), (3, 3, 0)]
)
def test_held_out_samples_are_not_among_the_others(size: int, fitting: int, apart: int) -> None:
    batches = [torch.arange(i, min(i + 7, size)) for i in range(0, size, 7)]
    first, second = CalibrationStream(batches, torch.Generator()).draw_apart(30, 10)
    assert sum(map(batch_size, first)) == fitting and sum(map(batch_size, second)) == apart
    values = torch.cat([*first, *second]).tolist()
    assert len(set(values)) == len(values)


def numbers(batches: list[list[Tensor]]) -> list[int]:
    return [number for _, targets in batches for number in targets.tolist()]


def test_what_a_small_data_set_holds_out_is_never_fitted() -> None:
    data = TensorDataset(torch.arange(50.0)[:, None], torch.arange(50))
    stream = CalibrationStream(data, torch.Generator().manual_seed(0))
    draws = [[numbers(side) for side in stream.draw_apart(30, 8, 3)] for _ in range(3)]
    held_out = draws[0][1]
    assert len(held_out) == 8 and all(apart == held_out for _, apart in draws)
    fitted = [i for fitting, _ in draws for i in fitting]
    assert all(len(set(fitting)) == 30 for fitting, _ in draws)
    assert set(fitted) == set(range(50)) - set(held_out)  # all others were seen
    assert draws[0][0] != draws[1][0]


def test_a_large_data_set_holds_others_out_in_each_draw() -> None:
    data = TensorDataset(torch.arange(120.0)[:, None], torch.arange(120))
    stream = CalibrationStream(data, torch.Generator().manual_seed(0))
    values = [numbers(side) for _ in range(3) for side in stream.draw_apart(30, 10, 3)]
    assert len(set().union(*values)) == 120


def test_a_data_set_smaller_than_one_draw_holds_a_fifth_out_for_good() -> None:
    stream = CalibrationStream(TensorDataset(torch.arange(20.0)[:, None], torch.arange(20)), torch.Generator())
    for _ in range(2):
        fitting, apart = map(numbers, stream.draw_apart(30, 10, 2))
        assert len(apart) == 4 and sorted(fitting + apart) == list(range(20))


@pytest.mark.parametrize("name", ["damping", "first_order", "ridge", "fisher", "metric", "iterations", "swaps"])
def test_settings_out_of_range(name: str) -> None:
    for config in (LR, EWR):
        for value in (-1, float("nan"), "much", None, True):
            with pytest.raises(ValueError, match=name):
                config(**{name: value})


def test_a_loss_less_a_constant_is_stepped_down_alike() -> None:
    inputs = torch.randn(300, 6, generator=torch.Generator().manual_seed(2))
    targets = inputs[:, :2].tanh() + inputs[:, 2:4]
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2))

    def error(model: torch.nn.Module, batch: list[Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean(1)

    found = []
    for constant in (0.0, 100.0):
        model = copy.deepcopy(dense)
        report = prune(
            model,
            TensorDataset(inputs, targets),
            0.7,
            "lr",
            loss_fn=lambda net, batch, c=constant: error(net, batch) - c,
            progress=False,
        )
        steps = report.stages[0].evidence["first_order"]
        found.append((len(steps), error(model, [inputs, targets]).mean().item()))
    (steps, plain), (shifted_steps, shifted) = found
    assert steps > 0 and shifted_steps > 0 and shifted < 2 * plain


@pytest.mark.long
def test_floors_save_a_network_that_the_regression_would_cut() -> None:
    """At 97 % the regression leaves the middle layer thirty of 4,096 weights, its fair part being 123."""
    state = torch.Generator().manual_seed(5)
    inputs = torch.randn(2500, 20, generator=state)
    labels = (inputs[:, :5] * inputs[:, 5:10]).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
        optimizer = torch.optim.AdamW(dense.parameters(), lr=0.003, weight_decay=1e-4)
        for _ in range(20):
            for part in torch.randperm(2000).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(dense(inputs[part]), labels[part]).backward()
                optimizer.step()
    accuracies, middle = {}, {}
    for floor in ("auto", 0.0):
        model = copy.deepcopy(dense)
        data = TensorDataset(inputs[:2000], labels[:2000])
        report = prune(model, data, 0.97, LR(floor=floor), samples=256, progress=False)
        accuracies[floor] = float((model(inputs[2000:]).argmax(1) == labels[2000:]).float().mean())
        middle[floor] = report.layers["2.weight"].kept
    assert middle[0.0] < 40 < 60 < middle["auto"]
    assert accuracies["auto"] > accuracies[0.0] + 0.25, accuracies


@pytest.mark.long
def test_a_handful_of_samples_does_not_send_the_weights_away() -> None:
    torch.manual_seed(0)
    x, y = blurred_classes(4000)
    layers = [nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)]
    dense = trained(nn.Sequential(*layers), x[:3000], y[:3000], 400)

    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(x[3000:]), y[3000:]).detach())

    magnitude = copy.deepcopy(dense)
    prune(magnitude, None, 0.8, "magnitude", progress=False)
    for count, seed in itertools.product((5, 8, 10), range(6)):
        few = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))[:count]
        model = copy.deepcopy(dense)
        report = prune(model, TensorDataset(x[few], y[few]), 0.8, "lr", seed=seed, progress=False)
        assert report.stages[0].samples == count and len(report.notes) == 2, (
            "none is held out, and both notes are there"
        )
        assert loss(model) < 1.5 * loss(magnitude)
