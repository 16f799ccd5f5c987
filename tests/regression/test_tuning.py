"""Couplings as regressions, and the choice among them on held-out rows."""

from dataclasses import replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression import tuning
from swap_prune.regression.tuning import Coupling, choose_coupling, couple, mean_cost
from swap_prune.transport import transport_plan
from tests.cases import dense_parts, generator, normal, random_regression
from tests.regression.test_conjugate import ProductsOnly


def pairing_problem(n=20, p=8, seed=1, dtype=torch.float64):
    problem = random_regression(n, p, generator(seed), dtype=dtype)
    return replace(problem, target=problem.factor.matvec(problem.reference))


def test_mean_cost():
    x, y = normal(6, seed=1), normal(6, seed=2)
    expected = sum(float((a - b) ** 2) for a in x for b in y) / 36
    assert mean_cost(x, y) == pytest.approx(expected)
    assert mean_cost(torch.ones(3), torch.ones(3)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("gradient", ["exact", "paper"])
def test_without_freedom_the_regression_is_that_of_lr(gradient, debias, dtype):
    pairing = pairing_problem(dtype=dtype)
    w = normal(8, seed=3, dtype=dtype)
    coupled = couple(pairing, pairing.factor.matvec(w), Coupling(0.0, 1.0, gradient, debias))
    assert coupled.target.dtype == dtype and (coupled.smoothing is None or coupled.smoothing.dtype == dtype)
    torch.testing.assert_close(coupled.gradient(w), pairing.gradient(w))
    assert coupled.value(w) == pytest.approx(pairing.value(w), rel=1e-5)
    support = torch.tensor([0, 3, 5])
    torch.testing.assert_close(coupled.refit(support).weights, pairing.refit(support).weights)


@pytest.mark.parametrize("anchor", [0.3, 1.0])
def test_exact_coupling_is_the_barycentric_target(anchor):
    pairing = pairing_problem()
    y, x = pairing.target, pairing.target + 0.5 * normal(20, seed=4)
    epsilon = 0.2 * mean_cost(x, y)
    coupled = couple(pairing, x, Coupling(anchor, epsilon, "exact", debias=False))
    plan = transport_plan(x, y, epsilon, anchor=anchor).plan
    torch.testing.assert_close(coupled.target, 20 * plan @ y, rtol=1e-5, atol=1e-5)
    assert coupled.smoothing is None and coupled.factor is pairing.factor
    itself = transport_plan(x, x, epsilon, anchor=anchor).plan
    debiased = couple(pairing, x, Coupling(anchor, epsilon, "exact", debias=True))
    torch.testing.assert_close(debiased.target, 20 * (plan @ y - itself @ x) + x, rtol=1e-5, atol=1e-5)


def test_debiased_target_of_a_cloud_on_itself_is_the_cloud():
    pairing = pairing_problem()
    for anchor in (0.1, 1.0):
        coupled = couple(pairing, pairing.target, Coupling(anchor, 0.5, "exact", debias=True))
        torch.testing.assert_close(coupled.target, pairing.target, rtol=1e-5, atol=1e-5)


def test_plain_target_shrinks_to_the_mean_and_the_debiased_one_does_not():
    pairing = pairing_problem()
    y, x = pairing.target, pairing.target + normal(20, seed=5)
    wide = 1e8 * mean_cost(x, y)
    plain = couple(pairing, x, Coupling(1.0, wide, "exact", debias=False)).target
    torch.testing.assert_close(plain, y.mean().expand(20), rtol=1e-5, atol=1e-5)
    debiased = couple(pairing, x, Coupling(1.0, wide, "exact", debias=True)).target
    torch.testing.assert_close(debiased, y.mean() - x.mean() + x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relative", [1e-3, 0.2, 10.0])
@pytest.mark.parametrize("anchor", [0.3, 1.0])
def test_paper_coupling_smooths_the_residual(anchor, relative):
    """S is the positive semidefinite matrix nearest to the symmetric part A of n P: S and S - A >= 0, S (S - A) = 0."""
    pairing = pairing_problem()
    x = pairing.target + 0.5 * normal(20, seed=6)
    epsilon = relative * mean_cost(x, pairing.target)
    coupled = couple(pairing, x, Coupling(anchor, epsilon, "paper"))
    plan = transport_plan(x, pairing.target, epsilon, anchor=anchor).plan
    S, A = coupled.smoothing, 10 * (plan + plan.T)
    torch.testing.assert_close(S, S.T)
    torch.testing.assert_close(S.sum(1), torch.ones(20, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(S).min()) >= -1e-9
    assert float(torch.linalg.eigvalsh(S - A).min()) >= -1e-4  # the plans agree to their tolerance
    torch.testing.assert_close(S @ (S - A), torch.zeros_like(S), rtol=0, atol=1e-4)
    assert torch.equal(coupled.target, pairing.target)


@pytest.mark.parametrize("relative", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("gradient", ["exact", "paper"])
def test_a_coupled_regression_is_bounded_below_and_refits_stationary(gradient, relative):
    pairing = pairing_problem(seed=13)
    x = pairing.target + normal(20, seed=14)
    coupled = couple(pairing, x, Coupling(1.0, relative * mean_cost(x, pairing.target), gradient))
    support = torch.tensor([0, 2, 3, 7])
    w = coupled.refit(support).weights
    torch.testing.assert_close(coupled.gradient(w)[support], torch.zeros(4).double(), rtol=0, atol=1e-8)
    for seed in range(5):
        other = torch.zeros(8, dtype=torch.float64).index_copy(0, support, 10 * normal(4, seed=seed))
        assert coupled.value(other) >= coupled.value(w) >= -1e-9


def test_choice_is_one_of_the_candidates():
    pairing = pairing_problem(60, 12, seed=7)
    support = torch.arange(6)
    choice, evidence = choose_coupling(pairing, support, generator(0), (0.05, 0.5), (0.1, 2.0))
    assert choice.anchor in (0.0, 0.05, 0.5) and choice.epsilon in (0.1, 2.0)
    assert choice.gradient == "exact" and choice.debias
    other, _ = choose_coupling(pairing, support, generator(0), gradient="paper", debias=False)
    assert other.gradient == "paper" and not other.debias and other.epsilon > 0
    numbers = [value for value in evidence.values() if isinstance(value, float)]
    assert numbers and all(value == value and abs(value) < float("inf") for value in numbers)


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize(("n", "keep"), [(40, 12), (40, 34), (40, 60), (300, 70)])  # fewer than rows fitted to, or not
def test_the_choice_is_that_of_refits_on_the_kept_rows(n, keep, gradient):
    """Put together by hand: each candidate refitted on three quarters of the rows, and judged by the last quarter."""
    pairing, support = pairing_problem(n, 80, seed=14), torch.arange(keep) + 3
    asked = {"anchors": (0.2,), "epsilons": (0.5,), "gradient": gradient}
    _, evidence = choose_coupling(pairing, support, generator(3), **asked)
    _, with_known = choose_coupling(pairing, support, generator(3), **asked, known=pairing.refit(support))
    order = torch.randperm(n, generator=generator(3))[: tuning.TUNING_ROWS]
    held_out, kept = order[: round(len(order) / 4)], order[round(len(order) / 4) :]
    G = dense_parts(pairing)["G"]
    fitting = replace(pairing, factor=DenseFactor(G[kept]), target=pairing.target[kept])
    w = fitting.refit(support).weights
    other = couple(fitting, G[kept] @ w, Coupling(0.2, 0.5, gradient)).refit(support).weights
    losses = [float((G[held_out] @ (one - pairing.reference)).square().mean() / 2) for one in (w, other)]
    _, by_products = choose_coupling(replace(pairing, factor=ProductsOnly(G)), support, generator(3), **asked)
    for found in (evidence, with_known, by_products):
        assert found["held_out_loss_pairing"] == pytest.approx(losses[0], rel=1e-6)
        assert found["held_out_loss"] in (pytest.approx(losses[0], rel=1e-6), pytest.approx(losses[1], rel=1e-4))


def test_after_a_refit_the_choice_makes_no_pass_over_the_rows():
    pairing = pairing_problem(30, 90, seed=15)
    known = pairing.refit(torch.arange(50))
    lost = replace(pairing, factor=DenseFactor(torch.full((30, 90), torch.nan, dtype=torch.float64)))
    choice, evidence = choose_coupling(lost, torch.arange(50), generator(4), known=known)
    expected = choose_coupling(pairing, torch.arange(50), generator(4))
    assert choice == expected[0]
    assert evidence["held_out_loss"] == pytest.approx(expected[1]["held_out_loss"], rel=1e-9)


def test_choice_is_reproducible_and_leaves_the_global_random_state():
    pairing = pairing_problem(60, 12, seed=8)
    state = torch.get_rng_state()
    first = choose_coupling(pairing, torch.arange(6), generator(5))
    assert first == choose_coupling(pairing, torch.arange(6), generator(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_pairing_stays_where_the_coupling_can_only_hurt():
    """Rows whose y are far apart and met exactly: mixing them is wrong, and held-out rows show it."""
    pairing = pairing_problem(80, 6, seed=9)
    pairing = replace(pairing, ridge=1e-6)
    choice, evidence = choose_coupling(pairing, torch.arange(5), generator(1), (1.0,), debias=False)
    assert choice.anchor == 0
    assert evidence["held_out_loss"] == evidence["held_out_loss_pairing"]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_too_few_rows_to_hold_out(n):
    choice, evidence = choose_coupling(pairing_problem(n, 5, seed=10), torch.arange(2), generator(0))
    assert choice.anchor == 0 and "few" in evidence["coupling"]


def test_inputs_are_left_alone():
    pairing = pairing_problem(30, 8, seed=11)
    before = {name: part.clone() for name, part in dense_parts(pairing).items() if isinstance(part, torch.Tensor)}
    choose_coupling(pairing, torch.arange(4), generator(2))
    couple(pairing, normal(30, seed=12), Coupling(0.5, 1.0))
    after = dense_parts(pairing)
    assert all(torch.equal(part, after[name]) for name, part in before.items())
