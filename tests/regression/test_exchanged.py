"""Fits after an exchange, against refits of the support that it leads to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.exchanged import DirectFit, DualFit, fit_behind
from swap_prune.regression.iht import solve_sparse
from swap_prune.regression.objective import Refit, WeightedRidge
from swap_prune.regression.swap import swap_weights
from tests.cases import generator, random_regression


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("keep", [8, 20])
@pytest.mark.parametrize("copied", [False, True])
def test_an_exchange_leads_where_a_refit_does(copied: bool, keep: int, limit: int | None, smoothed: bool) -> None:
    problem = random_regression(12, 40, generator(1), smoothed=smoothed)
    problem = replace(problem, factor=DenseFactor(problem.factor.matrix, limit))
    support, leaving, entering = torch.arange(keep), torch.tensor([5, 0, 2, 7]), torch.tensor([39, 21, 30, 25])
    columns = problem.factor.columns(torch.cat([support[leaving], entering])) if copied else None
    start = problem.refit(support)
    fit = fit_behind(problem, support, start)
    assert isinstance(fit, DualFit) == (keep > 12) and fit.value == pytest.approx(problem.value_of(start))
    after = fit.exchanged(leaving, entering, columns)
    other = after.exchanged(torch.tensor([1]), torch.tensor([33]))
    for one, gone, come in ((after, {0, 2, 5, 7}, {39, 21, 30, 25}), (other, {0, 2, 3, 5, 7}, {39, 21, 30, 25, 33})):
        members = torch.tensor(sorted(set(range(keep)) - gone | come))
        expected, found = problem.refit(members), one.refit()
        assert one.value == pytest.approx(problem.value_of(expected), rel=1e-9)
        torch.testing.assert_close(found.weights, expected.weights)
        torch.testing.assert_close(problem.gradient_of(found), problem.gradient(expected.weights), atol=1e-9, rtol=1e-7)
    assert fit.value == pytest.approx(problem.value_of(start)), "what it began with is as it was"


def test_batches_that_are_refused_take_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the first gradient and for each batch that is accepted, none for those tried, and no Gram matrix."""
    problem = random_regression(20, 400, generator(0), ridge=0.01)
    fit = solve_sparse(problem, 200)
    passes, tried, taken, exchanged, refit = [], [], [], DualFit.exchanged, DualFit.refit

    def counted(self: DenseFactor, v: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return self.matrix.T @ v

    def watched(self: DualFit, *arguments: torch.Tensor) -> DualFit:
        tried.append(1)
        return exchanged(self, *arguments)

    def accepted(self: DualFit) -> Refit:
        taken.append(1)
        return refit(self)

    def refused(*_: object) -> None:
        raise AssertionError("no pass is needed")

    monkeypatch.setattr(DenseFactor, "rmatvec", counted)
    monkeypatch.setattr(DualFit, "exchanged", watched)
    monkeypatch.setattr(DualFit, "refit", accepted)
    for name in ("matvec", "gram"):
        monkeypatch.setattr(DenseFactor, name, refused)
    monkeypatch.setattr(WeightedRidge, "refit", refused)
    after = swap_weights(problem, fit, max_batches=50, diagonal=torch.ones(400, dtype=torch.float64))
    assert after.swaps > 4 and len(passes) == 1 + len(taken) and len(taken) < len(tried)


def test_a_support_whose_system_is_singular_is_not_taken() -> None:
    problem = random_regression(6, 20, generator(2))
    fit = fit_behind(problem, torch.arange(10), problem.refit(torch.arange(10)))
    after = fit.exchanged(torch.tensor([0]), torch.tensor([15]))
    assert not isinstance(after, DirectFit) and after.system is not None
    assert replace(after, system=replace(after.system, kind="inverse")).value == torch.inf
