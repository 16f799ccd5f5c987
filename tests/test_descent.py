"""First-order steps, one at a time."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from swap_prune import EWR, LR
from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods.descent import Race, Steps, damping_of, step_down, take_steps
from swap_prune.methods.held_out import gains, is_significant, mean_loss
from swap_prune.methods.pairing import pairing_regression
from swap_prune.problem import PruningProblem
from swap_prune.regression.iht import solve_sparse
from swap_prune.regression.metric import diagonal_metric
from swap_prune.regression.natural_gradient import NaturalGradient
from tests.cases import generator, pruning_problem
from tests.samples.test_held_out import problem_with


def known_loss():
    """A problem whose loss knows its curvature: it is asked without any weight."""
    return replace(problem_with(None), blank=lambda: torch.full((1,), math.inf))


def start_of(problem):
    regression = pairing_regression(problem, 0.1, 1.0)
    return regression, solve_sparse(regression, problem.keep)


def stepped(problem, regression, fit, *rest):
    """Return a fit after its steps, and their lengths."""
    steps = step_down(problem, regression, fit, *rest)
    return steps.applied_to(fit), steps.lengths


def test_each_step_goes_down_the_slope_where_it_starts():
    asked = []
    base = known_loss()
    regression, fit = start_of(base)
    goal = fit.weights + 1.0

    def slope(w, kept):
        asked.append(w.clone())
        return w - goal

    problem = replace(base, slope=slope, held_out=lambda w, kept: (w - goal).square())
    _moved, lengths = stepped(problem, regression, fit, "auto")
    assert len(lengths) >= 3
    w = fit.weights
    first = NaturalGradient.on(regression, fit.support, 0.1, fit.refit)
    assert torch.equal(asked[0], w)
    second = w + lengths[0] * first.direction(w - goal)
    torch.testing.assert_close(asked[1], second)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(asked))


def test_a_second_metric_is_tried_where_the_first_has_ended():
    """Only moves along the other direction gain."""
    base = known_loss()
    regression, fit = start_of(base)
    damped = replace(regression, metric=diagonal_metric(regression.factor.diagonal(), 30.0))
    s = base.slope(fit.weights, None)
    direction = NaturalGradient.on(damped, fit.support, 0.1).direction(s)

    def held_out(w, kept):
        move = w - fit.weights
        along = float(move @ direction / (move.norm() * direction.norm()).clamp_min(1e-30))
        return torch.full((5,), 1e6 - (along > 1 - 1e-5) * 5e5)

    moved, lengths = stepped(replace(base, held_out=held_out), regression, fit, "auto")
    assert lengths == [0.3]
    torch.testing.assert_close(moved.weights, fit.weights + 0.3 * direction)


@pytest.mark.parametrize(("left", "steps"), [(0.99, 12), (0.9999, 1)])
def test_steps_end_after_twelve_in_each_metric_or_where_one_gains_next_to_nothing(left, steps):
    """Each trial leaves so much of the loss."""
    base = known_loss()
    regression, fit = start_of(base)
    trials = itertools.count(1)

    def held_out(w, kept):
        return torch.full((5,), 1e6 * left ** next(trials), dtype=torch.float64)

    problem = replace(base, held_out=held_out, slope=lambda w, kept: 1e-20 * base.slope(w, kept))
    _, lengths = stepped(problem, regression, fit, "auto")
    assert len(lengths) == 2 * steps


@pytest.mark.parametrize("most", [1, 5])
def test_no_more_steps_are_taken_in_a_metric_than_are_asked_for(most):
    base = known_loss()
    regression, fit = start_of(base)
    trials = itertools.count(1)
    problem = replace(
        base,
        held_out=lambda w, kept: torch.full((5,), 1e6 * 0.99 ** next(trials), dtype=torch.float64),
        slope=lambda w, kept: 1e-20 * base.slope(w, kept),
    )
    assert len(stepped(problem, regression, fit, "auto", most)[1]) == 2 * most


@pytest.mark.parametrize("method", [LR, EWR])
@pytest.mark.parametrize("removed", ["half", "most"])
def test_a_method_takes_as_many_as_it_is_told(method, removed):
    """In stages that compare candidates as they start, and in those that compare them after their steps."""
    base = known_loss()
    goal = base.reference + 1.0
    problem = replace(
        base,
        keep=int(base.reference.count_nonzero()) // (2 if removed == "half" else 5),
        slope=lambda w, kept: w - goal,
        held_out=lambda w, kept: (w - goal).square(),
        blank=lambda: torch.full((len(goal),), math.inf),
    )
    taken = {n: method(steps=n).solve(problem, generator()).evidence["first_order"] for n in (1, 3, 12)}
    assert len(taken[1]) <= 2 < len(taken[12]) and len(taken[3]) <= 6
    assert method().solve(problem, generator()).evidence["first_order"] == taken[12]
    for wrong in (0, 1.5, "auto", True):
        with pytest.raises(ValueError, match="steps must be"):
            method(steps=wrong)


@pytest.mark.parametrize("turned", [0, 1, 2, 3])
def test_a_slope_that_leads_nowhere_is_taken_again_as_noise_may_have_turned_it(turned):
    base = known_loss()
    regression, fit = start_of(base)
    goal, asked = fit.weights + 1.0, itertools.count()

    def slope(w, kept):
        number = next(asked)
        return (goal - w) * (1 + number) if number < turned else w - goal

    problem = replace(base, slope=slope, held_out=lambda w, kept: (w - goal).square())
    moved, lengths = stepped(problem, regression, fit, "auto")
    gained = float((moved.weights - goal).square().mean()) < float((fit.weights - goal).square().mean())
    assert gained == (len(lengths) > 0) == (turned <= 2), "once in each metric"


def test_a_slope_that_is_the_same_again_has_no_noise():
    base = known_loss()
    regression, fit = start_of(base)
    goal, asked = fit.weights + 1.0, []

    def slope(w, kept):
        asked.append(w.clone())
        return goal - w

    problem = replace(base, slope=slope, held_out=lambda w, kept: (w - goal).square())
    moved, lengths = stepped(problem, regression, fit, "auto")
    assert lengths == [] and torch.equal(moved.weights, fit.weights)
    assert len(asked) == 2, "once more, and not in the second metric"


def test_steps_go_on_with_the_slope_of_larger_batches_where_the_first_leads_no_further():
    base = known_loss()
    regression, fit = start_of(base)
    goal = fit.weights + 1.0
    astray = replace(base, slope=lambda w, kept: goal - w, held_out=lambda w, kept: (w - goal).square())
    moved, lengths = stepped(astray, regression, fit, "auto")
    assert lengths == [] and torch.equal(moved.weights, fit.weights)
    moved, lengths = stepped(replace(astray, whole_slope=lambda w, kept: w - goal), regression, fit, "auto")
    assert len(lengths) > 1
    assert float((moved.weights - goal).square().mean()) < float((fit.weights - goal).square().mean())


def test_steps_of_larger_batches_that_one_sample_alone_gains_by_are_left():
    """Where one of n gains g, the mean gain is g / n, and so is its standard error."""
    base = known_loss()
    regression, fit = start_of(base)
    goal = fit.weights + 1.0

    def losses(w, kept):
        return torch.cat([(w - goal).square().mean().view(1), torch.zeros(9)])

    problem = replace(base, slope=lambda w, kept: goal - w, held_out=losses, blank=lambda: torch.full((10,), math.inf))
    own, lengths = stepped(replace(problem, slope=lambda w, kept: w - goal), regression, fit, "auto")
    assert lengths and not torch.equal(own.weights, fit.weights), "steps of their own need no such gain"
    moved, lengths = stepped(replace(problem, whole_slope=lambda w, kept: w - goal), regression, fit, "auto")
    assert lengths == [] and torch.equal(moved.weights, fit.weights)


def test_a_length_is_divided_until_it_gains():
    """0.3 / 27 is the third that is tried."""
    base = known_loss()
    regression, fit = start_of(base)
    d = NaturalGradient.on(regression, fit.support, 0.1, fit.refit).direction(base.slope(fit.weights, None))
    goal = fit.weights + 0.3 / 27 * d
    problem = replace(base, held_out=lambda w, kept: 1e6 * (w - goal).square())
    _, lengths = stepped(problem, regression, fit, "auto")
    assert lengths[0] == pytest.approx(0.3 / 27)


def test_a_length_grows_only_as_long_as_it_gains_on_the_last():
    """Three times as far is better than nothing, and worse than once."""
    base = known_loss()
    regression, fit = start_of(base)
    d = NaturalGradient.on(regression, fit.support, 0.1, fit.refit).direction(base.slope(fit.weights, None))
    goal = fit.weights + 0.5 * d
    problem = replace(base, held_out=lambda w, kept: 1e6 * (w - goal).square())
    _, lengths = stepped(problem, regression, fit, "auto")
    assert lengths[0] == pytest.approx(0.3)


def test_of_a_plain_function_the_first_length_is_that_of_the_whole_way_to_its_floor():
    """Twenty samples at 1,000 and one at 990: a linear model is at 990 after the mean's height over the slope."""
    base = problem_with(None)
    regression, fit = start_of(base)
    d = NaturalGradient.on(regression, fit.support, 0.1, fit.refit).direction(base.slope(fit.weights, None))
    losses = torch.full((21,), 1000.0, dtype=torch.float64).index_fill(0, torch.tensor([0]), 990.0)
    first = (float(losses.mean()) - 990) / -float(base.slope(fit.weights, None) @ d)
    asked = []

    def held_out(w, kept):
        asked.append(float((w - fit.weights) @ d / (d @ d)))
        return losses + len(asked)

    _, lengths = stepped(replace(base, held_out=held_out), regression, fit, "auto")
    assert lengths == [] and asked[0] == 0, "and then at the weights before the stage"
    assert asked[2:9] == pytest.approx([first / 3**i for i in range(7)], rel=1e-4)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("before", [0.5, 2.0])
@pytest.mark.parametrize("gain", [[0.1, 0.1, 0.1, 0.1], [0.5, -0.2, 0.0, 0.0], [0.5, 0.1, 0.0, 0.0]])
def test_of_a_plain_function_steps_below_the_loss_before_the_stage_need_a_significant_gain(gain, before, known):
    """The network comes to 1; it was at 0.5, or 2, before."""
    base = known_loss() if known else problem_with(None)
    regression, fit = start_of(base)

    def held_out(w, kept):
        if torch.equal(w, base.reference):
            return torch.full((4,), before)
        return torch.ones(4) if torch.equal(w, fit.weights) else 1 - torch.tensor(gain)

    _, lengths = stepped(replace(base, held_out=held_out), regression, fit, "auto")
    allowed = known or before == 0.5 or gain[0] == 0.1
    assert bool(lengths) == allowed


def test_a_gain_must_exceed_its_standard_error():
    assert not is_significant(torch.tensor([4.0, -1.0, -1.0, -1.0]))
    assert is_significant(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    spread = torch.tensor([3.0, 0.0, 0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 3.0])  # std above the mean, its error below
    assert float(spread.std()) > float(spread.mean()) and is_significant(spread)
    assert not is_significant(torch.tensor([1.0])) and not is_significant(torch.tensor([2.0, 1.0, 1.0, 0.0]), 3.0)


def test_a_sample_whose_loss_is_infinite_no_longer_is_a_gain():
    before, after = torch.tensor([1.0, math.inf, 1.0]), torch.tensor([1.0, 3.0, 1.1])
    assert is_significant(gains(before, after)) and not is_significant(gains(after, before))
    assert not is_significant(gains(before, before)), "nothing is known"


def test_a_sample_that_is_lost_before_and_after_says_nothing_and_one_that_is_no_number_is_lost():
    before, after = torch.tensor([1.0, math.inf, 2.0, 1.0]), torch.tensor([0.5, math.inf, 1.0, 0.8])
    assert torch.allclose(gains(before, after), torch.tensor([0.5, 0.0, 1.0, 0.2], dtype=torch.float64))
    assert is_significant(gains(before, after))
    unknown = torch.tensor([1.0, math.nan, 2.0, 1.0])
    assert is_significant(gains(unknown, torch.ones(4))) and not is_significant(gains(torch.ones(4), unknown))
    assert gains(unknown, unknown).tolist() == [0.0] * 4


def test_steps_do_not_depend_on_the_unit_of_the_gradients():
    G, w = torch.randn(20, 60, generator=generator(1)), torch.randn(60, generator=generator(2))
    for metric in ("identity", "diagonal"):
        steps = []
        for scale in (1.0, 1e-4):
            problem = PruningProblem(w, 40, DenseFactor(G * scale))
            regression = pairing_regression(problem, 0.1, 1.0, metric)
            model = NaturalGradient.on(regression, torch.arange(40), damping_of(regression))
            steps.append(scale * model.direction(G.mean(0) * scale))
        assert torch.allclose(steps[0], steps[1], rtol=1e-3, atol=1e-5), metric


def test_means_of_losses_in_16_bits_are_told_apart():
    losses = torch.linspace(0.5, 0.75, 400).bfloat16()
    one = losses.clone()
    one[0] += 2.0**-6
    assert float(losses.mean()) == float(one.mean()), "in 16 bits"
    assert mean_loss(one) - mean_loss(losses) == pytest.approx(2.0**-6 / 400)
    assert float(gains(one, losses).mean()) == pytest.approx(2.0**-6 / 400)


def test_a_loss_that_is_not_a_number_is_infinite():
    assert mean_loss(torch.tensor([1.0, math.nan])) == math.inf


def test_steps_are_given_up_a_twentieth_behind_a_rival():
    """Compared after as many steps, or with the rival's end."""
    base = known_loss()
    regression, fit = start_of(base)
    goal = fit.weights + 1.0
    slopes = []

    def slope(w, kept):
        slopes.append(w)
        return w - goal

    problem = replace(base, slope=slope, held_out=lambda w, kept: (w - goal).square())
    alone = take_steps(problem, regression, fit)
    assert len(alone.lengths) >= 4 and len(alone.losses) == len(alone.lengths) + 1
    assert alone.losses == sorted(alone.losses, reverse=True)
    moved = alone.applied_to(fit).weights
    assert float((moved - goal).square().mean()) == pytest.approx(alone.losses[-1])
    assert torch.equal(moved != 0, fit.weights != 0)
    near = take_steps(problem, regression, fit, Race(alone._replace(losses=[0.96 * loss for loss in alone.losses])))
    assert not near.behind and not alone.behind
    assert torch.equal(near.values, alone.values) and near.lengths == alone.lengths
    for losses, lost, count in (
        ([*alone.losses[:2], 0.95 * alone.losses[2], *alone.losses[3:]], False, 2),
        ([*alone.losses[:2], 0.9 * alone.losses[-1]], False, 2),
        ([0.0] * 9, True, 3),
    ):
        slopes.clear()
        race = Race(alone._replace(losses=losses, levels=losses), lost)
        steps = take_steps(problem, regression, fit, race)
        assert steps.behind and len(slopes) == len(steps.lengths) == count


@pytest.mark.parametrize(("share", "given_up"), [(0.96, False), (0.94, True)])
def test_steps_that_do_not_come_below_where_others_start_are_given_up_after_three(share, given_up):
    base = known_loss()
    regression, fit = start_of(base)
    goal = fit.weights + 1.0
    problem = replace(base, slope=lambda w, kept: w - goal, held_out=lambda w, kept: (w - goal).square())
    alone = take_steps(problem, regression, fit)
    steps = take_steps(problem, regression, fit, Race(start=share * alone.levels[3]))
    assert steps.behind == given_up and len(alone.lengths) > 3
    assert len(steps.lengths) == (3 if given_up else len(alone.lengths))


@pytest.mark.parametrize(
    ("race", "losses", "levels", "left"),
    [
        (Race(start=1.0), [9.0] * 5, [9.0, 9.0, 9.0, 1.04, 1.0], False),
        (Race(start=1.0), [9.0] * 5, [9.0, 9.0, 9.0, 1.04, 1.06], True),
        (Race(start=1.0), [0.5] * 3, [9.0] * 3, False),
        (Race(start=-1.0), [0.0] * 4, [0.0, 0.0, 0.0, -0.96], False),
        (Race(start=-1.0), [0.0] * 4, [0.0, 0.0, 0.0, -0.94], True),
    ],
)
def test_levels_have_to_come_near_where_others_start(race, losses, levels, left):
    """After three steps, and from then on; losses may be negative."""
    assert race.is_left(losses, levels) == left


@pytest.mark.parametrize(
    ("levels", "left"),
    [
        ([9.0, 8.0, 7.0, 6.0], False),
        ([9.0, 8.0, 7.0, 6.0, 1.1], False),
        ([9.0, 8.0, 7.0, 6.0, 1.2], False),
        ([9.0, 8.0, 7.0, 6.0, 1.21], True),
        ([9.0, 8.0, 7.0, 6.0, 1.1, 1.0], False),
        ([9.0, 8.0, 7.0, 6.0, 1.1, 1.01], True),
        ([9.0, 8.0, 7.0, 6.0, 1.1, 1.0, 1.0], False),  # the others have ended
        ([9.0, 8.0, 7.0, 6.0, 1.1, 1.0, 1.01], True),
    ],
)
def test_steps_on_other_rows_are_told_apart_after_four(levels: list[float], left: bool) -> None:
    """By levels, and without a margin."""
    other = Steps(torch.zeros(1), [0.1] * 5, [0.0] * 6, [2.0, 1.8, 1.6, 1.4, 1.2, 1.0])
    assert Race(other=other).is_left([9.0] * len(levels), levels) == left


def test_fits_that_have_lost_all_are_compared_by_the_samples_that_are_not_lost():
    """One sample is hopeless, and of this one more than of the rival."""
    base = known_loss()
    regression, fit = start_of(base)
    goal = fit.weights + 1.0

    def held_out(hopeless):
        return lambda w, kept: torch.cat([(w - goal).square(), torch.tensor([hopeless])])

    blank = torch.full((len(goal) + 1,), 2.0)
    one, other = (replace(base, slope=lambda w, kept: w - goal, held_out=held_out(h)) for h in (50.0, 500.0))
    rival = take_steps(one, regression, fit, blank=blank)
    assert rival.levels[-1] == pytest.approx(float(held_out(2.0)(rival.applied_to(fit).weights, None).mean()))
    assert rival.losses[-1] > rival.levels[-1]
    assert take_steps(other, regression, fit, Race(rival), blank=blank).behind
    steps = take_steps(other, regression, fit, Race(rival, lost=True), blank=blank)
    assert not steps.behind and steps.levels[-1] == pytest.approx(rival.levels[-1], rel=0.05)


def test_without_confidence_a_coupling_is_left(monkeypatch):
    """A large mean gain that rests on one sample."""
    from swap_prune.regression.tuning import Coupling
    from tests.samples.test_held_out import fit_of, no_steps

    monkeypatch.setattr("swap_prune.methods.ewr.step_down", no_steps)
    problem = known_loss()
    paired, other = (EWR(epsilon=0.1, anchor=a, swaps=0).solve(problem, torch.Generator()) for a in (0.0, 1.0))

    def held_out(w, kept):
        losses = torch.ones(5, dtype=torch.float64)
        if torch.equal(w, other.weights):
            losses -= torch.tensor([0.9, -0.2, -0.2, -0.2, -0.2])
        return losses

    monkeypatch.setattr(EWR, "_coupling", lambda *_: (Coupling(1.0, 0.1), {}))
    monkeypatch.setattr(EWR, "_coupled", lambda *_: (fit_of(other), True))
    method = EWR(anchor=1.0, swaps=0, ridge=0.025, damping=1.0, metric="diagonal")
    solution = method.solve(replace(problem, held_out=held_out), torch.Generator())
    assert torch.equal(solution.weights, paired.weights)


def test_steps_are_damped_where_all_gradients_are_zero():
    problem = replace(pruning_problem(5, 8, 2), factor=DenseFactor(torch.zeros(5, 8)))
    regression = pairing_regression(problem, 0.1, 1.0, "identity")
    assert damping_of(regression) > 0
    direction = NaturalGradient.on(regression, torch.arange(8), damping_of(regression)).direction(torch.ones(8))
    assert bool(direction.isfinite().all()) and bool(direction.any())
