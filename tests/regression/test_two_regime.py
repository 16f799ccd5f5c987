"""The paper's step: the critical step against a scan, the step against a grid."""

import math
from dataclasses import replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.iht import hard_threshold
from swap_prune.regression.top_k import top_k
from swap_prune.regression.two_regime import critical_step, two_regime_step
from tests.cases import dense_parts, generator, normal, random_regression


def sparse_start(problem, keep):
    support = top_k(problem.reference.abs(), keep)
    return hard_threshold(problem.reference, support), support


def support_at(w, gradient, tau, keep):
    return set(top_k((w - tau * gradient).abs(), keep).tolist())


@pytest.mark.parametrize("keep", [1, 3, 7])
@pytest.mark.parametrize("seed", range(6))
def test_critical_step_is_where_a_scan_sees_the_support_change(seed, keep):
    support = torch.randperm(8, generator=generator(seed))[:keep].sort().values
    w = torch.zeros(8, dtype=torch.float64)
    w[support] = normal(keep, seed=seed + 50) + 0.1
    gradient = normal(8, seed=seed + 90)
    tau = critical_step(w, gradient, support)
    if tau == math.inf:  # every entry of the support outruns the rest
        outside = set(range(8)) - set(support.tolist())
        assert float(gradient[support].abs().min()) >= float(gradient[list(outside)].abs().max())
        scan = torch.logspace(-3, 4, 500, dtype=torch.float64)
    else:
        scan = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)[1:] * tau
        assert support_at(w, gradient, tau * (1 + 1e-9), keep) != set(support.tolist())
    for step in scan.tolist():
        assert support_at(w, gradient, step, keep) == set(support.tolist())


def test_critical_step_by_hand():
    support = torch.tensor([0, 1])
    w = torch.tensor([2.0, -3.0, 0.0, 0.0])
    # entry 0 falls towards zero: 2 - tau = 3 tau; entry 1 moves away: 3 + tau = 3 tau
    assert critical_step(w, torch.tensor([1.0, 1.0, 3.0, -2.0]), support) == pytest.approx(0.5)
    assert critical_step(w, torch.tensor([-1.0, 1.0, 3.0, -2.0]), support) == pytest.approx(1.0)
    assert critical_step(w, torch.tensor([-5.0, 4.0, 3.0, -2.0]), support) == math.inf
    assert critical_step(torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.ones(4) * torch.tensor([0, 1, 2, 2]), support) == 0


def test_critical_step_with_every_weight_kept():
    assert critical_step(normal(4, seed=1), normal(4, seed=2), torch.arange(4)) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("n", "p", "keep"), [(30, 12, 4), (8, 40, 10), (1, 6, 2), (9, 9, 9), (6, 10, 1)])
def test_a_step_never_raises_the_objective(n, p, keep, smoothed, dtype):
    for seed in range(4):
        problem = random_regression(n, p, generator(seed), smoothed=smoothed, dtype=dtype)
        w, support = sparse_start(problem, keep)
        value = problem.value(w)
        for _ in range(5):
            fit = two_regime_step(problem, w, support)
            assert fit.value <= value and fit.value == pytest.approx(problem.value(fit.weights), rel=1e-6)
            assert fit.support.shape == (keep,)
            outside = torch.ones(p, dtype=torch.bool).index_fill(0, fit.support, False)
            assert bool((fit.weights[outside] == 0).all()) and bool(torch.isfinite(fit.weights).all())
            w, support, value = fit.weights, fit.support, fit.value


@pytest.mark.long
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_first_regime_is_the_best_of_a_grid(seed, smoothed):
    """Large weights near their optimum: the parabola's minimum comes long before any change of support."""
    problem = random_regression(12, 10, generator(seed), ridge=0.01, smoothed=smoothed)
    support = torch.tensor([1, 2, 4, 7, 9])
    w = torch.zeros(10, dtype=torch.float64)
    w[support] = 30.0
    faint = torch.full((10,), 1e-3, dtype=torch.float64).index_fill(0, support, 1.0)
    factor = DenseFactor(dense_parts(problem)["G"] * faint)
    problem = replace(problem, factor=factor, target=factor.matvec(w), reference=w)
    w = hard_threshold(w + normal(10, seed=seed + 30), support)
    gradient = problem.gradient(w)
    fit = two_regime_step(problem, w, support)
    values = {
        tau: problem.value(hard_threshold(w - tau * gradient, support))
        for tau in torch.linspace(0, critical_step(w, gradient, support), 20_001, dtype=torch.float64).tolist()
    }
    best = min(values, key=values.get)
    assert 0 < best < max(values), "the case is in the first regime"
    assert fit.support.tolist() == support.tolist()
    assert fit.value <= values[best] * (1 + 1e-9)
    assert fit.value == pytest.approx(values[best], rel=1e-2)


@pytest.mark.parametrize(("n", "p", "keep"), [(20, 15, 4), (6, 10, 1), (1, 6, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_second_regime_is_no_worse_than_the_critical_step(seed, n, p, keep):
    """Up to tau_c the support stays and Q falls: whatever comes later, that much is gained."""
    problem = random_regression(n, p, generator(seed), ridge=0.01)
    w, support = sparse_start(problem, keep)
    gradient = problem.gradient(w)
    tau = critical_step(w, gradient, support)
    inside = hard_threshold(gradient, support)
    moved = problem.factor.matvec(inside)
    curvature = float(moved @ moved + problem.penalty * (problem.metric @ inside.square()))
    tau = min(tau, float(gradient @ inside) / curvature)
    reached = problem.value(w - tau * inside)
    assert reached < problem.value(w)
    assert two_regime_step(problem, w, support).value <= reached * (1 + 1e-9)


def test_the_support_changes_where_that_pays():
    """w starts on the wrong weights: the target is column 0, and the support holds the others' small weights."""
    G = torch.eye(6, 4, dtype=torch.float64)
    problem = random_regression(6, 4, generator(1), ridge=0.0)
    problem = replace(problem, factor=DenseFactor(G), target=5 * G[:, 0])
    w = torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    fit = two_regime_step(problem, w, torch.tensor([1]))
    assert fit.support.tolist() == [0]
    assert fit.value < problem.value(w)


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unit_of_the_gradients_does_not_matter(scale, dtype):
    """Not even where squares of a gradient, of the order of G cubed, are no numbers of the precision."""
    problem = random_regression(12, 30, generator(4), ridge=0.01)
    parts = {name: getattr(problem, name).to(dtype) for name in ("target", "reference", "metric")}
    found = []
    for unit in (1.0, scale):
        target, factor = parts["target"] * unit, DenseFactor((problem.factor.matrix * unit).to(dtype))
        own = replace(problem, **parts | {"target": target}, factor=factor, ridge=problem.ridge * unit**2)
        w, support = sparse_start(own, 8)
        w[support[0]] = 0  # the second regime starts at no step at all
        found.append(two_regime_step(own, w, support))
    assert found[1].iterations == 1 and torch.equal(found[0].support, found[1].support)
    torch.testing.assert_close(found[1].weights, found[0].weights, rtol=1e-4, atol=1e-6)


def test_a_stationary_point_stays():
    problem = random_regression(9, 5, generator(3), ridge=0.0)
    w, support = sparse_start(problem, 3)
    problem = replace(problem, target=problem.factor.matvec(w))  # Q(w) = 0 and the gradient vanishes
    fit = two_regime_step(problem, w, support)
    torch.testing.assert_close(fit.weights, w)
    assert fit.value <= 1e-12 and bool(torch.isfinite(fit.weights).all())


def test_inputs_are_left_alone():
    problem = random_regression(9, 8, generator(4))
    w, support = sparse_start(problem, 3)
    before = w.clone(), support.clone()
    two_regime_step(problem, w, support)
    assert torch.equal(w, before[0]) and torch.equal(support, before[1])


def test_floors_hold_whatever_the_step_would_drop():
    free = 0
    for seed in range(8):
        problem = random_regression(10, 40, generator(seed))
        held = replace(problem, floors=((slice(0, 15), 12), (slice(15, 40), 0)))
        w = hard_threshold(held.reference, torch.arange(15)) / 10
        assert int((two_regime_step(held, w, torch.arange(15)).support < 15).sum()) >= 12
        free += int((two_regime_step(problem, w, torch.arange(15)).support < 15).sum()) < 12
    assert free > 0, "else nothing is held"


@pytest.mark.parametrize(("n", "p", "keep", "seed"), [(20, 60, 10, 597), (10, 40, 8, 508)])
def test_steps_grow_while_the_thresholded_point_falls(n, p, keep, seed):
    """The last point on the old support is better here than where growth begins, and not than where it ends."""
    problem = random_regression(n, p, generator(seed), ridge=0.01)
    spread = torch.rand(p, generator=generator(seed), dtype=torch.float64)
    factor = DenseFactor(problem.factor.matrix * spread)
    target = factor.matvec(problem.reference)
    problem = replace(problem, factor=factor, metric=torch.ones_like(spread), target=target)
    support = top_k(problem.reference.abs(), keep)
    w = hard_threshold(problem.reference, support)
    gradient = problem.gradient(w)
    edge = critical_step(w, gradient, support)
    tau = edge * (1 + 2**-10)  # where the tie at the edge is decided, whatever the machine rounds

    def thresholded(length):
        u = w - length * gradient
        return problem.value(hard_threshold(u, top_k(u.abs(), keep)))

    assert problem.value(w - edge * hard_threshold(gradient, support)) < thresholded(1.05 * tau) < thresholded(tau)
    while thresholded(1.05 * tau) < thresholded(tau):
        tau *= 1.05
    assert two_regime_step(problem, w, support).value <= thresholded(tau) * (1 + 1e-9)
