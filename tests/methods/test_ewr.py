"""EWR, put together by hand from its parts."""

from dataclasses import replace

import pytest
import torch

from swap_prune import EWR, LR
from swap_prune.fisher.factor import DenseFactor
from swap_prune.methods.pairing import pairing_regression
from swap_prune.regression import tuning
from swap_prune.regression.iht import hard_threshold, solve_sparse
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.top_k import top_k
from swap_prune.regression.tuning import Coupling, couple, mean_cost
from swap_prune.regression.two_regime import two_regime_step
from swap_prune.transport import barycentric_target, relaxed_target, transport_plan
from tests.cases import generator, pruning_problem

FIXED = {"ridge": 0.1, "damping": 1.0, "metric": "diagonal", "swaps": 0, "first_order": 0.0}


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("unit", ["mean_cost", "absolute"])
@pytest.mark.parametrize("couplings", [1, 3])
def test_ewr_is_lr_then_plans_and_regressions_in_turn(gradient, debias, unit, couplings):
    """Put together by hand from its parts, on a support that a search of its own would not keep."""
    problem = pruning_problem(30, 60, 20, seed=1, dtype=torch.float64)
    pairing = pairing_regression(problem, 0.1, 1.0)
    fit = solve_sparse(pairing, 20)
    scale = mean_cost(pairing.factor.matvec(fit.weights), pairing.target) if unit == "mean_cost" else 1.0
    for _ in range(couplings):
        regression = couple(pairing, pairing.factor.matvec(fit.weights), Coupling(0.5, 0.2 * scale, gradient, debias))
        fit = solve_sparse(regression, 20, start=fit.support)
    settings = {"epsilon": 0.2, "anchor": 0.5, "epsilon_unit": unit, "gradient": gradient, "debias": debias}
    solution = EWR(**settings, couplings=couplings, **FIXED).solve(problem, generator())
    torch.testing.assert_close(solution.weights, fit.weights)
    assert solution.evidence["epsilon"] == pytest.approx(0.2 * scale) and solution.evidence["anchor"] == 0.5
    assert not torch.equal(solution.weights, LR(**FIXED).solve(problem, generator()).weights)
    default = EWR(epsilon=0.2, anchor=0.5, **FIXED).solve(problem, generator()).weights
    assert torch.allclose(default, fit.weights) == (
        settings["gradient"] == "exact" and debias and unit == "mean_cost" and couplings == 1
    )


@pytest.mark.parametrize("anchor", [0.0, 0.5])
@pytest.mark.parametrize("couplings", [1, 3])
def test_samples_that_lie_far_from_all_others_count_less(anchor, couplings):
    """Residuals are weighted by what is left of their mass; put together by hand."""
    problem = pruning_problem(30, 60, 20, seed=1, dtype=torch.float64)
    pairing = pairing_regression(problem, 0.1, 1.0)
    fit = solve_sparse(pairing, 20)
    scale = mean_cost(pairing.factor.matvec(fit.weights), pairing.target)
    for _ in range(couplings):
        x = pairing.factor.matvec(fit.weights)
        settings = {"anchor": anchor, "relaxation": 0.05 * scale, "tolerance": 1e-5}
        plan = transport_plan(x, pairing.target, 0.2 * scale, **settings).plan
        target, mass = relaxed_target(plan, pairing.target)
        root = mass.sqrt()
        weighted = DenseFactor(pairing.factor.matrix * root.unsqueeze(1))
        fit = solve_sparse(replace(pairing, factor=weighted, target=target * root), 20, start=fit.support)
    method = EWR(epsilon=0.2, anchor=anchor, relaxation=0.05, couplings=couplings, **FIXED)
    solution = method.solve(problem, generator())
    torch.testing.assert_close(solution.weights, fit.weights)
    assert solution.evidence["relaxation"] == pytest.approx(0.05 * scale)
    assert not torch.equal(solution.weights, LR(**FIXED).solve(problem, generator()).weights)


def test_a_relaxed_coupling_is_chosen_as_any_other():
    problem = pruning_problem(30, 60, 20, seed=1, dtype=torch.float64)
    for fixed in ({}, {"anchor": 0.0}, {"epsilon": 0.2}):
        method = EWR(relaxation=0.5, **fixed, **FIXED)
        assert method.needs_held_out
        evidence = method.solve(problem, generator()).evidence
        assert {"coupling", "held_out_loss", "held_out_loss_pairing"} <= evidence.keys()
    assert not EWR(relaxation=0.5, epsilon=0.2, anchor=0.0, **FIXED).needs_held_out


@pytest.mark.parametrize("settings", [{"relaxation": 0}, {"relaxation": "much"}, {"relaxation": float("inf")}])
def test_a_relaxation_is_a_positive_number(settings):
    with pytest.raises(ValueError, match="relaxation must be a positive number or None"):
        EWR(**settings)
    with pytest.raises(ValueError, match="relaxation needs solver='iht'"):
        EWR(relaxation=1.0, solver="algorithm1")


def test_a_coupling_begins_with_the_gram_matrix_of_lr(monkeypatch):
    """Its support is that of LR, and the matrix depends on no target: no column is multiplied for its first refit."""
    problem, gram, columns = pruning_problem(10, 60, 20, seed=1, dtype=torch.float64), DenseFactor.gram, []

    def counted(self, scale):
        columns.append(int(scale.count_nonzero()))
        return gram(self, scale)

    monkeypatch.setattr(DenseFactor, "gram", counted)
    LR(**FIXED, iterations=1).solve(problem, generator())
    before = len(columns)
    EWR(epsilon=0.2, anchor=0.5, **FIXED, iterations=1).solve(problem, generator())
    assert columns[:before] == columns[before : 2 * before]
    assert all(0 < count < 20 for count in columns[2 * before :])


@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("anchor", [0.3, 1.0])
def test_algorithm_1_is_the_papers_steps_one_plan_each(gradient, anchor):
    problem = pruning_problem(30, 60, 20, seed=2, dtype=torch.float64)
    pairing = pairing_regression(problem, 0.05, 1.0, "identity")
    support = top_k(problem.reference.abs(), 20)
    w = hard_threshold(problem.reference, support)
    for _ in range(3):
        x = pairing.factor.matvec(w)
        plan = transport_plan(x, pairing.target, 0.1 * mean_cost(x, pairing.target), anchor=anchor).plan
        objective = replace(pairing, target=barycentric_target(plan, pairing.target))
        if gradient == "paper":
            values, vectors = torch.linalg.eigh(15 * (plan + plan.T))
            objective = replace(pairing, smoothing=vectors @ values.clamp(min=0).diag() @ vectors.T)
        step = two_regime_step(objective, w, support)
        w, support = step.weights, step.support
    method = EWR(solver="algorithm1", epsilon=0.1, anchor=anchor, ridge=0.05, gradient=gradient, couplings=3)
    solution = method.solve(problem, generator())
    torch.testing.assert_close(solution.weights, w)
    assert solution.iterations == 3
    assert solution.evidence["epsilon"] > 0 and "plan_converged" not in solution.evidence


def test_algorithm_1_says_where_a_plan_does_not_converge(monkeypatch):
    unfinished = lambda *args, **options: replace(transport_plan(*args, **options), converged=False)  # noqa: E731
    monkeypatch.setattr("swap_prune.methods.ewr.transport_plan", unfinished)
    solution = EWR(solver="algorithm1", ridge=0.05).solve(pruning_problem(30, 60, 20, seed=2), generator())
    assert solution.evidence["plan_converged"] is False


def test_a_coupling_that_was_asked_for_needs_no_confirmation_and_steps_follow_it():
    """Held-out samples refuse it, and it stays: neither of its settings is 'auto'. Its own steps are taken."""
    problem = pruning_problem(30, 60, 20, seed=1, dtype=torch.float64)
    slope = torch.randn(60, generator=generator(5), dtype=torch.float64)
    problem = replace(problem, slope=lambda w, kept: slope)
    asked = {"epsilon": 0.2, "anchor": 0.5} | FIXED
    free = EWR(**asked).solve(problem, generator()).weights
    lr = LR(**FIXED).solve(problem, generator()).weights
    refusing = replace(problem, held_out=lambda w, kept: (w - lr).square())
    assert torch.equal(EWR(**asked).solve(refusing, generator()).weights, free)
    moved = EWR(**asked | {"first_order": 0.3}).solve(problem, generator())
    assert not torch.equal(moved.weights, free) and moved.evidence["first_order"] == [0.3]


@pytest.mark.parametrize("count", [1, 2])
def test_a_single_held_out_sample_has_no_error(count):
    method, evidence = EWR(), {}
    problem = replace(pruning_problem(20, 30, 10), held_out=lambda w, kept: w.square().sum().expand(count).clone())
    regression = pairing_regression(problem, 0.1, 0.1)
    fit = solve_sparse(regression, 10)
    better = replace(fit, weights=fit.weights / 2)
    assert method._earns_its_place(problem, fit, better, evidence) == (count > 1)
    assert ("held_out_gain_error" in evidence) == (count > 1)


def test_iterations_are_those_asked_for():
    problem = pruning_problem(40, 60, 12, seed=0, dtype=torch.float64)
    fixed = FIXED | {"ridge": 0.01}
    one, many = (LR(**fixed, iterations=i).solve(problem, generator()) for i in (1, 10))
    assert one.iterations == 1 < many.iterations and not one.converged
    assert many.evidence["objective"] < one.evidence["objective"]


def test_without_an_anchor_nothing_is_held_out_for_epsilon():
    fixed = {"ridge": 0.1, "damping": 1.0, "metric": "diagonal", "first_order": 0.0}
    assert not EWR(anchor=0, **fixed).needs_held_out and not EWR(anchor=0.0, epsilon=1.0, **fixed).needs_held_out
    assert EWR(anchor=0.5, **fixed).needs_held_out and EWR(anchor=0).needs_held_out
    assert not EWR(anchor=0.5, epsilon=1.0, **fixed).needs_held_out


def test_a_plan_that_has_not_converged_is_reported(monkeypatch):
    problem = pruning_problem(30, 60, 20, seed=1, dtype=torch.float64)
    method = EWR(epsilon=0.2, anchor=0.5, **FIXED)
    assert "plan_converged" not in method.solve(problem, generator()).evidence
    plans_of = tuning.plans_of
    short = lambda *parts: [replace(plan, converged=False) for plan in plans_of(*parts)]  # noqa: E731
    monkeypatch.setattr("swap_prune.methods.ewr.plans_of", short)
    assert method.solve(problem, generator()).evidence["plan_converged"] is False


def test_an_objective_that_is_no_number_is_left_out_of_the_evidence(monkeypatch):
    monkeypatch.setattr(WeightedRidge, "value", lambda *_: float("inf"))
    problem = pruning_problem(10, 60, 20, seed=1, dtype=torch.float64)
    assert "objective" not in EWR(epsilon=0.2, anchor=0.5, **FIXED).solve(problem, generator()).evidence


@pytest.mark.parametrize("value", ["False", "no", 0, None, []])
def test_debias_is_a_truth_value(value: object) -> None:
    with pytest.raises(ValueError, match="debias must be true or false"):
        EWR(debias=value)


def test_the_objective_that_is_reported_is_that_of_the_regression_before_the_steps():
    problem = pruning_problem(30, 60, 20, seed=1, dtype=torch.float64)
    slope = torch.randn(60, generator=generator(5), dtype=torch.float64)
    problem = replace(problem, slope=lambda w, kept: slope)
    asked = {"epsilon": 0.2, "anchor": 0.5} | FIXED
    still, moved = (EWR(**asked | {"first_order": step}).solve(problem, generator()) for step in (0.0, 0.3))
    assert not torch.equal(moved.weights, still.weights)
    assert moved.evidence["objective"] == pytest.approx(still.evidence["objective"])
