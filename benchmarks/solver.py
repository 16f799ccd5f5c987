"""What does one solve cost, in passes over G and in time? How does it grow with p and n?

    python benchmarks/solver.py [--json]

G is random with columns of very different size, as those of a network are; keep is a tenth of the weights; ridge and
damping are fixed, so that one regression is solved. A pass is one product with all of G; columns that are copied or
multiplied count as their share of one. The floor is the number of passes times the measured time of ``G @ w``. Matrix
products with few columns do more arithmetic than they read, which is why the ratio is above 1 for many rows.
"""

from __future__ import annotations

import argparse
import json

import torch
from timing import best_time
from torch import Tensor

from swap_prune.fisher.factor import DenseFactor
from swap_prune.regression.iht import solve_sparse
from swap_prune.regression.metric import diagonal_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights

_SIZES = ((500, 30_000), (1000, 30_000), (500, 60_000), (500, 300_000), (64, 300_000), (64, 2_600_000))


class CountedFactor(DenseFactor):
    """A Fisher factor that counts the passes made over it."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        object.__setattr__(self, "passes", [])  # the base class is frozen

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``."""
        self.passes.append(1.0)
        return super().matvec(w)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``."""
        self.passes.append(1.0)
        return super().rmatvec(v)

    def diagonal(self) -> Tensor:
        """Return f."""
        self.passes.append(1.0)
        return super().diagonal()

    def columns(self, index: Tensor) -> Tensor:
        """Return some columns."""
        self.passes.append(len(index) / self.shape[1])
        return super().columns(index)

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``."""
        self.passes.append(int(scale.count_nonzero()) / self.shape[1])
        return super().gram(scale)


def measure(n: int, p: int) -> dict[str, float]:
    state = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 1, p)[torch.randperm(p, generator=state)]
    factor = CountedFactor(torch.randn(n, p, generator=state) * scale)
    w_bar = torch.randn(p, generator=state) / scale.sqrt()

    def solve() -> None:
        factor.passes.clear()
        f = factor.diagonal()
        problem = WeightedRidge(factor, factor.matvec(w_bar), w_bar, 0.025, diagonal_metric(f, 1.0))
        swap_weights(problem, solve_sparse(problem, p // 10), diagonal=f)

    seconds = best_time(solve)
    one = best_time(lambda: DenseFactor(factor.matrix).matvec(w_bar), 10)
    passes = sum(factor.passes)
    return {
        "n": n,
        "p": p,
        "seconds": seconds,
        "passes": passes,
        "pass_seconds": one,
        "over_floor": seconds / (passes * one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of the table")
    as_json = parser.parse_args().json
    rows = [measure(n, p) for n, p in _SIZES]
    if as_json:
        print(json.dumps(rows))
        return
    print("| n | p | seconds | passes | one pass, ms | seconds / (passes x one pass) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"| {row['n']} | {row['p']} | {row['seconds']:.3f} | {row['passes']:.1f} "
        print(sizes + f"| {1000 * row['pass_seconds']:.1f} | {row['over_floor']:.1f} |")


if __name__ == "__main__":
    main()
