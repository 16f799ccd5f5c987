"""Steps taken once more, with slopes over the samples that have chosen them as well."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from swap_prune import EWR, LR, PruningReport, prune
from swap_prune.methods import lr
from swap_prune.methods.descent import Steps, take_steps
from swap_prune.methods.pairing import pairing_regression
from swap_prune.methods.steps_again import steps_again
from swap_prune.problem import PruningProblem
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.natural_gradient import NaturalGradient
from swap_prune.regression.objective import WeightedRidge
from tests.cases import blurred_classes, trained
from tests.samples.test_held_out import problem_with


def stated(**asked: Any) -> tuple[PruningProblem, WeightedRidge, SparseFit]:
    """A problem whose loss is the distance from a goal, its regression, and a fit."""
    problem = problem_with(None)
    regression = pairing_regression(problem, 0.1, 1.0)
    fit = solve_sparse(regression, problem.keep)
    goal = fit.weights + 1.0
    known: dict[str, Any] = {"blank": lambda: torch.full((1,), math.inf), "slope": lambda w, kept: w - goal}
    known["held_out"] = lambda w, kept: (w - goal).square()
    return replace(problem, **{**known, **asked}), regression, fit


@pytest.mark.parametrize("whole", [False, True])
def test_with_the_same_slopes_it_is_the_same_way(whole: bool) -> None:
    problem, regression, fit = stated()
    if whole:  # slopes over small batches lead nowhere
        slope = problem.slope
        assert slope is not None
        problem = replace(problem, whole_slope=slope, slope=lambda w, kept: -slope(w, kept))
    problem = replace(problem, all_samples=lambda: replace(problem, all_samples=None))
    steps = take_steps(problem, regression, fit)
    assert sum(steps.counts) == len(steps.lengths) > 3
    assert [count > 0 for count in steps.counts] == ([False, False, True] if whole else [True, True])
    nearer = replace(problem, held_out=lambda w, kept: -(w - fit.weights).square())  # so that it is taken
    moved, evidence = steps_again(LR(), nearer, regression, fit, steps._replace(values=fit.weights[fit.support]))
    assert evidence == {"first_order": steps.lengths, "all_samples": True}
    assert torch.equal(moved.weights, steps.applied_to(fit).weights)


def test_it_follows_the_slopes_of_all_samples_from_the_fit() -> None:
    problem, regression, fit = stated()
    far = fit.weights + 2.0
    wide = replace(problem, slope=lambda w, kept: w - far)
    steps = Steps(fit.weights[fit.support] + 0.5, [0.2, 0.1], [9.0], [9.0], counts=(1, 1))
    moved, _ = steps_again(LR(), replace(problem, all_samples=lambda: wide), regression, fit, steps)
    first = NaturalGradient.on(regression, fit.support, 0.1)
    w = fit.weights + 0.2 * first.direction(fit.weights - far)
    damped = pairing_regression(problem, 0.1, 30.0)
    w = w + 0.1 * NaturalGradient.on(damped, fit.support, 0.1).direction(w - far)
    torch.testing.assert_close(moved.weights, w)
    assert torch.equal(moved.kept(), fit.kept())


def test_where_even_held_out_samples_lose_the_first_way_stays() -> None:
    problem, regression, fit = stated()
    slope = problem.slope
    assert slope is not None
    astray = replace(problem, slope=lambda w, kept: -slope(w, kept))
    steps = take_steps(problem, regression, fit)
    moved, evidence = steps_again(LR(), replace(problem, all_samples=lambda: astray), regression, fit, steps)
    assert evidence["all_samples"] is False and torch.equal(moved.weights, steps.applied_to(fit).weights)


def test_the_first_model_is_gone_when_the_second_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has columns of G."""
    alive = []

    class Counted(NaturalGradient):
        @classmethod
        def on(cls, *arguments: Any) -> NaturalGradient:
            gc.collect()
            alive.append(sum(issubclass(type(one), NaturalGradient) for one in gc.get_objects()))
            return super().on(*arguments)

    problem, regression, fit = stated()
    monkeypatch.setattr("swap_prune.methods.descent.NaturalGradient", Counted)
    steps = take_steps(problem, regression, fit)
    steps_again(LR(), replace(problem, all_samples=lambda: problem), regression, fit, steps)
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("method", [LR, EWR])
def test_it_can_be_left_out(method: Any) -> None:
    problem, _, _ = stated()
    problem = replace(problem, all_samples=lambda: problem)
    with_it, without = (method(all_samples=do).solve(problem, torch.Generator()).evidence for do in (True, False))
    assert "all_samples" in with_it and "all_samples" not in without
    assert with_it["first_order"] == without["first_order"]
    with pytest.raises(ValueError, match="all_samples must be true or false, got 'no'"):
        method(all_samples="no")


def network(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)), x, y, 150)


def test_those_of_a_coupling_that_was_taken_start_at_its_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _, _ = stated()
    problem = replace(problem, all_samples=lambda: problem)
    seen: list[tuple[SparseFit, Steps]] = []

    def again(_: EWR, __: PruningProblem, ___: WeightedRidge, fit: SparseFit, steps: Steps) -> Any:
        seen.append((fit, steps))
        return steps.applied_to(fit), {}

    monkeypatch.setattr("swap_prune.methods.ewr.steps_again", again)
    for anchor in (0.0, 1.0):
        EWR(anchor=anchor, epsilon=0.1, swaps=0).solve(problem, torch.Generator())
    (paired, _), (coupled, steps) = seen
    assert problem.held_out is not None and not torch.equal(paired.weights, coupled.weights)
    assert steps.losses[0] == float(problem.held_out(coupled.weights, coupled.kept()).double().mean())


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A plain function: there is no teacher."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_the_slope_of_all_samples_is_their_mean_gradient(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blurred_classes(60)
    data, model = TensorDataset(x, y), network(x, y)
    asked: list[tuple[PruningProblem, Tensor, Tensor]] = []

    def found(settings: LR, problem: PruningProblem, _: WeightedRidge, fit: SparseFit, steps: Steps) -> Any:
        assert problem.all_samples is not None and problem.slope is not None
        wide = problem.all_samples()
        assert wide.slope is not None
        asked.append((problem, fit.weights, wide.slope(fit.weights, fit.kept())))
        return fit, {}

    monkeypatch.setattr(lr, "steps_again", found)
    prune(model, data, 0.7, "lr", samples=40, loss_fn=losses, storage=storage, progress=False)
    ((problem, weights, slope),) = asked
    assert problem.selection is not None
    mean = losses(model, (x, y)).mean()  # the network has the weights of the fit now
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(mean, [parameters[name] for name in problem.selection.names])
    torch.testing.assert_close(problem.selection.read(model), weights)
    torch.testing.assert_close(slope, torch.cat([one.flatten() for one in gradients]), rtol=1e-3, atol=1e-6)


class Stream(IterableDataset[Any]):
    """Samples without numbers."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


@pytest.mark.parametrize(
    ("kind", "samples", "stages"),
    [("plenty", 40, [1, 2, 3]), ("few", 120, [3]), ("stream", 40, [3])],
)
def test_stages_that_may_learn_from_what_they_held_out(kind: str, samples: int, stages: list[int]) -> None:
    """All whose held-out samples no later stage asks, and the last."""
    x, y = blurred_classes(300)
    data: Any = TensorDataset(x, y)
    if kind == "stream":
        data = DataLoader(Stream(data), batch_size=20)
    method = LR(ridge=0.1, metric="diagonal", damping=1.0, floor=0.0, steps=2)
    report = prune(network(x, y), data, 0.9, method, samples=samples, stages=3, progress=False)
    assert all(stage.evidence["first_order"] for stage in report.stages), "else there is nothing to see"
    assert learning(report) == stages


def learning(report: PruningReport) -> list[int]:
    return [number for number, stage in enumerate(report.stages, 1) if "all_samples" in stage.evidence]
