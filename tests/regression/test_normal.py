"""The matrix of the k equations, carried from support to support, against its definition."""

from __future__ import annotations

import pytest
import torch

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.iht import path_sizes, solve_sparse
from swap_prune.regression.normal import NormalMatrix
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights
from tests.cases import generator, random_regression

SUPPORTS = {
    "the same": [0, 2, 3, 7, 9],
    "fewer": [0, 3, 9],
    "more": [0, 1, 2, 3, 7, 9, 29],
    "exchanged": [0, 1, 3, 9, 28],
    "others": [1, 4, 5, 28, 29],
    "none": [],
}


def check(normal: NormalMatrix, problem: WeightedRidge, support: torch.Tensor) -> None:
    columns = problem.factor.columns(support)
    smooth = columns if problem.smoothing is None else problem.smoothing @ columns
    assert torch.equal(normal.support, support)
    assert torch.equal(normal.columns, columns.T) and normal.columns.is_contiguous()
    torch.testing.assert_close(normal.matrix, columns.T @ smooth)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("indices", SUPPORTS.values(), ids=SUPPORTS)
def test_what_is_carried_over_is_what_is_computed(indices: list[int], smoothed: bool) -> None:
    problem = random_regression(12, 30, generator(0), smoothed=smoothed)
    first, support = torch.tensor(SUPPORTS["the same"]), torch.tensor(indices, dtype=torch.long)
    known = NormalMatrix.of(problem.factor, first, problem.smoothing)
    check(known, problem, first)
    check(NormalMatrix.of(problem.factor, support, problem.smoothing, known), problem, support)
    check(known, problem, first)


def test_what_another_smoothing_has_made_is_not_carried_over() -> None:
    problem = random_regression(12, 30, generator(0), smoothed=True)
    support = torch.tensor([1, 4, 8])
    plain = NormalMatrix.of(problem.factor, support, None)
    check(NormalMatrix.of(problem.factor, support, problem.smoothing, plain), problem, support)


def test_a_path_and_swaps_copy_each_column_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the path's first support that has at most n weights, and later those that enter."""
    problem = random_regression(40, 120, generator(3), ridge=0.01)
    copied, tried, columns = [], [], DenseFactor.columns

    def counted(self: DenseFactor, index: torch.Tensor) -> torch.Tensor:
        copied.append(len(index))
        return columns(self, index)

    monkeypatch.setattr(DenseFactor, "columns", counted)
    fit = solve_sparse(problem, 16, max_iterations=0)
    first, *_, last = path_sizes(problem.reference, 16)
    assert copied == [first] and last < first <= 40
    monkeypatch.setattr(WeightedRidge, "refit", lambda *_: tried.append(1))
    after = swap_weights(problem, fit, max_batches=50)
    assert after.swaps > 0 and not tried and max(copied[1:]) < 16
    assert after.value == pytest.approx(problem.value(after.weights), rel=1e-9) and after.value < fit.value
