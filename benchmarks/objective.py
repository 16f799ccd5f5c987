"""How low does the objective get, and when? LR, and what EWR adds to it.

    python benchmarks/objective.py [--sizes 500x30000 500x300000 64x2600000] [--json]

G, the weights and the setting are those of benchmarks/solver.py. One search: the end of the path, of hard thresholding,
of swaps. Beside it, where a search could end at the earliest: the largest weights cut out, and the same refitted. Then
what EWR does: the choice of a coupling on held-out rows, and one coupling, an anchored plan and the regression on its
target, from where LR ended. Seconds are from the beginning, of what leads to a row and of nothing else: what is only
refitted or evaluated for the table does not count. Q is LR's objective, in units of that of the largest weights
refitted; a coupling has another objective, so that this one may only rise.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from solver import random_factor
from timing import Stopwatch
from torch import Tensor

from swap_prune.fisher.factor import FisherFactor
from swap_prune.regression.iht import SparseFit, hard_threshold, shrink_support, solve_sparse
from swap_prune.regression.metric import diagonal_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights
from swap_prune.regression.top_k import top_k
from swap_prune.regression.tuning import Coupling, choose_coupling, couple, mean_cost

_SIZES = ("500x30000", "500x300000", "64x2600000")


Row = tuple[str, float, float]  # step, seconds, Q


def beside(problem: WeightedRidge, keep: int, seconds: float) -> list[Row]:
    """Cut the largest weights out, and refit them: where a search could end that has taken so many seconds."""
    watch = Stopwatch(seconds)
    largest = watch(lambda: top_k(problem.reference.square() * problem.metric, keep))
    cut = ("largest weights", watch.seconds, problem.value(hard_threshold(problem.reference, largest)))
    refit = watch(lambda: problem.refit(largest))
    return [cut, ("refitted", watch.seconds, problem.value_of(refit))]


def search(factor: FisherFactor, w_bar: Tensor, keep: int) -> list[Row]:
    """Search on one G, and note the objective after each step."""
    watch = Stopwatch()
    f = watch(factor.diagonal)
    target = watch(lambda: factor.matvec(w_bar))
    problem = watch(lambda: WeightedRidge(factor, target, w_bar, 0.025, diagonal_metric(f, 1.0)))
    rows = beside(problem, keep, watch.seconds)
    support, gram, _ = watch(lambda: shrink_support(problem, keep))
    path = Stopwatch(watch.seconds)  # hard thresholding begins with the same refit
    refit = path(lambda: problem.refit(support, gram))
    rows.append(("path", path.seconds, problem.value_of(refit)))
    del refit
    fit = watch(lambda: solve_sparse(problem, keep, start=support, previous=gram))
    rows.append(("thresholding", watch.seconds, fit.value))
    fit = watch(lambda: swap_weights(problem, fit, diagonal=f))
    rows.append(("swaps", watch.seconds, fit.value))
    return rows + coupled(problem, fit, watch)


def coupled(problem: WeightedRidge, fit: SparseFit, watch: Stopwatch) -> list[Row]:
    """Go on as EWR does, from the fit of LR and what is known of it."""
    state = torch.Generator().manual_seed(0)
    watch(lambda: choose_coupling(problem, fit.support, state, known=fit.refit))
    choice = ("ewr: choice", watch.seconds, fit.value)

    def regress() -> SparseFit:
        known = fit.refit
        x = problem.factor.matvec(fit.weights) if known is None or known.fitted is None else known.fitted
        regression = couple(problem, x, Coupling(0.1, 0.01 * mean_cost(x, problem.target)))
        gram = None if known is None else known.gram
        return solve_sparse(regression, len(fit.support), start=fit.support, previous=gram)

    weights = watch(regress).weights
    return [choice, ("ewr: coupled", watch.seconds, problem.value(weights))]


def measure(n: int, p: int) -> list[dict[str, Any]]:
    """Search on one G, once to warm up and once to count."""
    state = torch.Generator().manual_seed(0)
    factor = random_factor(n, p, torch.float32, state)
    w_bar = torch.randn(p, generator=state) / factor.diagonal().sqrt().sqrt()
    search(factor, w_bar, p // 10)
    rows = search(factor, w_bar, p // 10)
    unit = dict((step, value) for step, _, value in rows)["refitted"]
    return [{"n": n, "p": p, "step": step, "seconds": seconds, "objective": q / unit} for step, seconds, q in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=_SIZES, help="n x p, such as 500x30000")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of the table")
    options = parser.parse_args()
    rows = [row for size in options.sizes for row in measure(*map(int, size.split("x")))]
    if options.json:
        print(json.dumps(rows))
        return
    print("| n | p | after | seconds | Q |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['n']} | {row['p']} | {row['step']} | {row['seconds']:.3f} | {row['objective']:.3f} |")


if __name__ == "__main__":
    main()
