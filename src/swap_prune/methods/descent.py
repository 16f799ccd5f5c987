"""First-order steps from a fit, taken as long as the loss on held-out samples gains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from swap_prune.methods.held_out import gains, held_out_losses, is_significant, loss_floor, mean_loss
from swap_prune.problem import PruningProblem
from swap_prune.regression.iht import SparseFit
from swap_prune.regression.metric import damped_metric
from swap_prune.regression.natural_gradient import NaturalGradient
from swap_prune.regression.objective import WeightedRidge

__all__ = [
    "LEAST_GAIN",
    "STEPS",
    "Race",
    "Steps",
    "first_model",
    "second_model",
    "step_down",
    "take_steps",
]

STEPS = 12  # natural-gradient steps a stage in each metric, and with each slope, at the most, by default
LEAST_GAIN = 0.001  # of the held-out loss above its floor; a step that gains less is the last one
_STEP_RIDGE = 0.1  # their damping
_STEP_METRIC = 30.0  # damping of the second metric; few rows tell little of single weights, and the fit's ends early
_FIRST_LENGTH = 0.3  # tried first, at the most; the next steps start from the length that was taken last
_GROWTH = 3.0  # of a length, from trial to trial
_GROWTHS, _SHRINKS = 3, 3  # trials at the most
_BELOW_AIM = 2.0  # standard errors that a step has to gain which leads below the loss before the stage
_PLAIN_SHRINKS = 6  # of a plain function, from the longest that there can be to what would gain no LEAST_GAIN
_BEHIND = 0.05  # of a rival's held-out loss after as many steps: more than that above it, steps are given up
_AGAIN = 1  # slopes after one that leads nowhere, where each has noise of its own
_ROUNDING = 1e-4  # of the norm, between slopes without noise
_PATIENCE = 3  # steps after which they must not be that much above where others start
_LATE = 4  # steps after which candidates on other rows are told apart: rows of samples start higher and soon are lower


class Steps(NamedTuple):
    """Steps that were taken from a fit.

    Attributes:
        values: Where they led: w on the support, (k,).
        lengths: Of each.
        losses: Mean losses on held-out samples, before the first and after each.
        levels: The same, no sample counting for more than without any weight, where that is known.
        behind: Whether they were given up behind a rival.
        counts: How many were taken in the first metric, in the second, and then with whole slopes.
    """

    values: Tensor
    lengths: list[float]
    losses: list[float]
    levels: list[float]
    behind: bool = False
    counts: tuple[int, ...] = ()

    def applied_to(self, fit: SparseFit) -> SparseFit:
        """Return the fit that they were taken from with its weights moved."""
        return replace(fit, weights=torch.zeros_like(fit.weights).index_copy_(0, fit.support, self.values))


class Race(NamedTuple):
    """What steps have to keep up with.

    Attributes:
        rival: The steps of the best candidate so far, compared after as many.
        lost: Whether the rival started no better than the network without any weight. Its levels are compared then, and
            not before a few steps: a mean depends on how sure the network is where it is wrong.
        start: The lowest mean loss that other candidates start from; levels must come near it after a few steps.
        other: The best steps on other rows, whose levels must not be lower after as many, once there are a few.
    """

    rival: Steps | None = None
    lost: bool = False
    start: float = math.inf
    other: Steps | None = None

    def is_left(self, losses: list[float], levels: list[float], floor: float = 0.0) -> bool:
        """Whether steps have fallen behind, by what they have come to so far, above the floor of losses."""
        early = len(levels) <= _PATIENCE
        if not early and _is_above(levels[-1], self.start, floor):
            return True
        if self.other is not None and len(levels) > _LATE and levels[-1] > _after(self.other.levels, len(levels)):
            return True
        if self.rival is None or (self.lost and early):
            return False
        own, others = (levels, self.rival.levels) if self.lost else (losses, self.rival.losses)
        return _is_above(own[-1], _after(others, len(own)), floor)


_ALONE = Race()


def _after(losses: list[float], count: int) -> float:
    """Return the loss that stands at a place, or the last one."""
    return losses[min(count, len(losses)) - 1]


def _is_above(loss: float, other: float, floor: float) -> bool:
    return loss > other + _BEHIND * abs(other - floor)


def step_down(
    problem: PruningProblem, regression: WeightedRidge, fit: SparseFit, length: float | str, most: int = STEPS
) -> Steps:
    """Go down the loss along the natural gradient, on the support of a fit.

    Args:
        problem: The pruning problem.
        regression: The regression that was solved.
        fit: Its sparse solution.
        length: Length of a single step; ``"auto"`` takes several, each with a slope of its own and as long as the
            mean loss on held-out samples gains from it; none where nothing is held out.
        most: So many in each metric, and with each slope, at the most.

    Returns:
        The steps; losses are those that were asked for.
    """
    if length == "auto" and problem.slope is not None and problem.held_out is not None:
        return take_steps(problem, regression, fit, most=most)
    values = fit.weights.index_select(0, fit.support)
    if length in (0, "auto") or problem.slope is None:
        return Steps(values, [], [], [])
    direction = first_model(regression, fit).direction(problem.slope(fit.weights, fit.kept()))
    return Steps(values + float(length) * direction[fit.support], [float(length)], [], [], counts=(1,))


def first_model(regression: WeightedRidge, fit: SparseFit) -> NaturalGradient:
    """Return what says where the first steps from a fit go: in the metric that it was found in."""
    return NaturalGradient.on(regression, fit.support, damping_of(regression), fit.refit)


def second_model(
    problem: PruningProblem, regression: WeightedRidge, support: Tensor
) -> Callable[[], NaturalGradient] | None:
    """Return what makes the model of further steps, in a metric of more damping; None where that is the first.

    Not the model: the first need not be held beside it.
    """
    f = regression.factor.diagonal()
    metric = damped_metric(f, _STEP_METRIC, "diagonal", problem.layers(), reference=problem.reference)
    del f
    if damping_of(regression) == _STEP_RIDGE and torch.equal(metric, regression.metric):
        return None
    return partial(NaturalGradient.on, replace(regression, metric=metric), support, _STEP_RIDGE)


def take_steps(
    problem: PruningProblem,
    regression: WeightedRidge,
    fit: SparseFit,
    race: Race = _ALONE,
    losses: Tensor | None = None,
    blank: Tensor | None = None,
    most: int = STEPS,
) -> Steps:
    """Take steps of their own lengths, in both metrics, as long as held-out samples gain.

    Where slopes are over small batches, so that noise can be left out of them, steps go on from there with slopes over
    larger ones, whose statistics are nearer to what recalibration makes of the network. All of them together must gain
    more than their standard error.

    What is as large as p is dropped as soon as it was used, where the caller does not hold it either.

    Args:
        problem: The pruning problem, with held-out samples and a slope.
        regression: The regression that was solved.
        fit: Its sparse solution.
        race: What they have to keep up with.
        losses: Held-out losses of the fit, (n_v,), where they are known already.
        blank: Those of the network without any of the p weights, (n_v,), where they are known.
        most: Steps in each metric, and with each slope, at the most.

    Returns:
        The steps, given up where they fell behind.
    """
    losses = held_out_losses(problem, fit) if losses is None else losses
    model = first_model(regression, fit)
    walk, support = _Walk(problem, replace(fit, refit=None), race, blank, loss_floor(problem, losses)), fit.support
    walk.aim, walk.most = level_before(problem), most
    del fit
    walk.arrive(losses)
    walk.descend(model)
    if not walk.is_behind:
        second = second_model(problem, regression, support)
        if second is not None:
            del model
            model = second()
        del second  # its metric is as large as p
        walk.descend(model)
        if problem.whole_slope is not None and not walk.is_behind:
            there, before = walk.steps(support), walk.found
            walk.follow(problem.whole_slope)
            walk.descend(model)
            assert before is not None and walk.found is not None, "it had arrived"
            if not is_significant(gains(before, walk.found)):
                return there
    return walk.steps(support)


def level_before(problem: PruningProblem) -> float:
    """Return the mean held-out loss before the stage, where a plain function is all that there is to learn from.

    Steps make good what pruning has done. Further down they train, on a few labels that nothing else bears out.
    """
    if problem.held_out is None or problem.blank is not None:
        return -math.inf
    return mean_loss(problem.held_out(problem.reference, torch.ones_like(problem.reference, dtype=torch.bool)))


def damping_of(regression: WeightedRidge) -> float:
    """Return the damping of steps: a number where the metric has the unit of f, the mean of f to it where m is 1."""
    if bool((regression.metric == 1).all()):
        return _STEP_RIDGE * (float(regression.factor.diagonal().mean()) or 1.0)
    return _STEP_RIDGE


@dataclass
class _Walk:
    """Steps taken as long as held-out samples gain.

    Attributes:
        problem: The pruning problem, with held-out samples and a slope.
        fit: Where they have come to. Nothing else should hold its weights: they are as large as p.
        race: What to keep up with.
        blank: Held-out losses without any weight, (n_v,), where they are known.
        floor: What losses are taken not to fall below.
        most: Steps of one model, at the most.
        aim: A mean held-out loss, of no more than which only steps lead on that gain `_BELOW_AIM` standard errors.
        found: Held-out losses of where they have come to, (n_v,).
        losses: Mean held-out losses, before the first step and after each.
        levels: The same, no sample counting for more than without any weight.
        lengths: Of the steps.
        counts: How many of them were taken with each model and slope.
        slope: gamma at the fit, (p,), where it is known: when no length gained.
        again: How often it may be taken again there.
        same: Whether it was the same when it was: then there is no noise in it.
    """

    problem: PruningProblem
    fit: SparseFit
    race: Race
    blank: Tensor | None
    floor: float
    most: int = STEPS
    aim: float = -math.inf
    found: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    slope: Tensor | None = None
    again: int = _AGAIN
    same: bool = False

    @property
    def is_behind(self) -> bool:
        """Whether they do not keep up."""
        return self.race.is_left(self.losses, self.levels, self.floor)

    def arrive(self, losses: Tensor) -> None:
        """Note the held-out losses, (n_v,), of where the steps have come to."""
        self.floor, self.found = min(self.floor, loss_floor(self.problem, losses)), losses
        self.losses.append(mean_loss(losses))
        self.levels.append(self.losses[-1] if self.blank is None else mean_loss(torch.fmin(losses, self.blank)))

    def steps(self, support: Tensor) -> Steps:
        """Return the steps so far, on a support (k,)."""
        values = self.fit.weights.index_select(0, support)
        return Steps(values, [*self.lengths], [*self.losses], [*self.levels], self.is_behind, (*self.counts,))

    def follow(self, slope: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Go on with another slope."""
        self.problem, self.slope, self.same = replace(self.problem, slope=slope), None, False

    def ask_again(self) -> bool:
        """Take a slope that leads nowhere again, and return whether it is another: noise may have turned it."""
        assert self.problem.slope is not None and self.slope is not None, "the caller has one"
        if self.same or self.again == 0:
            return False
        before, self.slope = self.slope, self.problem.slope(self.fit.weights, self.fit.kept())
        change = torch.linalg.vector_norm(self.slope - before)
        self.again, self.same = self.again - 1, not bool(change > _ROUNDING * torch.linalg.vector_norm(before))
        return not self.same

    def descend(self, descent: NaturalGradient) -> None:
        """Go on where a model says, a number of steps at the most."""
        assert self.problem.slope is not None and self.found is not None, "the caller checks, and has arrived"
        plain = self.problem.blank is None
        length, shrinks = (math.inf, _PLAIN_SHRINKS) if plain else (_FIRST_LENGTH, _SHRINKS)
        self.again = _AGAIN
        self.counts.append(0)
        for _ in range(self.most):
            if self.slope is None:
                self.slope = self.problem.slope(self.fit.weights, self.fit.kept())
            direction, least = descent.direction(self.slope), self.losses[-1]
            start = min(length, polyak_length(self.slope, direction, least - self.floor))
            start = start if start < math.inf else _FIRST_LENGTH
            step, reached = line_search(self.problem, self.fit, direction, start, least, shrinks)
            if reached is None:
                del direction
                if self.ask_again():
                    continue
                break
            if least <= self.aim and not is_significant(gains(self.found, reached), _BELOW_AIM):
                break
            self.fit, self.slope = replace(self.fit, weights=self.fit.weights + step * direction), None
            del direction  # before the next one is there
            length = step
            self.again, self.same = _AGAIN, False
            self.lengths.append(step)
            self.counts[-1] += 1
            self.arrive(reached)
            if least - self.losses[-1] < LEAST_GAIN * abs(least - self.floor) or self.is_behind:
                break


def polyak_length(slope: Tensor, direction: Tensor, loss: float) -> float:
    """Return the length at which a linear model says that the whole loss is gone (Polyak, 1969).

    No step need start with a longer one. It is far below 1 where pruning has left the region that the Fisher describes.

    Args:
        slope: gamma, (p,).
        direction: d, (p,).
        loss: Mean loss at length 0, above its floor; one that is not bounds nothing.
    """
    fall = -float(slope @ direction)
    return loss / fall if fall > 0 and loss > 0 else math.inf


def line_search(
    problem: PruningProblem, fit: SparseFit, direction: Tensor, start: float, least: float, shrinks: int = _SHRINKS
) -> tuple[float, Tensor | None]:
    """Find a length whose mean loss on held-out samples is lower than that of no step.

    Longer lengths are tried as long as they gain; where the first does not gain, shorter ones until one does.

    Args:
        problem: The pruning problem, with held-out samples.
        fit: Where the line starts.
        direction: Its direction, (p,).
        start: The first length tried.
        least: Mean held-out loss at length 0.
        shrinks: Shorter lengths tried at the most.

    Returns:
        The length and its held-out losses, (n_v,); 0 and None where none is lower.
    """

    def losses_at(length: float) -> Tensor:
        return held_out_losses(problem, replace(fit, weights=fit.weights + length * direction))

    length, losses = start, losses_at(start)
    if mean_loss(losses) < least:
        for _ in range(_GROWTHS):
            further = losses_at(length * _GROWTH)
            if not mean_loss(further) < mean_loss(losses):
                break
            length, losses = length * _GROWTH, further
        return length, losses
    for _ in range(shrinks):
        length = length / _GROWTH
        losses = losses_at(length)
        if mean_loss(losses) < least:
            return length, losses
    return 0.0, None
