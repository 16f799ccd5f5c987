"""How low does the objective get, and when? LR, and what EWR adds to it.

    python benchmarks/objective.py [--sizes 500x30000 500x300000 64x2600000] [--json]

G, the weights and the setting are those of benchmarks/solver.py. One search, noted after each of its steps: the largest
weights cut out, the same refitted, the end of the path, of hard thresholding, of swaps. Then what EWR does: the choice
of a coupling on held-out rows, and one coupling, an anchored plan and the regression on its target, from where LR
ended. Seconds are from the beginning. Q is LR's objective, in units of that of the largest weights refitted; a coupling
has another objective, so that this one may only rise.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from solver import random_factor

from swap_prune.regression.iht import hard_threshold, shrink_support, solve_sparse
from swap_prune.regression.metric import diagonal_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights
from swap_prune.regression.top_k import top_k
from swap_prune.regression.tuning import Coupling, choose_coupling, couple, mean_cost

_SIZES = ("500x30000", "500x300000", "64x2600000")


def measure(n: int, p: int) -> list[dict[str, Any]]:
    """Search on one G, and note the objective after each step."""
    state = torch.Generator().manual_seed(0)
    factor = random_factor(n, p, torch.float32, state)
    w_bar = torch.randn(p, generator=state) / factor.diagonal().sqrt().sqrt()
    keep, rows = p // 10, list[dict[str, Any]]()
    for _ in range(2):  # the first warms up
        rows = []
        started = time.perf_counter()

        def note(step: str, value: float, since: float = started, into: list[dict[str, Any]] = rows) -> None:
            into.append({"n": n, "p": p, "step": step, "seconds": time.perf_counter() - since, "objective": value})

        f = factor.diagonal()
        problem = WeightedRidge(factor, factor.matvec(w_bar), w_bar, 0.025, diagonal_metric(f, 1.0))
        largest = top_k(w_bar.square() * problem.metric, keep)
        note("largest weights", problem.value(hard_threshold(w_bar, largest)))
        note("refitted", problem.value_of(problem.refit(largest)))
        support, gram, _ = shrink_support(problem, keep)
        refit = problem.refit(support, gram)
        note("path", problem.value_of(refit))
        fit = solve_sparse(problem, keep, start=support, previous=refit.gram)
        note("thresholding", fit.value)
        fit = swap_weights(problem, fit, diagonal=f)
        note("swaps", fit.value)
        choose_coupling(problem, fit.support, torch.Generator().manual_seed(0))
        note("ewr: choice", fit.value)
        x = factor.matvec(fit.weights)
        coupled = couple(problem, x, Coupling(0.1, 0.01 * mean_cost(x, problem.target)))
        note("ewr: coupled", problem.value(solve_sparse(coupled, keep, start=fit.support).weights))
    unit = rows[1]["objective"]
    return [row | {"objective": row["objective"] / unit} for row in rows]


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
