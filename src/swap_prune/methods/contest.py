"""Which candidate for ridge, damping, metric and floor: fitted, and compared on held-out samples.

Those that are ``"auto"`` are chosen together, then swaps are taken where they gain.

Place in the pipeline: what LR and EWR begin with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swap_prune.methods.descent import Race, Steps, step_down, take_steps
from swap_prune.methods.fitted import Fitted
from swap_prune.methods.held_out import gains, held_out_losses, is_significant, mean_loss
from swap_prune.methods.pairing import Candidate, RegressionSettings, candidates_of, fair_floors, pairing_regression
from swap_prune.problem import PruningProblem
from swap_prune.process_memory import return_free_memory
from swap_prune.regression.iht import SparseFit, solve_sparse
from swap_prune.regression.metric import Metric
from swap_prune.regression.objective import ScaledGram, WeightedRidge
from swap_prune.regression.swap import can_swap, swap_weights
from swap_prune.regression.top_k import Floors, kept_beyond

__all__ = ["Paired", "finite_entries", "fit_pairing"]

_MILD = 0.5  # of the weights that are there: a stage that keeps so many compares candidates as they start
_OTHERS = 1.0  # steps of all other candidates, in units of those of the best
_FLOORS = (0.5, 0.75)  # tried where a layer would keep less: shares of what it would keep if all kept alike


class Paired(NamedTuple):
    """What was chosen.

    Attributes:
        regression: The regression.
        fit: Its solution.
        steps: Those taken from it, where it was chosen after them.
        evidence: For the report.
    """

    regression: WeightedRidge
    fit: SparseFit
    steps: Steps | None
    evidence: dict[str, Any]

    def steps_from(self, problem: PruningProblem, settings: RegressionSettings) -> Steps:
        """Return first-order steps from the fit; see :func:`step_down`."""
        if self.steps is None:
            return step_down(problem, self.regression, self.fit, settings.first_order, settings.steps)
        return self.steps


def fit_pairing(settings: RegressionSettings, problem: PruningProblem) -> Paired:
    """Fit each candidate for ridge, damping, metric and floor, swap weights, and keep what held-out samples favour.

    Where rows of mini-batches and of single samples may be compared, and much is removed, there is a contest on each of
    them, and the winner whose steps end lower is kept. Starts are no guide there: on single samples they are higher.
    Single samples, which win more often, come first: candidates on mini-batches are left where they do not keep up.
    """
    doubted = _takes_steps(settings, problem) and not _is_mild(problem)
    other = problem.rows_of_samples() if doubted and problem.rows_of_samples is not None else None
    if other is None:
        contest = _Contest(settings, problem)
        contest.hold()
        tried = contest.tried
    else:
        contest = _Contest(settings, replace(problem, factor=other))
        contest.hold()
        second = _Contest(settings, problem, contest.best.steps)
        second.hold()
        tried = [{"rows": "samples"} | one for one in contest.tried]
        tried += [{"rows": "mini-batches"} | one for one in second.tried]
        contest, of = (second, "mini-batches") if second.level < contest.level else (contest, "samples")
    best = contest.best
    evidence: dict[str, Any] = {} if other is None else {"rows": of}
    evidence |= best.candidate._asdict() | {"objective": best.packed.value, "swaps": best.packed.swaps}
    if len(tried) > 1:
        evidence["candidates"] = list(map(finite_entries, tried))
    return Paired(contest.stated(best.candidate), best.fit(problem.reference), best.steps, finite_entries(evidence))


def _takes_steps(settings: RegressionSettings, problem: PruningProblem) -> bool:
    """Whether steps will be taken as far as held-out samples gain."""
    return settings.first_order == "auto" and problem.held_out is not None and problem.slope is not None


def _is_mild(problem: PruningProblem) -> bool:
    """Whether a stage keeps most of the weights that are there."""
    return problem.keep >= math.floor(_MILD * int(problem.reference.count_nonzero()))


class _Contest:
    """Candidates compared by their held-out losses; where steps will be taken and much is removed, after them.

    Where a fit starves a layer, the same candidate is fitted with floors. The regression knows what each weight is
    worth beside the others, and not that none of them counts once all of a layer are gone. A floor stays where held-out
    samples gain by it, beyond their error: among fits in one metric, the one of lower loss also ends lower after steps.

    Across metrics a lower start does not mean a lower end. A candidate that starts no higher than the best one started
    therefore takes steps of its own, until they end or it falls behind: behind the best after as many steps, or behind
    where a later candidate starts. All but the best may take as many steps together as the best took; after that only a
    candidate that starts below the best's end takes any.

    A stage that keeps at least half of the weights that are there loses little. Candidates are then ranked by their
    losses before any step, and the best alone takes steps, unless it has lost all.

    A fit that is no better than the network without any weight has lost all: its loss hardly tells what steps will make
    of it. Such a fit and the one with a floor both go on to the steps; and where the best so far had lost all, every
    candidate takes a few steps. Such candidates are compared by their levels: a mean over samples of which none counts
    for more than it does without any weight.

    Args:
        settings: Of the method.
        problem: The pruning problem.
        other: The best steps on other rows, where there are any. A candidate that does not keep up with them is left,
            and so are those that start no lower than it; there may be no best then.
    """

    def __init__(self, settings: RegressionSettings, problem: PruningProblem, other: Steps | None = None) -> None:
        self._settings, self._problem, self._other = settings, problem, other
        fisher = problem.fisher()
        self._diagonal, self._target = fisher.diagonal(), fisher.matvec(problem.reference)
        self.tried: list[dict[str, Any]] = []  # for the report
        self._best: Fitted | None = None
        self._least = math.inf  # level of the best after its steps, or its mean loss
        self._last: Fitted | None = None  # its path is not walked again
        self._beginning: tuple[tuple[float, Metric], ScaledGram] | None = None  # of paths in a metric
        self._taken = 0  # steps, of all candidates since there is a best
        self._left = math.inf  # the lowest start that was left, for candidates on other rows
        self._takes_steps = _takes_steps(settings, problem)
        self._blank = problem.blank() if self._takes_steps and problem.blank is not None else None
        many = fisher.shape[0] >= problem.reference.numel()  # rows, so that swaps cost next to nothing
        self._swaps_each = many and problem.held_out is not None
        self._is_mild = _is_mild(problem)
        self._steps_later = False  # of the best alone

    @property
    def best(self) -> Fitted:
        """The best of all so far: nothing else should hold it while others are fitted."""
        assert self._best is not None, "there is at least one candidate"
        return self._best

    @property
    def level(self) -> float:
        """The level of the best after its steps, or its mean loss."""
        return self._least

    def hold(self) -> None:
        """Compare all candidates, try swaps, and take the steps that are left to take."""
        self.compare_all()
        self.try_swaps()
        self.finish()

    def compare_all(self) -> None:
        """Fit the candidates, then compare them where their steps end, or where they start."""
        first, *others = self._fit_all()
        self._beginning = self._last = None  # no path is walked any more
        fits = [first, *sorted(others, key=lambda one: one.loss)]
        del first, others
        least = min(one.loss for one in fits)
        if self._takes_steps and self._is_mild and least < math.inf and not self._has_lost(least):
            self._takes_steps, self._steps_later = False, True
        while fits:
            self._judge(fits.pop(0), min((one.loss for one in fits), default=math.inf))

    def try_swaps(self) -> None:
        """Swap weights of the best, and keep that where held-out samples gain by it or cannot be asked."""
        if self._best is None or self._has_ended or self._swaps_each:
            return
        return_free_memory()
        best = self.best
        fit = best.fit(self._problem.reference)
        swapped = swap_weights(self.stated(best.candidate), fit, self._settings.swaps, self._diagonal)
        del fit
        if not swapped.swaps:
            return
        if best.losses is None:
            self._best = Fitted.of(best.candidate, swapped, None)
            return
        after = held_out_losses(self._problem, swapped)
        fitted = Fitted.of(best.candidate, swapped, after, swaps=swapped.swaps)
        del swapped
        self.tried.append(fitted.entry)
        if is_significant(gains(best.losses, after)):
            self._judge(fitted)

    def finish(self) -> None:
        """Take the steps of the best, where candidates were compared as they start."""
        if not self._steps_later:
            return
        fitted, self._best = self.best, None  # nothing else holds it meanwhile
        steps = take_steps(
            self._problem,
            self.stated(fitted.candidate),
            fitted.fit(self._problem.reference),
            Race(),
            fitted.losses,
            self._blank,
            self._settings.steps,
        )
        self._best = fitted._replace(steps=steps)
        fitted.entry["loss_after_steps"] = steps.levels[-1]

    def stated(self, candidate: Candidate) -> WeightedRidge:
        """State the regression of a candidate."""
        return pairing_regression(self._problem, *candidate, diagonal=self._diagonal, target=self._target)

    def _fit_all(self) -> list[Fitted]:
        """Fit the candidates; others begin with the floor that the first has come to, the low one, or none."""
        candidates = candidates_of(self._settings, self._diagonal, self._problem.fisher().shape[0])
        if self._problem.held_out is None:
            candidates = candidates[:1]
        asked = candidates[0].floor
        if asked and fair_floors(self._problem, asked, self._diagonal) is self._problem.floors:  # it would take all k
            candidates = [candidate._replace(floor=0.0) for candidate in candidates]
        if self._takes_steps:
            candidates = sorted(reversed(candidates), key=lambda one: -one.damping)  # those that gain most first
        floors = _FLOORS if self._settings.floor == "auto" and self._problem.held_out is not None else ()
        fits = self._fit_with(candidates[0], floors)
        floor = min((fits[0].candidate.floor, *floors))
        for candidate in candidates[1:]:
            fits += self._fit_with(candidate._replace(floor=floor), floors)
        return fits

    def _fit_with(self, candidate: Candidate, floors: Sequence[float]) -> list[Fitted]:
        """Fit a candidate, with floors under which it starves a layer, and return what held-out samples favour.

        A fit that has lost all is returned too, before the one with a floor: which is better, later steps decide.
        """
        fits = [self._fit(candidate)]
        for floor in floors:
            if not _is_starved(fits[-1].packed.support, fair_floors(self._problem, floor, self._diagonal)):
                continue
            raised = self._fit(candidate._replace(floor=floor))
            if self._has_lost(fits[-1].loss):
                fits.append(raised)
            elif is_significant(gains(fits[-1].held_out(), raised.held_out())):
                fits[-1] = raised
            del raised  # its arrays, while the next is fitted
        return fits

    def _judge(self, fitted: Fitted, start: float = math.inf) -> None:
        """Keep a fit where it is the best, after steps where they are taken; those after it start from some loss."""
        loss = fitted.loss
        if self._takes_steps:
            steps = self._steps_from(fitted, start)
            if steps is None:
                return
            if self._best is not None or not steps.behind:
                self._taken += len(steps.lengths)
            if steps.behind:
                self._left = min(self._left, fitted.loss)
                return
            fitted, loss = fitted._replace(steps=steps), steps.levels[-1]
            fitted.entry["loss_after_steps"] = loss
        if self._best is None or loss < self._least:
            self._best, self._least = fitted, loss

    @property
    def _has_ended(self) -> bool:
        """Whether candidates that are not the best have taken all the steps that they may."""
        if self._best is None or self._best.steps is None:
            return False
        own = len(self._best.steps.lengths)
        return self._taken - own >= _OTHERS * max(1, own)

    def _steps_from(self, fitted: Fitted, start: float) -> Steps | None:
        """Take steps from a fit; None where it may not."""
        rival, lost = None if self._best is None else self._best.steps, False
        if rival is not None:
            lost = self._has_lost(rival.losses[0])
            keeps_up = fitted.loss <= rival.losses[0] and not self._has_ended
            if fitted.loss == math.inf or not (lost or keeps_up or self._level(fitted) < self._least):
                return None
        elif self._other is not None and fitted.loss >= self._left:
            return None
        elif fitted.loss == math.inf:  # there may be no slope either
            return Steps(fitted.packed.weights, [], [fitted.loss], [fitted.loss])
        return take_steps(
            self._problem,
            self.stated(fitted.candidate),
            fitted.fit(self._problem.reference),  # without a name, so that it is gone when it was left
            Race(rival, lost, start, self._other),
            fitted.losses,
            self._blank,
            self._settings.steps,
        )

    def _has_lost(self, loss: float) -> bool:
        """Whether a mean loss is no less than without any weight."""
        return self._blank is not None and loss >= mean_loss(self._blank)

    def _level(self, fitted: Fitted) -> float:
        """Return a mean of held-out losses of which none counts for more than without any weight, if that is known."""
        return fitted.loss if self._blank is None else mean_loss(torch.fmin(fitted.held_out(), self._blank))

    def _fit(self, candidate: Candidate) -> Fitted:
        """Solve the regression of one candidate; in the metric of the last one its path need not be walked again."""
        return_free_memory()  # the heap grows with each fit, whose vectors come and go
        if self._last is not None and self._last.candidate.path != candidate.path:
            self._last = None
        near = None if self._last is None else self._last.packed
        metric = (candidate.damping, candidate.metric)
        if self._beginning is not None and self._beginning[0] != metric:
            self._beginning = None
        if near is None:
            previous = None if self._beginning is None else self._beginning[1]
        else:
            previous = None if near.refit is None else near.refit.gram
        regression = self.stated(candidate)
        fit = solve_sparse(
            regression,
            self._problem.keep,
            start=None if near is None else near.support,
            previous=previous,
            max_iterations=self._settings.iterations,
            swaps_follow=self._settings.swaps > 0 and can_swap(regression, self._problem.keep),
        )
        swapped = fit
        if self._swaps_each:
            swapped = swap_weights(regression, fit, self._settings.swaps, self._diagonal)
        del regression  # its metric is as large as p
        if fit.first is not None:
            if fit.first.support.nbytes <= fit.first.matrix.nbytes:  # else n is small, and the matrix soon made anew
                self._beginning = metric, fit.first
            fit = replace(fit, first=None)
        losses = None if self._problem.held_out is None else held_out_losses(self._problem, fit)
        self._last = Fitted.of(candidate, fit, losses)
        if swapped.swaps:
            assert losses is not None, "swaps of each are judged by them"
            after = held_out_losses(self._problem, swapped)
            if is_significant(gains(losses, after)):
                self._last = Fitted.of(candidate, swapped, after, swaps=swapped.swaps)
        self.tried.append(self._last.entry)
        return self._last


def _is_starved(support: Tensor, floors: Floors) -> bool:
    """Whether a support, in increasing order, leaves a layer fewer weights than its floor."""
    return bool(floors) and bool((kept_beyond(support, floors) < 0).any())


def finite_entries(entry: dict[str, Any]) -> dict[str, Any]:
    """Leave out the numbers that JSON cannot hold."""
    return {key: value for key, value in entry.items() if not isinstance(value, float) or math.isfinite(value)}
