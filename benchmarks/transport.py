"""How long does a transport plan take, and how long POT's Sinkhorn for the same one?

    pip install pot
    python benchmarks/transport.py [--n 200 1000] [--json]

Two clouds on a line that are close to each other pair by pair, as G w and G w_bar are; eps is in units of the mean
cost. Ours stops where no column sum of the plan is wrong by more than a share of 1e-6, POT where their root mean square
is no larger, or after 2,000 iterations; *error* is the largest share by which a row's or a column's sum is wrong then.
Both have warmed up, and take turns; ours makes its cost from the clouds, POT is given one. The anchored problem is the
plain one with the cost ``C - eps log R``.
"""

from __future__ import annotations

import argparse
import json

import ot
import torch
from timing import best_times
from torch import Tensor

from swap_prune.transport import TransportPlan, squared_cost, transport_plan

_TOLERANCE = 1e-6
_ITERATIONS = 2_000  # of POT
_REPEATS = 5  # a call of ours may be shorter than what a busy machine takes away at once
_ANCHORS = (0.1, 1.0)
_EPSILONS = (0.001, 0.01, 0.1, 1.0)


def largest_error(plan: Tensor) -> float:
    """Return the largest relative error of a row's or a column's sum."""
    return max(float((plan.sum(side) * len(plan) - 1).abs().max()) for side in (0, 1))


def measure(n: int, epsilon: float, anchor: float) -> dict[str, float]:
    """Measure one problem."""
    state = torch.Generator().manual_seed(0)
    y = torch.randn(n, generator=state, dtype=torch.float64)
    x = y + 0.3 * torch.randn(n, generator=state, dtype=torch.float64)
    cost, eye = squared_cost(x, y), torch.eye(n, dtype=torch.float64)
    eps = epsilon * float(cost.mean())
    reference = (1 - anchor) * eye / n + anchor / n**2
    mass, anchored = torch.full((n,), 1 / n, dtype=torch.float64), cost - eps * (n**2 * reference).log()

    def ours() -> TransportPlan:
        return transport_plan(x, y, eps, anchor=anchor, tolerance=_TOLERANCE)

    def pot() -> Tensor:
        plan: Tensor = ot.bregman.sinkhorn_log(
            mass, mass, anchored, reg=eps, numItermax=_ITERATIONS, stopThr=_TOLERANCE / n**0.5, warn=False
        )
        return plan

    found, plan = ours(), pot()  # which warms up
    seconds, theirs = best_times([ours, pot], _REPEATS, warm=True)
    return {
        "n": n,
        "epsilon": epsilon,
        "anchor": anchor,
        "seconds": seconds,
        "steps": found.iterations,
        "residual": found.residual,
        "pot_seconds": theirs,
        "pot_residual": largest_error(plan),
        "times_as_fast": theirs / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", nargs="+", type=int, default=(200, 1000), help="samples")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of the table")
    options = parser.parse_args()
    rows = [measure(n, epsilon, anchor) for n in options.n for anchor in _ANCHORS for epsilon in _EPSILONS]
    if options.json:
        print(json.dumps(rows))
        return
    print("| n | anchor | eps | ms | steps | error | POT, ms | POT, error | times as fast |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        problem = f"| {row['n']} | {row['anchor']:g} | {row['epsilon']:g} "
        ours = f"| {1000 * row['seconds']:.0f} | {row['steps']} | {row['residual']:.0e} "
        theirs = f"| {1000 * row['pot_seconds']:.0f} | {row['pot_residual']:.0e} | {row['times_as_fast']:.1f} |"
        print(problem + ours + theirs)


if __name__ == "__main__":
    main()
