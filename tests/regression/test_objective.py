"""The weighted ridge regression: value, gradients (three ways) and exact refits."""

from dataclasses import replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.square import SquareSystem, solve_square
from swap_prune.transport import barycentric_target, transport_plan
from tests.cases import but_long, dense_parts, generator, normal, random_regression
from tests.reference import dense_value, difference_gradient, normal_equation_refit, transport_value

SHAPES = ((12, 5), (5, 12), (6, 6))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_value_is_the_formula(n, p, ridge, smoothed):
    problem = random_regression(n, p, generator(1), ridge=ridge, smoothed=smoothed)
    w = normal(p, seed=2)
    parts = dense_parts(problem)
    expected = dense_value(w=w, **parts)
    assert problem.value(w) == pytest.approx(expected, rel=1e-12)
    assert problem.value(w, problem.factor.matvec(w)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_gradient_is_that_of_the_value(n, p, ridge, smoothed):
    problem = random_regression(n, p, generator(3), ridge=ridge, smoothed=smoothed)
    w = normal(p, seed=4)
    parts = dense_parts(problem)
    expected = difference_gradient(lambda v: dense_value(w=v, **parts), w)
    torch.testing.assert_close(problem.gradient(w), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(problem.gradient(w, problem.factor.matvec(w)), problem.gradient(w))


def test_ridge_alone():
    """With G = 0 only ``n lam/2 sum m (w - w_bar)^2`` is left: n = 3, lam = 0.5, m = (1, 2), drift = (2, -1)."""
    reference = torch.tensor([1.0, 1.0])
    problem = WeightedRidge(DenseFactor(torch.zeros(3, 2)), torch.zeros(3), reference, 0.5, torch.tensor([1.0, 2.0]))
    w = torch.tensor([3.0, 0.0])
    assert problem.penalty == 1.5
    assert problem.value(w) == pytest.approx(0.75 * (4 + 2))
    torch.testing.assert_close(problem.gradient(w), torch.tensor([3.0, -3.0]))


@pytest.mark.parametrize("anchor", but_long([0.2, 1.0]))
@pytest.mark.parametrize("relative", but_long([0.1, 1.0]))
def test_envelope_theorem(relative, anchor):
    """The gradient of n/2 OT_eps(G w, y), by differences of the true OT value, is least squares on the target."""
    n, p = 6, 4
    pairing = random_regression(n, p, generator(5), ridge=0.05)
    pairing = replace(pairing, target=pairing.factor.matvec(pairing.reference))
    y, w = pairing.target, normal(p, seed=6)
    epsilon = relative * float(((pairing.factor.matvec(w)[:, None] - y[None, :]) ** 2).mean())

    def objective(v):
        drift = v - pairing.reference
        ridge = pairing.penalty / 2 * float(pairing.metric @ drift.square())
        return n / 2 * transport_value(pairing.factor.matvec(v), y, epsilon, anchor) + ridge

    expected = difference_gradient(objective, w, step=1e-4)
    plan = transport_plan(pairing.factor.matvec(w), y, epsilon, anchor=anchor).plan
    gradient = replace(pairing, target=barycentric_target(plan, y)).gradient(w)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    paired = pairing.gradient(w)  # and the plan matters here
    assert float((gradient - paired).norm()) > 1e-2 * float(paired.norm())


def test_paper_gradient():
    """Algorithm 1: ``G^T (n P (G w - G w_bar)) + lam' (w - w_bar)``; P need not be symmetric."""
    n, p = 7, 5
    problem = random_regression(n, p, generator(7), ridge=0.2)
    G, w_bar, w = dense_parts(problem)["G"], problem.reference, normal(p, seed=8)
    y = G @ w_bar
    plan = transport_plan(G @ w, y, 0.5).plan
    assert float((plan - plan.T).abs().max()) > 1e-3
    step = replace(problem, target=y, metric=torch.ones(p, dtype=torch.float64), smoothing=n * plan)
    expected = G.T @ (n * plan @ (G @ w - G @ w_bar)) + n * 0.2 * (w - w_bar)
    torch.testing.assert_close(step.gradient(w), expected)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("keep", [1, 4, 7, 8, 9, 15, 20])
def test_refit_is_that_of_the_normal_equations(keep, ridge, smoothed):
    problem = random_regression(8, 20, generator(9), ridge=ridge, smoothed=smoothed)
    support = torch.randperm(20, generator=generator(keep))[:keep].sort().values
    w = problem.refit(support).weights
    expected = normal_equation_refit(support=support, **dense_parts(problem))
    torch.testing.assert_close(w, expected, rtol=1e-7, atol=1e-9)
    outside = torch.ones(20, dtype=torch.bool).index_fill(0, support, False)
    assert bool((w[outside] == 0).all())
    torch.testing.assert_close(problem.gradient(w)[support], torch.zeros(keep, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("keep", [3, 5, 9, 12])
def test_a_refit_knows_its_products(keep, ridge, smoothed):
    problem = random_regression(5, 12, generator(16), ridge=ridge, smoothed=smoothed)
    refit = problem.refit(torch.randperm(12, generator=generator(17))[:keep].sort().values)
    w = refit.weights
    if ridge > 0:
        assert refit.fitted is not None and (keep <= 5) == (refit.dual is None) == (refit.pulled is None)
    assert problem.value_of(refit) == pytest.approx(problem.value(w), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(problem.gradient_of(refit), problem.gradient(w), rtol=1e-7, atol=1e-8)


def test_refit_does_not_depend_on_the_order_of_the_support():
    problem = random_regression(6, 15, generator(10))
    for support in (torch.tensor([1, 4, 9]), torch.arange(2, 12)):
        torch.testing.assert_close(problem.refit(support).weights, problem.refit(support.flip(0)).weights)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("keep", [3, 6, 10])
def test_refit_without_ridge(keep, smoothed):
    """k < n: least squares; k = n: interpolation; k > n: of the interpolations the nearest in the metric."""
    problem = random_regression(6, 14, generator(11), ridge=0.0, smoothed=smoothed)
    support = torch.arange(1, 1 + keep)
    w = problem.refit(support).weights
    expected = normal_equation_refit(support=support, **dense_parts(problem))
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)
    if keep >= 6:
        torch.testing.assert_close(problem.factor.matvec(w), problem.target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["duplicate columns", "zero columns", "duplicate rows", "zero matrix"])
@pytest.mark.parametrize("keep", [5, 8, 13])
def test_refit_of_a_singular_system(keep, kind, dtype):
    """Without ridge and with a rank too low, a minimiser of moderate size is still found."""
    n, p = 8, 16
    problem = random_regression(n, p, generator(12), ridge=0.0)
    G = dense_parts(problem)["G"]
    if kind == "duplicate columns":
        G[:, 1::2] = G[:, ::2]
    elif kind == "zero columns":
        G[:, ::2] = 0
    elif kind == "duplicate rows":
        G[4:] = G[:4]
    else:
        G.zero_()
    target = G @ problem.reference  # as in LR, so that the optimum over all weights is 0
    problem = replace(
        problem,
        factor=DenseFactor(G.to(dtype)),
        target=target.to(dtype),
        reference=problem.reference.to(dtype),
        metric=problem.metric.to(dtype),
    )
    support = torch.arange(keep)
    w = problem.refit(support).weights
    parts = dense_parts(problem)
    expected = normal_equation_refit(support=support, **parts)
    best = dense_value(w=expected, **parts)
    slack = (1e-6 if dtype == torch.float64 else 1e-3) * (1 + dense_value(w=torch.zeros(p).double(), **parts))
    assert bool(torch.isfinite(w).all())
    assert dense_value(w=w.double(), **parts) <= best + slack
    assert float(w.norm()) <= 10 * float(expected.norm()) + 1


def test_refit_in_single_precision():
    problem = random_regression(30, 60, generator(13), ridge=0.05, dtype=torch.float32)
    for keep in (20, 30, 45):
        support = torch.arange(keep)
        w = problem.refit(support).weights
        assert w.dtype == torch.float32
        expected = normal_equation_refit(support=support, **dense_parts(problem))
        torch.testing.assert_close(w.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_small_ridge_is_not_lost_in_single_precision():
    """Two columns that are nearly alike: what tells them apart, and the ridge, are below the rounding of squares."""
    G = normal(40, 2, seed=30)
    G[:, 1] = G[:, 0] + 2e-4 * G[:, 1]
    problem = WeightedRidge(
        DenseFactor(G.float()), normal(40, seed=31).float(), torch.tensor([1.0, -1.0]), 1e-8, torch.ones(2)
    )
    expected = normal_equation_refit(support=torch.arange(2), **dense_parts(problem))
    torch.testing.assert_close(problem.refit(torch.arange(2)).weights.double(), expected, rtol=1e-3, atol=0)


def test_refit_of_every_weight_with_the_target_met_changes_nothing():
    problem = random_regression(5, 9, generator(14))
    problem = replace(problem, target=problem.factor.matvec(problem.reference))
    torch.testing.assert_close(problem.refit(torch.arange(9)).weights, problem.reference)


def test_nothing_is_changed_by_use():
    problem = random_regression(5, 9, generator(15), smoothed=True)
    before = {name: part.clone() for name, part in dense_parts(problem).items() if name != "ridge"}
    w, support = normal(9, seed=16), torch.arange(4)
    kept = w.clone()
    problem.value(w), problem.gradient(w), problem.refit(support).weights, problem.refit(torch.arange(8)).weights
    after = dense_parts(problem)
    assert torch.equal(w, kept) and torch.equal(support, torch.arange(4))
    assert all(torch.equal(part, after[name]) for name, part in before.items())


def test_a_graded_system_is_solved_and_its_gradient_is_right():
    """A loud row beside one that the kept weights do not feel: the ridge alone makes the system definite."""
    state = generator(0)
    G = torch.randn(20, 4000, generator=state)
    G[0] *= 100
    G[1] = 0
    G[1, 400:420] = torch.randn(20, generator=state)
    w = torch.rand(4000, generator=state) * 0.01
    w[:400] += 1
    problem = WeightedRidge(DenseFactor(G), G @ w, w, 0.01, torch.ones(4000))
    refit = problem.refit(torch.arange(400))
    exact = WeightedRidge(DenseFactor(G.double()), G.double() @ w.double(), w.double(), 0.01, torch.ones(4000).double())
    expected = exact.gradient(exact.refit(torch.arange(400)).weights)[400:420]
    assert float(expected.norm()) > 0.05
    torch.testing.assert_close(problem.gradient_of(refit)[400:420].double(), expected, rtol=1e-2, atol=1e-4)


def test_solve_square():
    a, b = normal(5, 5, seed=17), normal(5, seed=18)
    torch.testing.assert_close(a @ solve_square(a, b), b)
    singular = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert solve_square(singular, torch.tensor([4.0, 3.0])).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_square_of_a_matrix_singular_up_to_rounding(dtype):
    """Elimination of such a matrix meets a pivot of rounding size instead of 0; the answer must not blow up."""
    columns = normal(9, 4, seed=19).to(dtype)
    columns = torch.cat([columns, columns[:, :2]], 1)
    matrix, right = columns.T @ columns, columns.T @ normal(9, seed=20).to(dtype)
    expected = torch.linalg.pinv(matrix.double(), rtol=1e-5, hermitian=True) @ right.double()
    solution = solve_square(matrix, right).double()
    assert float(solution.norm()) <= 10 * float(expected.norm())


@pytest.mark.parametrize("k", [9, 12, 14])
def test_an_updated_gram_matrix_gives_the_same_refit(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    G = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    reference = torch.randn(20, generator=generator, dtype=torch.float64)
    metric = torch.rand(20, generator=generator, dtype=torch.float64) + 0.5
    problem = WeightedRidge(DenseFactor(G), G @ reference, reference, 0.1, metric)
    first = problem.refit(torch.arange(16))
    support = torch.arange(20)[-k:]
    torch.testing.assert_close(problem.refit(support, first.gram).weights, problem.refit(support).weights)


def test_each_kind_of_system_takes_its_own_factorisation():
    columns = normal(9, 6, seed=31)
    definite, right = columns.T @ columns, normal(6, seed=32)
    indefinite = torch.diag(torch.tensor([1.0, -2.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    lopsided = definite + torch.ones(6, 6, dtype=torch.float64).triu(1)
    singular = torch.zeros(6, 6, dtype=torch.float64)
    for matrix, symmetric, kind in (
        (definite, True, "cholesky"),
        (indefinite, True, "lu"),
        (lopsided, False, "lu"),
        (singular, True, "inverse"),
    ):
        system = SquareSystem.of(matrix, symmetric=symmetric)
        assert system.kind == kind
        torch.testing.assert_close(system.solve(right), torch.linalg.pinv(matrix) @ right)


def test_forms_are_those_of_the_inverse_whatever_holds_the_columns():
    kernel = normal(9, 9, seed=33)
    matrix = kernel @ kernel.T + 0.1 * torch.eye(9, dtype=torch.float64)
    for count in (1, 200):  # columns: fewer and more than the matrix has
        columns = normal(9, count, seed=34).bfloat16()
        expected = (columns.double() * torch.linalg.solve(matrix, columns.double())).sum(0)
        system = SquareSystem.of(matrix)
        torch.testing.assert_close(system.forms(columns.double()), expected)
        torch.testing.assert_close(system.forms(columns), expected, rtol=2.0**-14, atol=0.0)
    lopsided = SquareSystem.of(matrix + 3 * torch.ones(9, 9, dtype=torch.float64).triu(1), symmetric=False)
    assert lopsided.kind == "lu"
    expected = (columns.double() * lopsided.solve(columns.double())).sum(0)
    torch.testing.assert_close(lopsided.forms(columns), expected)


@pytest.mark.parametrize("seed", range(4))
def test_without_a_ridge_smoothed_residuals_are_as_small_as_can_be(seed):
    """S and the Gram matrix are singular: the product of both need not have the solutions of the normal equations."""
    G, r = normal(6, 20, seed=seed), normal(20, seed=seed + 10)
    G[:4] = 0.0
    half = normal(6, 3, seed=seed + 20)
    smoothing, target = half @ half.T, normal(6, seed=seed + 30)
    problem = WeightedRidge(DenseFactor(G), target, r, 0.0, torch.ones(20, dtype=torch.float64), smoothing)
    support = torch.arange(0, 20, 2)
    found = problem.refit(support)
    least = torch.linalg.lstsq(half.T @ G[:, support], (half.T @ target).unsqueeze(1), driver="gelsd").solution
    rest = half.T @ (G[:, support] @ least.squeeze(1) - target)
    assert problem.value(found.weights) == pytest.approx(float(rest.square().sum()) / 2, abs=1e-9)


def spread_out(n, condition, dtype=torch.float32):
    """A symmetric matrix of a condition number, in a random basis."""
    basis = torch.linalg.qr(normal(n, n, seed=20)).Q
    matrix = (basis * torch.logspace(0, float(torch.tensor(condition).log10()), n, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6, 1e9])
def test_a_system_in_single_precision_is_solved_as_in_double(condition, scale):
    """Where a float32 factor does for it, and where not."""
    matrix, right = spread_out(40, condition), torch.stack([normal(40, seed=21), normal(40, seed=22)], 1) * scale
    system = SquareSystem.of(matrix)
    assert (system.kind == "single") == (condition <= 1e6)
    expected = torch.linalg.solve(matrix.double(), right)
    if condition <= 1e6:
        torch.testing.assert_close(system.solve(right) / scale, expected / scale, rtol=2e-6, atol=1e-6)
        assert ("_wide" in vars(system)) == (condition == 1e6), "which is too much for one correction"
        forms = (right / scale * (expected / scale)).sum(0)
        torch.testing.assert_close(system.forms(right / scale), forms, rtol=1e-8 * condition + 1e-5, atol=0)
    assert SquareSystem.of(matrix.double()).kind == "cholesky", "what is in double stays there"
    assert not bool(system.solve(torch.zeros(40)).any())


def test_a_correction_that_is_not_small_asks_for_double_precision():
    matrix, right = spread_out(40, 1e4), normal(40, seed=21)
    system = SquareSystem.of(matrix)
    spoilt = SquareSystem("single", (system.factors[0] * 1.1, matrix))
    torch.testing.assert_close(spoilt.solve(right), torch.linalg.solve(matrix.double(), right))
    assert spoilt._wide.kind == "cholesky"
    system.solve(right)
    assert "_wide" not in vars(system)
