"""Is our regression solved better than by the LR paper's public code, and in what time?

    git clone https://github.com/mazumder-lab/CHITA
    pip install numba scikit-learn                                     # what that code needs
    export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
    python benchmarks/public_lr.py --code CHITA --weights mlpnet_mnist.safetensors --data-dir DIR

Both minimise the same Q at the same G, y, k and ridge, in the metric of ones::

    Q(w) = 1/2 ||G w - y||^2 + n lam / 2 ||w - w_bar||^2,    at most k weights non-zero

``refit`` is the largest k of ``|w_bar|`` refitted exactly once, ``ours`` what the package does: a path of k, hard
thresholding with refits, swaps. G are per-sample gradients of MLPNet's cross-entropy on MNIST. That code runs in
float64, as it does by itself, ours in float32; Q is evaluated in float64. Neither its just-in-time compilation nor the
conversion of G is counted. They take turns. One thread, which numpy and numba are told by the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import best_times
from torch import Tensor

from swap_prune.experiments.datasets import load_dataset
from swap_prune.experiments.zoo import build_model
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.factor import DenseFactor
from swap_prune.losses import cross_entropy
from swap_prune.regression.iht import solve_sparse
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.schedule import keep_count
from swap_prune.selection import select_parameters
from swap_prune.weights_file import load_weights

Solver = Callable[[Tensor, Tensor, int, float], Tensor]  # G (n, p), w_bar (p,), k, lam -> w (p,)

_ITERATIONS = 100  # of the public code's search, at the most; it ends by itself before


def ours(matrix: Tensor, w_bar: Tensor, keep: int, ridge: float) -> Tensor:
    """Solve with this package: hard thresholding with refits, then swaps."""
    factor = DenseFactor(matrix)
    problem = WeightedRidge(factor, factor.matvec(w_bar), w_bar, ridge, torch.ones_like(w_bar))
    return swap_weights(problem, solve_sparse(problem, keep)).weights


def refit(matrix: Tensor, w_bar: Tensor, keep: int, ridge: float) -> Tensor:
    """Refit the largest weights once, which is where our search could stop at the earliest."""
    factor = DenseFactor(matrix)
    problem = WeightedRidge(factor, factor.matvec(w_bar), w_bar, ridge, torch.ones_like(w_bar))
    return problem.refit(w_bar.abs().topk(keep).indices.sort().values).weights


def public(code: Path) -> Solver:
    """Return the public code's solver with the arguments that it gives itself (``pruners/CHITA.py``)."""
    sys.path.insert(0, str(code))
    from CHITA_opt.L0_card_const import Active_IHTCDLS_PP  # type: ignore[import-not-found]

    def solve(matrix: Tensor, w_bar: Tensor, keep: int, ridge: float) -> Tensor:
        x, beta = matrix.double().numpy(), w_bar.double().numpy()
        zeros = 0 * beta
        with contextlib.redirect_stdout(io.StringIO()):
            found = Active_IHTCDLS_PP(
                x @ beta, x, beta.copy(), keep, alpha=zeros, lambda1=0, lambda2=ridge * len(x) / 2, beta_tilde1=zeros,
                beta_tilde2=beta.copy(), L=None, iht_max_itr=_ITERATIONS, ftol=1e-7, act_max_itr=_ITERATIONS,
                buget=None, kimp=1.5, act_itr=1, cd_itr=0, ctol=1e-4, sea1_max_itr=5, sea2_max_itr=10,
            )  # fmt: skip
        return torch.from_numpy(found[0])

    return solve


def objective(matrix: Tensor, w_bar: Tensor, w: Tensor, ridge: float) -> float:
    """Return Q(w) in float64."""
    x, drift = matrix.double(), w.double() - w_bar.double()
    return float((x @ drift).square().sum() / 2 + len(x) * ridge / 2 * drift.square().sum())


def capture(weights: Path, data_dir: Path | None, samples: int) -> tuple[Tensor, Tensor]:
    """Return G (n, p) and w_bar (p,)."""
    model, _ = build_model("mlpnet")
    load_weights(model, weights)
    stream = CalibrationStream(load_dataset("mnist", data_dir).train, torch.Generator().manual_seed(0))
    selection = select_parameters(model)
    factor = capture_gradients(model, selection, stream.draw(samples), cross_entropy).factor
    assert isinstance(factor, DenseFactor)
    return factor.matrix, selection.read(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        if os.environ.get(name) != "1":
            sys.exit(f"run it with {name}=1: one thread is compared with one")
    torch.set_num_threads(1)
    matrix, w_bar = capture(options.weights, options.data_dir, options.samples)
    theirs = public(options.code)
    wide = (matrix.double(), w_bar.double())  # for the public code, which then converts nothing
    theirs(*wide, len(w_bar) // 2, 1e-2)  # compiles
    print("| sparsity | ridge | Q, public code | Q, refit | Q, ours | its seconds | refit, times as fast | ours |")
    print("|---|---|---|---|---|---|---|---|")
    for sparsity in (0.9, 0.95, 0.98):
        for ridge in (1e-4, 1e-3, 1e-2):
            setting = (keep_count(len(w_bar), sparsity), ridge)
            solves = [partial(theirs, *wide, *setting)]
            solves += [partial(solve, matrix, w_bar, *setting) for solve in (refit, ours)]
            values = [objective(matrix, w_bar, solve(), ridge) for solve in solves]
            seconds = best_times(solves, 2, warm=True)
            cells = [f"{sparsity}", f"{ridge:g}", *(f"{value:.4g}" for value in values), f"{seconds[0]:.2f}"]
            cells += [f"{seconds[0] / own:.1f}" for own in seconds[1:]]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
