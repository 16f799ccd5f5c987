"""Candidates are compared where their steps end, and take no more of them than that needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swap_prune import EWR, LR
from swap_prune.methods import contest
from swap_prune.methods.descent import Race, Steps, take_steps
from swap_prune.methods.fitted import Fitted
from swap_prune.methods.held_out import is_significant
from swap_prune.problem import PruningProblem
from swap_prune.regression.iht import SparseFit
from tests.samples.test_held_out import problem_with, starving

Taken = tuple[int, tuple[float, ...], bool]
ALONE: Taken = (0, (), False)  # the first, beside no other


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    before: Sequence[float],
    after: Sequence[float | None],
    lengths: Sequence[int] | None = None,
) -> tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor], list[Taken]]:
    """Held-out losses of each candidate as it starts, and where its steps end; None: they are given up."""
    seen, taken, returned = list[Tensor](), list[Taken](), list[Tensor]()

    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        returned.append(torch.full((3,), before[len(seen)], dtype=torch.float64))
        seen.append(w)
        return returned[-1]

    def steps(
        problem: object,
        regression: object,
        fit: SparseFit,
        race: Race,
        losses: Tensor,
        blank: Tensor | None,
        most: int,
    ) -> Steps:
        (number,) = (i for i, one in enumerate(returned) if one is losses)
        assert torch.equal(fit.weights, seen[number])
        taken.append((number, () if race.rival is None else tuple(race.rival.losses), race.lost))
        end, count = after[number], 0 if lengths is None else lengths[number]
        losses = [before[number], *([] if end is None else [end])]
        return Steps(fit.weights[fit.support], [0.1] * count, losses, losses, behind=end is None)

    monkeypatch.setattr(contest, "take_steps", steps)
    return held_out, seen, taken


@pytest.mark.parametrize(
    ("before", "after", "best", "taken"),
    [
        (
            (0.5, 0.6, 0.4, 0.45),
            (0.3, 0.0, 0.2, 0.0),
            2,
            [ALONE, (2, (0.5, 0.3), False)],
        ),
        (
            (0.5, 0.6, 0.4, 0.45),
            (0.3, 0.0, 0.35, 0.1),
            3,
            [ALONE, (2, (0.5, 0.3), False), (3, (0.5, 0.3), False)],
        ),
        (
            (0.5, 0.5, 0.4, 0.3),
            (0.3, None, None, None),
            0,
            [ALONE, *((i, (0.5, 0.3), False) for i in (3, 2, 1))],
        ),
        ((0.5, math.inf, 0.4, math.inf), (0.3, 0.1, 0.4, 0.1), 0, [ALONE, (2, (0.5, 0.3), False)]),
    ],
)
def test_candidates_are_compared_where_their_steps_end(
    before: tuple[float, ...],
    after: tuple[float | None, ...],
    best: int,
    taken: list[Taken],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_out, seen, walked = scripted(monkeypatch, before, after)
    solution = LR(swaps=0, floor=0).solve(problem_with(held_out), torch.Generator())
    candidates = solution.evidence["candidates"]
    assert [one.get("held_out_loss", math.inf) for one in candidates] == pytest.approx(list(before))
    order = [(30.0, "diagonal"), (30.0, "layer"), (1.0, "factored"), (1.0, "diagonal")]
    assert [(one["damping"], one["metric"]) for one in candidates] == order, "first those that gain most"
    assert walked == taken and torch.equal(solution.weights, seen[best])
    asked = {number for number, *_ in taken}
    ends = [after[number] if number in asked else None for number in range(4)]
    assert [one.get("loss_after_steps") for one in candidates] == ends


@pytest.mark.parametrize(
    ("before", "after", "best", "taken"),
    [
        ((0.5, 0.6, 0.7, 0.8), (None, 0.1, 0.1, 0.1), 0, [4]),  # left, and those that start higher take none
        ((0.5, 0.45, 0.4, 0.5), (None, None, None, 0.1), 0, [4, 6]),  # nor those that start as high as the lowest left
        ((0.5, 0.6, 0.4, 0.8), (None, 0.1, 0.25, 0.1), 6, [4, 6]),  # one that starts lower keeps up, and ends lower
        ((0.5, 0.6, 0.4, 0.8), (0.35, 0.1, None, 0.1), 0, [4, 6]),  # none was left before there was a best
        ((math.inf, 0.6, 0.5, 0.8), (0.1,) * 4, 6, [6]),  # the first takes none
    ],
)
def test_candidates_on_rows_of_mini_batches_have_to_keep_up_with_those_of_samples(
    before: tuple[float, ...],
    after: tuple[float | None, ...],
    best: int,
    taken: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first four candidates are on samples; what race the others run is said to them."""
    others: list[Steps | None] = []
    held_out, seen, walked = scripted(monkeypatch, (0.4, 0.9, 0.9, 0.9, *before), (0.3, *[None] * 3, *after))
    script = contest.take_steps

    def steps(problem: object, regression: object, fit: SparseFit, race: Race, *rest: object) -> Steps:
        others.append(race.other)
        return script(problem, regression, fit, race, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(contest, "take_steps", steps)
    problem = problem_with(held_out)
    problem = replace(problem, rows_of_samples=lambda: problem.factor)
    solution = LR(swaps=0, floor=0).solve(problem, torch.Generator())
    assert torch.equal(solution.weights, seen[best])
    assert solution.evidence["rows"] == ("samples" if best == 0 else "mini-batches")
    assert [number for number, *_ in walked] == [0, *taken]
    assert others[0] is None and all(one is not None and one.losses == [0.4, 0.3] for one in others[1:])
    assert [one["rows"] for one in solution.evidence["candidates"]] == ["samples"] * 4 + ["mini-batches"] * 4


@pytest.mark.parametrize(
    ("before", "after", "lost", "best"),
    [
        ((5.0, 6.0, math.inf, 7.0), (0.9, 0.7, 0.1, 0.95), {0: False, 1: True, 3: True}, 1),
        ((5.0, 0.9, 6.0, 0.8), (0.7, 0.8, 0.75, 0.6), {0: False, 3: True}, 3),
        ((1.0, 6.0, 0.9, 0.99), (0.7, 0.8, 0.65, 0.3), {0: False, 2: True}, 2),
        ((0.99, 6.0, 0.9, 0.99), (0.7, 0.8, 0.65, 0.3), {0: False, 2: False}, 2),
    ],
)
def test_beside_a_best_that_had_lost_all_each_takes_a_few_steps(
    before: tuple[float, ...],
    after: tuple[float, ...],
    lost: dict[int, bool],
    best: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they start says nothing; however many steps the others took."""
    held_out, seen, taken = scripted(monkeypatch, before, after, (1, 90, 1, 1))
    problem = replace(problem_with(held_out), blank=lambda: torch.ones(3, dtype=torch.float64))
    solution = LR(swaps=0, floor=0).solve(problem, torch.Generator())
    assert {number: beside for number, _, beside in taken} == lost
    assert torch.equal(solution.weights, seen[best])


@pytest.mark.parametrize(("level", "walks"), [(0.45, 2), (0.35, 1)])
def test_a_level_below_that_of_the_best_at_its_end_is_never_refused(
    level: float, walks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample that the network is sure to get wrong makes a mean large, not a level: 0.4 here."""
    losses = iter([torch.full((3,), 0.5), torch.full((3,), 0.6), torch.tensor([0.1, 0.1, 9.0]), torch.full((3,), 0.6)])
    taken: list[Tensor] = []

    def steps(problem: object, regression: object, fit: SparseFit, *rest: object) -> Steps:
        taken.append(fit.weights)
        end = [level, 0.3][len(taken) - 1]
        return Steps(fit.weights[fit.support], [0.1], [0.5, 0.48], [0.5, end])

    monkeypatch.setattr(contest, "take_steps", steps)
    problem = replace(problem_with(lambda w, kept: next(losses)), blank=lambda: torch.ones(3))
    solution = LR(swaps=0, floor=0).solve(problem, torch.Generator())
    assert len(taken) == walks and torch.equal(solution.weights, taken[-1])


@pytest.mark.parametrize(
    ("removed", "keep", "blank", "compared"),
    [
        (0, 19, 1.0, True),
        (0, 20, 1.0, False),
        (1, 19, 1.0, False),  # half of 39
        (10, 14, 1.0, True),
        (10, 15, 1.0, False),
        (0, 20, 0.4, True),
    ],
)
def test_where_little_is_removed_candidates_are_compared_by_what_they_start_from(
    removed: int, keep: int, blank: float, compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best alone takes steps then, unless it has lost all; what an earlier stage removed is not there any more."""
    held_out, seen, taken = scripted(monkeypatch, (0.5, 0.6, 0.4, 0.45), (0.3, 0.0, 0.35, 0.1))
    problem = replace(problem_with(held_out), blank=lambda: torch.full((3,), blank, dtype=torch.float64))
    reference = problem.reference.clone()
    reference[:removed] = 0.0
    candidates = contest._Contest(LR(floor=0), replace(problem, reference=reference, keep=keep))
    candidates.compare_all()
    assert len(seen) == 4 and bool(taken) == compared
    if not compared:
        assert candidates.best.loss == pytest.approx(0.4) and candidates.best.steps is None
        candidates.finish()
        assert taken == [(2, (), False)] and candidates.best.steps is not None
        assert candidates.best.entry["loss_after_steps"] == 0.35


def test_where_no_steps_are_asked_for_none_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, _, taken = scripted(monkeypatch, (0.5, 0.6, 0.4, 0.45), (0.3, 0.0, 0.35, 0.1))
    contest.fit_pairing(LR(floor=0, first_order=0, swaps=0), replace(problem_with(held_out), keep=30))
    assert not taken


def test_the_network_without_weights_is_asked_for_where_steps_are_taken() -> None:
    def blank() -> Tensor:
        raise AssertionError("asked")

    asked = replace(problem_with(lambda w, kept: torch.ones(3)), blank=blank)
    for problem, method in ((asked, LR(first_order=0)), (replace(asked, slope=None), LR())):
        assert method.solve(problem, torch.Generator()).evidence["first_order"] == []
    with pytest.raises(AssertionError, match="asked"):
        LR().solve(asked, torch.Generator())


def test_no_sample_counts_for_more_than_without_any_weight() -> None:
    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        return torch.tensor([2.0, 3.0, 50.0, 60.0, 70.0])

    problem = replace(problem_with(held_out), blank=lambda: torch.full((5,), 2.5))
    evidence = LR(swaps=0, floor=0).solve(problem, torch.Generator()).evidence
    expected = pytest.approx((2 + 4 * 2.5) / 5)
    assert [one["loss_after_steps"] for one in evidence["candidates"]] == [expected] * 4


def test_a_candidate_of_infinite_loss_is_not_asked_for_its_slope() -> None:
    """There may be none: what gradients are taken of may be infinite too."""

    def slope(w: Tensor, kept: Tensor) -> Tensor:
        raise AssertionError("asked")

    problem = replace(problem_with(lambda w, kept: torch.full((3,), math.inf)), slope=slope)
    solution = LR(swaps=0, floor=0).solve(problem, torch.Generator())
    assert int(solution.kept.sum()) == problem.keep and solution.evidence["first_order"] == []


@pytest.mark.parametrize(("rows", "held"), [(12, False), (60, True)])
def test_the_beginning_of_a_path_is_held_where_rows_are_many_and_until_steps(
    rows: int, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the indices are larger than the Gram matrix."""
    found: list[bool] = []
    fit_all, judge = contest._Contest._fit_all, contest._Contest._judge

    def fitting(self: contest._Contest) -> list[Fitted]:
        fits = fit_all(self)
        found.append(self._beginning is not None)
        return fits

    def judging(self: contest._Contest, fitted: Fitted, start: float) -> None:
        assert self._beginning is None and self._last is None
        assert fitted.packed.refit is not None and fitted.packed.refit.system is None
        judge(self, fitted, start)

    monkeypatch.setattr(contest._Contest, "_fit_all", fitting)
    monkeypatch.setattr(contest._Contest, "_judge", judging)
    problem = problem_with(lambda w, kept: torch.ones(5), n=rows, p=2000, keep=100)
    LR(first_order=0, floor=0).solve(problem, torch.Generator())
    assert found == [held]


def test_steps_are_told_where_those_after_them_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """By mean losses, which their steps will lower; those before them count no more."""
    losses = iter([torch.full((3,), 0.8), torch.tensor([0.3, 0.3, 9.0]), torch.full((3,), 0.5), torch.full((3,), 0.7)])
    starts: list[float] = []

    def steps(problem: object, regression: object, fit: SparseFit, race: Race, *rest: object) -> Steps:
        starts.append(race.start)
        return Steps(fit.weights[fit.support], [0.1] * len(starts), [0.8, 0.75], [0.8, 0.75], behind=len(starts) < 3)

    monkeypatch.setattr(contest, "take_steps", steps)
    problem = replace(problem_with(lambda w, kept: next(losses)), blank=lambda: torch.ones(3))
    solution = LR(swaps=0, floor=0).solve(problem, torch.Generator())
    assert starts == pytest.approx([0.5, 0.7, 9.6 / 3, math.inf]) and solution.evidence["first_order"] == [0.1] * 3


def test_all_others_take_as_many_steps_as_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (0.5, 0.4, 0.41, 0.45), (0.3, None, 0.35, 0.1)
    for lengths, count in (((3, 2, 1, 9), 3), ((3, 2, 0, 9), 4), ((3, 3, 0, 9), 2), ((0, 0, 1, 9), 3)):
        held_out, seen, taken = scripted(monkeypatch, before, after, lengths)
        solution = LR(swaps=0, floor=0).solve(problem_with(held_out), torch.Generator())
        assert len(taken) == count and torch.equal(solution.weights, seen[3 if count == 4 else 0])


def test_steps_given_up_before_there_is_a_best_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, seen, taken = scripted(monkeypatch, (0.5, 0.4, 0.39, 0.4), (None, 0.2, 0.3, 0.1), (9, 1, 3, 1))
    solution = LR(swaps=0, floor=0).solve(problem_with(held_out), torch.Generator())
    assert [number for number, *_ in taken] == [0, 2] and torch.equal(solution.weights, seen[2])
    held_out, seen, taken = scripted(monkeypatch, (0.5, 0.375, 0.375, 0.375), (None, 0.3, 0.2, 0.1), (9, 3, 1, 1))
    solution = LR(swaps=0, floor=0).solve(problem_with(held_out), torch.Generator())
    assert [number for number, *_ in taken] == [0, 1, 2] and torch.equal(solution.weights, seen[2])


def test_what_starts_below_where_the_best_ends_is_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps others have taken: its own do not raise its loss."""
    held_out, seen, taken = scripted(monkeypatch, (0.5, 0.2, 0.25, 0.4), (0.3, None, 0.15, 0.1), (3, 90, 1, 1))
    solution = LR(swaps=0, floor=0).solve(problem_with(held_out), torch.Generator())
    assert [number for number, *_ in taken] == [0, 1, 2] and torch.equal(solution.weights, seen[2])


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_no_steps_are_given_up_for_a_fit_that_takes_none(lost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its level may be low, and its loss is infinite."""
    losses = iter([torch.full((3,), 0.8), torch.tensor([0.1, 0.1, lost]), *[torch.full((3,), 0.9)] * 2])
    starts: list[float] = []

    def steps(problem: object, regression: object, fit: SparseFit, race: Race, *rest: object) -> Steps:
        starts.append(race.start)
        return Steps(fit.weights[fit.support], [0.1], [0.8, 0.5], [0.8, 0.5])

    monkeypatch.setattr(contest, "take_steps", steps)
    problem = replace(problem_with(lambda w, kept: next(losses)), blank=lambda: torch.ones(3))
    assert LR(swaps=0, floor=0).solve(problem, torch.Generator()).evidence["first_order"] == [0.1]
    assert starts == pytest.approx([0.9])


@pytest.mark.parametrize(
    ("before", "walked", "best"),
    [
        ((0.9, 0.8, 0.85), [1], 1),
        ((0.9, 0.95, 0.8), [2], 2),
        ((1.9, 1.8, 1.85), [0, 1, 2], 2),
        ((1.0, 0.8, 0.7), [0, 2], 2),
        ((0.9, 1.8, 1.7), [0], 0),
    ],
)
def test_a_fit_with_a_floor_stands_for_its_metric_before_steps(
    before: tuple[float, ...], walked: list[int], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has lost all takes steps beside it: then where they start says nothing."""
    held_out, seen, taken = scripted(monkeypatch, before, (0.6, 0.5, 0.4))
    problem = replace(starving(held_out), blank=lambda: torch.ones(3, dtype=torch.float64))
    solution = LR(ridge=0.1, metric="diagonal", damping=1.0, swaps=0).solve(problem, torch.Generator())
    assert [number for number, *_ in taken] == walked and torch.equal(solution.weights, seen[best])
    assert len(seen) == 3


@pytest.mark.parametrize(("before", "floors"), [((2.0, 1.9, 1.8), [0.0, 0.5, 0.75]), ((0.9, 0.8, 0.7), [0.5, 0.75])])
def test_others_begin_without_a_floor_where_the_first_has_lost_all(
    before: tuple[float, ...], floors: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known yet whether one helps."""
    held_out, _seen, _taken = scripted(monkeypatch, before + (2.0,) * 6, (0.6,) * 9)
    problem = replace(starving(held_out), blank=lambda: torch.ones(3, dtype=torch.float64))
    solution = LR(metric="diagonal", damping=1.0, swaps=0).solve(problem, torch.Generator())
    assert [one["floor"] for one in solution.evidence["candidates"]] == [0.0, 0.5, 0.75] + 2 * floors


@pytest.mark.parametrize(("starved", "floor"), [(0.5, 0.0), (0.6, 0.5), (math.inf, 0.5), (math.nan, 0.5)])
def test_a_floor_stays_where_samples_are_lost_for_want_of_a_layer(starved: float, floor: float) -> None:
    def held_out(w: Tensor, kept: Tensor) -> Tensor:
        return torch.full((4,), 0.5 if int(kept[:200].sum()) >= 14 else starved)

    method = LR(ridge=0.1, metric="diagonal", damping=1.0, first_order=0, swaps=0)
    assert method.solve(starving(held_out), torch.Generator()).evidence["floor"] == floor


def test_a_floor_that_few_samples_speak_for_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are compared as they are: of levels, a gain that hardly is one would be beyond its error."""
    without = torch.tensor([0.5, 0.6] * 10 + [0.1, 9.0])
    raised = without - torch.tensor([0.02, 0.03] * 10 + [0.0, -0.3])
    gain = without - raised
    assert not is_significant(gain) and is_significant(without.clamp(max=2) - raised.clamp(max=2))
    losses = iter([without, raised, without])
    problem = replace(starving(lambda w, kept: next(losses)), blank=lambda: torch.full((22,), 2.0))
    monkeypatch.setattr(
        contest, "take_steps", lambda problem, regression, fit, *rest: Steps(fit.weights[fit.support], [], [0.7], [0.3])
    )
    method = LR(ridge=0.1, metric="diagonal", damping=1.0, swaps=0)
    assert method.solve(problem, torch.Generator()).evidence["floor"] == 0


@pytest.mark.parametrize(("swaps", "ridge", "expected"), [(10, 0.1, True), (0, 0.1, False), (10, 0.0, False)])
def test_hard_thresholding_is_left_out_where_swaps_follow(
    monkeypatch: pytest.MonkeyPatch, swaps: int, ridge: float, expected: bool
) -> None:
    asked, solve = [], contest.solve_sparse

    def watched(*arguments: object, **named: object) -> SparseFit:
        asked.append((named["swaps_follow"], named["max_iterations"]))
        return solve(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(contest, "solve_sparse", watched)
    settings = LR(ridge=ridge, metric="diagonal", damping=1.0, swaps=swaps, iterations=7, floor=0, first_order=0)
    contest.fit_pairing(settings, problem_with(None))
    assert asked == [(expected, 7)]


def test_swaps_are_not_looked_for_once_the_others_have_taken_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = list[int]()
    swap = contest.swap_weights

    def watched(*arguments: object) -> SparseFit:
        searched.append(1)
        return swap(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(contest, "swap_weights", watched)
    for others, found in ((2, 1), (3, 0)):
        searched.clear()
        before = (0.5, 0.4, 0.9, 0.9, 0.9)
        held_out, _seen, _taken = scripted(monkeypatch, before, (0.3, None, None, None, None), (3, others, 0, 0, 0))
        LR(swaps=1, floor=0).solve(problem_with(held_out), torch.Generator())
        assert len(searched) == found


def bowl(monkeypatch: pytest.MonkeyPatch) -> tuple[PruningProblem, list[Tensor], list[int]]:
    """A problem whose loss is the distance to weights a little off, and what is counted on it."""
    base = problem_with(None)
    goal, slopes, steps = base.reference + 0.5, list[Tensor](), list[int]()

    def slope(w: Tensor, kept: Tensor) -> Tensor:
        slopes.append(w.clone())
        return (w - goal) * kept

    def counted(*arguments: object) -> Steps:
        before = len(slopes)
        found = take_steps(*arguments)  # type: ignore[arg-type]
        steps.append(len(slopes) - before)
        return found

    monkeypatch.setattr(contest, "take_steps", counted)
    problem = replace(base, slope=slope, held_out=lambda w, kept: (w - goal).square().double())
    return problem, slopes, steps


@pytest.mark.parametrize("method", [LR(swaps=0, floor=0), EWR(swaps=0, floor=0, anchor=0.0)])
def test_the_steps_of_the_best_are_not_taken_again(method: LR | EWR, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, slopes, steps = bowl(monkeypatch)
    solution = method.solve(problem, torch.Generator())
    assert len(slopes) == sum(steps) > 0
    chosen = {key: solution.evidence[key] for key in ("ridge", "damping", "metric")}
    alone = LR(**chosen, swaps=0, floor=0).solve(problem, torch.Generator())
    assert torch.equal(solution.weights, alone.weights)
    assert solution.evidence["first_order"] == alone.evidence["first_order"] != []
    ends = [one["loss_after_steps"] for one in solution.evidence["candidates"] if "loss_after_steps" in one]
    assert problem.held_out is not None
    assert float(problem.held_out(solution.weights, solution.kept).mean()) == pytest.approx(min(ends))


def test_swaps_that_gain_within_their_error_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    for gains, judged in (([0.3, -0.1, 0.0], False), ([0.1, 0.1, 0.2], True)):
        walked: list[Tensor] = []
        losses = iter([torch.full((3,), 0.5), torch.full((3,), 0.5) - torch.tensor(gains)])

        def steps(problem: object, regression: object, fit: SparseFit, *rest: object, walked=walked) -> Steps:
            walked.append(fit.weights)
            end = 0.4 / len(walked)
            return Steps(fit.weights[fit.support], [0.1, 0.1], [0.5, end, end], [0.5, end, end])

        monkeypatch.setattr(contest, "take_steps", steps)
        method = LR(ridge=0.1, metric="diagonal", damping=1.0, floor=0, swaps=1)
        problem = problem_with(lambda w, kept, losses=losses: next(losses))
        assert (method.solve(problem, torch.Generator()).evidence["swaps"] > 0) == judged
        assert len(walked) == 1 + judged


def test_swaps_are_judged_after_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They gain at once, and lose where the steps end."""
    for end, taken in ((0.35, False), (None, False), (0.25, True)):
        before = (0.5, 0.9, 0.9, 0.9, 0.4)
        held_out, seen, walked = scripted(monkeypatch, before, (0.3, None, None, None, end))
        solution = LR(swaps=1, floor=0).solve(problem_with(held_out), torch.Generator())
        assert walked == [ALONE, (4, (0.5, 0.3), False)] and solution.evidence["candidates"][-1]["swaps"] > 0
        assert torch.equal(solution.weights, seen[4 if taken else 0])
        assert (solution.evidence["swaps"] > 0) == taken
