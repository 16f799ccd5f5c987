"""What does one solve cost, in passes over G and in time? How does it grow with p and n?

    python benchmarks/solver.py [--device cuda] [--storage bfloat16] [--sizes 500x30000 1024x25600000] [--json]

G is random with columns of very different size, as those of a network are; keep is a tenth of the weights; ridge and
damping are fixed, so that one regression is solved. A pass is one product with all of G; columns that are copied or
multiplied count as their share of one. There are two floors: the number of passes times the measured time of ``G @ w``,
and times what it takes to read G at the speed of a large copy. Matrix products with few columns do more arithmetic than
they read, which is why the ratios are above 1 for many rows.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from timing import best_time
from torch import Tensor

from swap_prune.fisher.backends.half import HalfFactor
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.regression.iht import solve_sparse
from swap_prune.regression.metric import diagonal_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights

_SIZES = ("500x30000", "1000x30000", "500x60000", "500x300000", "64x300000", "64x2600000")
_STORAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPIED = {"cpu": 2**28, "cuda": 2**32}  # bytes of the copy that measures bandwidth


class CountedFactor:
    """A Fisher factor that counts the passes made over it; what is not counted is the factor's own."""

    def __init__(self, whole: FisherFactor) -> None:
        self.whole, self.passes = whole, list[float]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def matvec(self, w: Tensor) -> Tensor:
        """Return ``G w``."""
        self.passes.append(1.0)
        return self.whole.matvec(w)

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return ``G^T v``."""
        self.passes.append(1.0)
        return self.whole.rmatvec(v)

    def diagonal(self) -> Tensor:
        """Return f."""
        self.passes.append(1.0)
        return self.whole.diagonal()

    def columns(self, index: Tensor) -> Tensor:
        """Return some columns."""
        self.passes.append(len(index) / self.shape[1])
        return self.whole.columns(index)

    def exact_columns(self, index: Tensor) -> Tensor:
        """Return some columns."""
        self.passes.append(len(index) / self.shape[1])
        return getattr(self.whole, "exact_columns", self.whole.columns)(index)  # type: ignore[no-any-return]

    def gram(self, scale: Tensor) -> Tensor:
        """Return ``G diag(scale) G^T``."""
        self.passes.append(int(scale.count_nonzero()) / self.shape[1])
        return self.whole.gram(scale)


def random_factor(n: int, p: int, dtype: torch.dtype, state: torch.Generator) -> FisherFactor:
    """Draw G on the device of a random state, row by row: beside it there is room for little."""
    place = state.device
    scale = torch.logspace(-2, 1, p, device=place)[torch.randperm(p, generator=state, device=place)]
    matrix = torch.empty(n, p, dtype=dtype, device=place)
    for row in matrix:
        row.copy_(torch.randn(p, generator=state, device=place) * scale)
    if dtype == torch.float32:
        return DenseFactor(matrix)
    return HalfFactor(matrix, torch.ones(n, device=place))


def measure(n: int, p: int, device: str = "cpu", storage: str = "float32") -> dict[str, float]:
    """Measure one size."""
    place = torch.device(device)
    state = torch.Generator(place).manual_seed(0)
    dtype = _STORAGES[storage]
    factor = CountedFactor(random_factor(n, p, dtype, state))
    w_bar = torch.randn(p, generator=state, device=place) / factor.whole.diagonal().sqrt().sqrt()

    def solve() -> None:
        factor.passes.clear()
        f = factor.diagonal()
        problem = WeightedRidge(factor, factor.matvec(w_bar), w_bar, 0.025, diagonal_metric(f, 1.0))
        swap_weights(problem, solve_sparse(problem, p // 10), diagonal=f)

    seconds = best_time(solve, device=place)
    passes = sum(factor.passes)
    one = best_time(lambda: factor.whole.matvec(w_bar), 10, place)
    back = best_time(lambda: factor.whole.rmatvec(factor.whole.matvec(w_bar)), 10, place) - one
    source = torch.ones(_COPIED[place.type], dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / best_time(lambda: target.copy_(source), 10, place)
    read = n * p * dtype.itemsize / rate
    return {
        "n": n,
        "p": p,
        "seconds": seconds,
        "passes": passes,
        "pass_seconds": one,
        "transposed_seconds": back,
        "copy_gb_per_second": rate / 1e9,
        "read_seconds": read,
        "over_floor": seconds / (passes * one),
        "over_read_floor": seconds / (passes * read),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=_SIZES, help="n x p, such as 500x30000")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--storage", default="float32", choices=list(_STORAGES))
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of the table")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    rows = [measure(n, p, options.device, options.storage) for n, p in sizes]
    if options.json:
        print(json.dumps(rows))
        return
    print("| n | p | seconds | passes | G w, ms | G^T v, ms | reading G, ms | over passes of G w | over reading |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"| {row['n']} | {row['p']} | {row['seconds']:.3f} | {row['passes']:.1f} "
        times = " | ".join(f"{1000 * row[key]:.1f}" for key in ("pass_seconds", "transposed_seconds", "read_seconds"))
        print(sizes + f"| {times} | {row['over_floor']:.1f} | {row['over_read_floor']:.1f} |")


if __name__ == "__main__":
    main()
