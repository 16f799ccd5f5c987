"""Entropic transport: the plan against POT, its limits, and what no eps may break."""

import math
from itertools import pairwise

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swap_prune import transport
from swap_prune.transport import barycentric_target, relaxed_target, sorted_potential, squared_cost, transport_plan
from tests.cases import generator, normal, paired_clouds
from tests.reference import reference_measure, sinkhorn

ANCHORS = (0.0, 0.1, 1.0)


def mean_cost(x, y):
    return float(((x[:, None] - y[None, :]) ** 2).mean())


def assert_coupling(plan, tolerance=1e-9):
    n = len(plan)
    assert plan.dtype == torch.float64 and plan.shape == (n, n)
    assert bool(torch.isfinite(plan).all()) and float(plan.min()) >= 0
    assert float((plan.sum(0) * n - 1).abs().max()) <= tolerance
    assert float((plan.sum(1) * n - 1).abs().max()) <= tolerance


def pot_plan(x, y, epsilon, anchor):
    """POT's plan and the error of its marginals; the anchored problem has cost ``C - eps log R``."""
    n = len(x)
    cost = (x[:, None] - y[None, :]) ** 2 - epsilon * (n**2 * reference_measure(n, anchor)).log()
    mass = torch.full((n,), 1 / n, dtype=torch.float64)
    plan, log = ot.bregman.sinkhorn_log(
        mass, mass, cost, reg=epsilon, numItermax=20_000, stopThr=1e-13, log=True, warn=False
    )
    return plan, float(log["err"][-1])


@pytest.mark.parametrize("anchor", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("relative", [pytest.param(0.02, marks=pytest.mark.long), 0.1, 1.0, 30.0])
def test_plan_is_that_of_pot(relative, anchor):
    x, y = paired_clouds(16, seed=1, noise=0.5)
    epsilon = relative * mean_cost(x, y)
    expected, error = pot_plan(x, y, epsilon, anchor)
    assert error < 1e-9, "POT did not converge: it says nothing about the plan"
    result = transport_plan(x, y, epsilon, anchor=anchor)
    assert result.converged and result.residual <= 1e-9
    torch.testing.assert_close(result.plan, expected, rtol=0, atol=1e-6 / len(x))


@pytest.mark.parametrize("anchor", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("relative", "softness"), [(0.1, 0.1), (0.1, 3.0), (1.0, 0.5)])
def test_an_unbalanced_plan_is_that_of_pot(relative, softness, anchor):
    x, y = paired_clouds(16, seed=1, noise=0.5)
    cost, epsilon, relaxation = squared_cost(x, y), relative * mean_cost(x, y), softness * mean_cost(x, y)
    reference, mass = reference_measure(16, anchor), torch.full((16,), 1 / 16, dtype=torch.float64)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        mass,
        mass,
        cost,
        epsilon,
        relaxation,
        c=reference,
        reg_type="kl",
        numItermax=20_000,
        stopThr=1e-14,
    )
    result = transport_plan(x, y, epsilon, anchor=anchor, relaxation=relaxation)
    assert result.converged and result.residual <= 1e-9
    torch.testing.assert_close(result.plan, expected, rtol=1e-6, atol=1e-9)
    assert float(result.plan.sum()) < 1


def test_without_an_anchor_what_is_left_of_a_pair_is_in_closed_form():
    x, y = paired_clouds(9, seed=2, noise=0.5)
    plan = transport_plan(x, y, 0.3, anchor=0.0, relaxation=0.2).plan
    torch.testing.assert_close(plan, torch.diag((-((x - y) ** 2) / 0.7).exp() / 9))
    nearly = transport_plan(x, y, 0.3, anchor=1e-9, relaxation=0.2).plan
    torch.testing.assert_close(nearly, plan, rtol=0, atol=1e-7)


@pytest.mark.parametrize("relaxation", [0.0, -1.0, math.nan])
def test_a_relaxation_that_is_not_positive(relaxation):
    with pytest.raises(ValueError, match="relaxation must be positive"):
        transport_plan(torch.arange(4.0), torch.arange(4.0), 1.0, relaxation=relaxation)


@pytest.mark.parametrize("anchor", [0.0, 0.3, 1.0])
def test_a_point_far_from_all_others_loses_its_mass(anchor):
    x, y = paired_clouds(20, seed=3, noise=0.1)
    x[4] += 30.0
    target, mass = relaxed_target(transport_plan(x, y, 0.1, anchor=anchor, relaxation=1.0).plan, y)
    assert float(mass[4]) < 1e-6 and float(mass[torch.arange(20) != 4].min()) > 0.5
    assert bool(target.isfinite().all())
    x[4] += 1e6
    target, mass = relaxed_target(transport_plan(x, y, 0.1, anchor=anchor, relaxation=1.0).plan, y)
    assert float(mass[4]) == 0 and float(target[4]) == float(y[4])


def test_much_relaxed_it_is_balanced_and_a_search_cut_short_is_reported():
    x, y = paired_clouds(20, seed=3, noise=0.5)
    balanced = transport_plan(x, y, 0.5, anchor=0.5).plan
    nearly = transport_plan(x, y, 0.5, anchor=0.5, relaxation=50.0)
    assert nearly.converged
    torch.testing.assert_close(nearly.plan, balanced, rtol=0, atol=2e-2 / 20)
    target, mass = relaxed_target(balanced, y)
    torch.testing.assert_close(target, barycentric_target(balanced, y))
    torch.testing.assert_close(mass, torch.ones_like(mass))
    assert not transport_plan(x, y, 0.5, anchor=0.5, relaxation=500.0, max_iterations=1).converged


@pytest.mark.parametrize("anchor", [0.01, 0.3, 1.0])
def test_plan_is_that_of_plain_sinkhorn(anchor):
    x, y = normal(9, seed=3), normal(9, seed=4)
    epsilon = 0.2 * mean_cost(x, y)
    expected = sinkhorn((x[:, None] - y[None, :]) ** 2, reference_measure(9, anchor), epsilon)
    torch.testing.assert_close(transport_plan(x, y, epsilon, anchor=anchor).plan, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("exponent", range(-8, 9, 2))
def test_marginals_whatever_the_epsilon(exponent, anchor):
    x, y = paired_clouds(24, seed=2)
    epsilon = 10.0**exponent * mean_cost(x, y)
    result = transport_plan(x, y, epsilon, anchor=anchor)
    assert result.epsilon == epsilon
    assert_coupling(result.plan)


@pytest.mark.parametrize("anchor", [0.1, 1.0])
@pytest.mark.parametrize("relative", [0.01, 0.1, 1.0, 100.0])
def test_convergence_at_the_size_of_a_stage(relative, anchor):
    x, y = paired_clouds(200, seed=5)
    result = transport_plan(x, y, relative * mean_cost(x, y), anchor=anchor)
    assert result.converged and result.residual <= 1e-9
    assert_coupling(result.plan)


@pytest.mark.parametrize("anchor", [0.1, 1.0])
@pytest.mark.parametrize("relative", [1.0, 100.0])
def test_conjugate_gradients_do_at_the_size_of_a_stage(relative, anchor, monkeypatch):
    monkeypatch.setattr(transport, "_direct", lambda *_: pytest.fail("a direct solution"))
    x, y = paired_clouds(500, seed=5)
    result = transport_plan(x, y, relative * mean_cost(x, y), anchor=anchor)
    assert result.converged and result.iterations <= 8, "near the solution each step squares the error"


def test_directions_solve_newtons_system():
    x, y = paired_clouds(60)
    plan, _ = transport._row_normalised(squared_cost(x, y), torch.zeros(60, 60, dtype=torch.float64), 0.5, x)
    columns = plan.sum(0)
    expected = torch.linalg.pinv(torch.diag(columns) - 60 * plan.T @ plan) @ (1 / 60 - columns)
    for found in (
        transport._newton_direction(plan, columns, 2.0, 1e-12) / 2,
        transport._direct(plan, columns, 1 / 60 - columns),
    ):
        torch.testing.assert_close(found - found.mean(), expected - expected.mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("anchor", [0.3, 1.0])
@pytest.mark.parametrize("relative", [1e-3, 0.1, 1.0])
def test_conjugate_gradients_and_a_direct_solution_lead_to_one_plan(relative, anchor, monkeypatch):
    x, y = paired_clouds(400)
    epsilon = relative * mean_cost(x, y)
    called = []
    direct = transport._direct
    monkeypatch.setattr(transport, "_direct", lambda *system: called.append(1) or direct(*system))
    plan = transport_plan(x, y, epsilon, anchor=anchor)
    few = len(called)
    monkeypatch.setattr(transport, "_CONJUGATE", 0)
    other = transport_plan(x, y, epsilon, anchor=anchor)
    assert plan.converged and other.converged
    torch.testing.assert_close(plan.plan, other.plan, rtol=0, atol=1e-8 / 400)
    if relative >= 0.1:  # else the plan is nearly a permutation
        assert few < len(called) - few, "most directions need none"
    if relative == 1.0:
        assert few == 0


def clouds_of_every_kind(n=60):
    ties = torch.randint(4, (2, n), generator=generator(11)).double()
    zeros = normal(2, n, seed=12) * (torch.arange(n) % 5 > 2)
    heavy = normal(2, n, seed=13).exp().mul(2).exp()
    return {"apart": normal(2, n, seed=14), "paired": torch.stack(paired_clouds(n)), "ties": ties, "zeros": zeros} | {
        "heavy": heavy,
        "shifted": normal(2, n, seed=15) + 1e6,
        "one": torch.zeros(2, n, dtype=torch.float64).index_fill(1, torch.tensor([3]), 1.0),
        "same": normal(1, n, seed=16).expand(2, n),
    }


@pytest.mark.parametrize("kind", clouds_of_every_kind())
def test_the_potential_that_steps_begin_at_is_optimal_without_entropy(kind):
    """Strong duality of the transport problem: the dual's value is the cost of the sorted matching."""
    x, y = clouds_of_every_kind()[kind]
    potential, cost = sorted_potential(x, y), squared_cost(x, y)
    value = (cost - potential).min(1).values.mean() + potential.mean()
    sorted_cost = (x.sort().values - y.sort().values).square().mean()
    assert float(value) == pytest.approx(float(sorted_cost), rel=1e-9, abs=1e-12 * float(cost.max()))


@pytest.mark.parametrize("anchor", [1e-4, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("kind", clouds_of_every_kind())
def test_any_epsilon_is_solved_in_few_steps(kind, anchor):
    x, y = clouds_of_every_kind()[kind]
    cost = squared_cost(x, y)
    sorted_cost = float((x.sort().values - y.sort().values).square().mean())
    for relative in (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 100.0):
        result = transport_plan(x, y, relative * float(cost.mean()), anchor=anchor, tolerance=1e-5)
        assert result.converged and result.iterations <= 40, (relative, result.residual)
    least = float((transport_plan(x, y, 1e-8 * float(cost.mean()), anchor=anchor).plan * cost).sum())
    assert least == pytest.approx(sorted_cost, rel=1e-3, abs=1e-4 * float(cost.mean()))


@pytest.mark.parametrize("anchor", [0.1, 1.0])
def test_small_epsilon_matches_sorted_to_sorted(anchor):
    x, y = normal(15, seed=6), normal(15, seed=7)
    plan = transport_plan(x, y, 1e-8 * mean_cost(x, y), anchor=anchor).plan
    expected = torch.zeros_like(plan)
    expected[x.argsort(), y.argsort()] = 1 / 15
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(barycentric_target(plan, y)[x.argsort()], y.sort().values)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_large_epsilon_gives_the_reference_measure(anchor):
    x, y = normal(11, seed=8), normal(11, seed=9)
    plan = transport_plan(x, y, 1e9 * mean_cost(x, y), anchor=anchor).plan
    torch.testing.assert_close(plan, reference_measure(11, anchor), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("relative", [1e-6, 1.0, 1e6])
def test_without_freedom_the_plan_is_the_pairing(relative):
    x, y = normal(7, seed=10), normal(7, seed=11)
    result = transport_plan(x, y, relative * mean_cost(x, y), anchor=0)
    assert torch.equal(result.plan, torch.eye(7, dtype=torch.float64) / 7)
    assert result.converged


def test_the_plan_moves_off_the_pairing_as_the_anchor_is_lifted():
    x, y = normal(12, seed=12), normal(12, seed=13)
    epsilon = mean_cost(x, y)
    paired = [
        float(transport_plan(x, y, epsilon, anchor=a).plan.diagonal().sum()) for a in (0.0, 1e-9, 0.01, 0.1, 0.5, 1.0)
    ]
    assert paired[0] == pytest.approx(paired[1], abs=1e-6) == pytest.approx(1, abs=1e-6)
    assert all(a > b for a, b in pairwise(paired[1:]))


@pytest.mark.parametrize("anchor", [0.1, 1.0])
@pytest.mark.parametrize(("shift_x", "shift_y"), [(50.0, 50.0), (-300.0, 7.0)])
def test_translation_of_either_cloud_leaves_the_plan(anchor, shift_x, shift_y):
    x, y = paired_clouds(13, seed=14)  # moving x by c adds a function of i and one of j to the cost
    epsilon = 0.3 * mean_cost(x, y)
    plan = transport_plan(x, y, epsilon, anchor=anchor).plan
    moved = transport_plan(x + shift_x, y + shift_y, epsilon, anchor=anchor).plan
    torch.testing.assert_close(moved, plan, rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-120, 1e-6, -1.0, 1e6, 1e120])
def test_scaling_both_clouds_scales_epsilon_by_the_square(factor):
    x, y = paired_clouds(13, seed=15)
    epsilon = 0.3 * mean_cost(x, y)
    plan = transport_plan(x, y, epsilon, anchor=0.4).plan
    scaled = transport_plan(factor * x, factor * y, factor**2 * epsilon, anchor=0.4)
    assert scaled.converged
    torch.testing.assert_close(scaled.plan, plan, rtol=0, atol=1e-9)


def test_permutation_of_one_cloud_permutes_the_unanchored_plan():
    x, y = paired_clouds(13, seed=16)
    epsilon = 0.1 * mean_cost(x, y)
    rows, columns = torch.randperm(13, generator=torch.Generator().manual_seed(1)), torch.arange(12, -1, -1)
    plan = transport_plan(x, y, epsilon).plan
    permuted = transport_plan(x[rows], y[columns], epsilon).plan
    torch.testing.assert_close(permuted, plan[rows][:, columns], rtol=0, atol=1e-9)


def test_permutation_of_the_pairs_permutes_the_anchored_plan():
    x, y = paired_clouds(13, seed=17)
    epsilon = 0.1 * mean_cost(x, y)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    plan = transport_plan(x, y, epsilon, anchor=0.2).plan
    permuted = transport_plan(x[order], y[order], epsilon, anchor=0.2).plan
    torch.testing.assert_close(permuted, plan[order][:, order], rtol=0, atol=1e-9)


def test_exchange_of_the_clouds_transposes_the_plan():
    x, y = paired_clouds(13, seed=18)
    epsilon = 0.2 * mean_cost(x, y)
    there = transport_plan(x, y, epsilon, anchor=0.7).plan
    back = transport_plan(y, x, epsilon, anchor=0.7).plan
    torch.testing.assert_close(back, there.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_one_point(anchor):
    result = transport_plan(torch.tensor([3.0]), torch.tensor([-1.0]), 0.1, anchor=anchor)
    assert result.plan.tolist() == [[1.0]] and result.converged


def test_ties_get_equal_rows_and_columns():
    x = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    y = torch.tensor([0.0, 0.0, 1.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    for relative in (1e-6, 1e-2, 1.0):
        plan = transport_plan(x, y, relative * mean_cost(x, y)).plan
        assert_coupling(plan)
        torch.testing.assert_close(plan[1], plan[2], rtol=0, atol=1e-9)
        torch.testing.assert_close(plan[3], plan[5], rtol=0, atol=1e-9)
        torch.testing.assert_close(plan[:, 4], plan[:, 5], rtol=0, atol=1e-9)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("apart", [0.0, 5.0])
@pytest.mark.parametrize("epsilon", [1e-9, 1.0, 1e9])
def test_constant_clouds_leave_the_reference_measure(anchor, apart, epsilon):
    x, y = torch.zeros(6, dtype=torch.float64), torch.full((6,), apart, dtype=torch.float64)
    plan = transport_plan(x, y, epsilon, anchor=anchor).plan
    rounding = 1e-9 + 1e-15 * apart**2 / epsilon  # of the cost, seen through eps
    torch.testing.assert_close(plan, reference_measure(6, anchor), rtol=0, atol=rounding)


@pytest.mark.parametrize("anchor", [0.1, 1.0])
@pytest.mark.parametrize("relative", [1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outliers(anchor, relative, dtype):
    x, y = (cloud.to(dtype) for cloud in paired_clouds(20, seed=19))
    x[3], y[3], y[11] = 1e6, 2e6, -1e5
    plan = transport_plan(x, y, relative * mean_cost(x.double(), y.double()), anchor=anchor).plan
    assert_coupling(plan)


def test_an_outlier_does_not_disturb_its_neighbours():
    """At an eps fit for the bulk, pairs of outliers go to each other and the rest is as without them."""
    x, y = paired_clouds(14, seed=20)
    epsilon = 0.1 * mean_cost(x, y)
    alone = transport_plan(x, y, epsilon).plan
    far = torch.tensor([1e4], dtype=torch.float64)
    plan = transport_plan(torch.cat([x, far]), torch.cat([y, far]), epsilon).plan
    torch.testing.assert_close(plan[:14, :14] * 15, alone * 14, rtol=0, atol=1e-7)
    assert float(plan[14, 14]) == pytest.approx(1 / 15, abs=1e-9)


def test_a_search_cut_short_is_reported_and_still_a_coupling():
    x, y = normal(40, seed=21), 3 * normal(40, seed=22)
    result = transport_plan(x, y, 1e-4 * mean_cost(x, y), max_iterations=1, tolerance=1e-15)
    assert not result.converged and result.residual > 1e-15 and result.iterations <= 1
    assert_coupling(result.plan)


def test_inputs_are_left_alone():
    x, y = paired_clouds(8, seed=23)
    before = x.clone(), y.clone()
    transport_plan(x, y, 0.1, anchor=0.5)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_squared_cost_of_clouds_far_from_zero():
    x, y = normal(5, seed=24), normal(7, seed=25)
    expected = (x[:, None] - y[None, :]) ** 2
    torch.testing.assert_close(squared_cost(x, y), expected)
    torch.testing.assert_close(squared_cost(x + 1e6, y + 1e6), expected, rtol=1e-7, atol=1e-8)


def test_barycentric_target():
    y = normal(6, seed=26, dtype=torch.float32)
    pairing = torch.eye(6, dtype=torch.float64) / 6
    assert torch.allclose(barycentric_target(pairing, y), y) and barycentric_target(pairing, y).dtype == y.dtype
    uniform = torch.full((6, 6), 1 / 36, dtype=torch.float64)
    torch.testing.assert_close(barycentric_target(uniform, y), y.mean().expand(6))
    plan = reference_measure(6, 0.3)
    torch.testing.assert_close(barycentric_target(plan, y.double()), 0.7 * y.double() + 0.3 * y.double().mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(epsilon=0.0), "epsilon"),
        (dict(epsilon=-1.0), "epsilon"),
        (dict(epsilon=math.inf), "epsilon"),
        (dict(epsilon=math.nan), "epsilon"),
        (dict(anchor=-0.1), "anchor"),
        (dict(anchor=1.1), "anchor"),
        (dict(anchor=math.nan), "anchor"),
        (dict(x=torch.zeros(3)), "shape"),
        (dict(x=torch.zeros(4, 1), y=torch.zeros(4, 1)), "shape"),
        (dict(x=torch.zeros(0), y=torch.zeros(0)), "shape"),
        (dict(x=torch.tensor([0.0, 1.0, 2.0, math.nan])), "finite"),
        (dict(y=torch.tensor([0.0, 1.0, 2.0, -math.inf])), "finite"),
    ],
)
def test_bad_arguments(arguments, message):
    usual = {"x": torch.arange(4.0), "y": torch.arange(4.0), "epsilon": 1.0, "anchor": 0.5, **arguments}
    anchor = usual.pop("anchor")
    with pytest.raises(ValueError, match=message):
        transport_plan(*usual.values(), anchor=anchor)


numbers = st.floats(-1e3, 1e3, allow_nan=False)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=10),
    exponent=st.floats(-8, 8),
    anchor=st.sampled_from([0.0, 1e-6, 0.1, 0.9, 1.0]),
)
def test_every_plan_is_a_coupling(pairs, exponent, anchor):
    x, y = (torch.tensor(cloud, dtype=torch.float64) for cloud in zip(*pairs, strict=True))
    epsilon = 10.0**exponent * max(mean_cost(x, y), 1e-30)
    result = transport_plan(x, y, epsilon, anchor=anchor)
    assert_coupling(result.plan)
    assert not result.converged or result.residual <= 1e-9
