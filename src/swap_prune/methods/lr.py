"""LR: sparse ridge regression on the rows of the Fisher factor (the paper's baseline; CHITA, Benbaki et al., 2023).

minimise  1/2 ||G w - G w_bar||^2 + n lam/2 sum_j m_j (w_j - w_bar_j)^2   subject to  ||w||_0 <= k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from swap_prune.fisher.capture.sketch import MINI_BATCH
from swap_prune.methods.contest import fit_pairing
from swap_prune.methods.descent import STEPS
from swap_prune.methods.pairing import check_regression_settings, chooses, solution_of
from swap_prune.methods.steps_again import steps_again
from swap_prune.problem import FisherKind, PruningProblem, PruningSolution, RowKind
from swap_prune.regression.metric import Metric

__all__ = ["LR"]


@dataclass(frozen=True)
class LR:
    """Sparse linear regression: EWR with the plan fixed to the pairing.

    Attributes:
        fisher: Which matrix the rows of G stand for: ``"gauss-newton"``, which needs a loss that knows its curvature;
            ``"empirical"``, the paper's; or ``"auto"``: Gauss-Newton where the loss allows it.
        ridge: lam itself, which has the unit of the Fisher diagonal in the identity metric and none in the others; or
            ``"auto"``: chosen by the loss on held-out samples, where there are any.
        metric: ``m = f + damping b``, b being the mean of the Fisher diagonal f over all weights (``"diagonal"``), over
            the layer (``"layer"``), or over the output and the input of each weight (``"factored"``); ``"identity"``,
            the paper's, which is 1; or ``"auto"``, chosen together with the ridge.
        damping: c > 0; or ``"auto"``, chosen together with the ridge.
        iterations: Hard-thresholding iterations a stage at the most.
        swaps: Batches of kept and dropped weights that change places after them, at the most; 0 for none.
        first_order: Length of one natural-gradient step on the kept weights after the regression, which leaves the
            mean gradient out (0, the paper); or ``"auto"``: several in each of two metrics, as far as held-out samples
            gain.
        steps: How many these are in each metric, at the most. Each costs a backward pass over the samples, and more of
            them lead further.
        floor: Share in [0, 1) of what a layer would keep if all kept alike, which each keeps at the least (0, the
            paper); or ``"auto"``: 0, but 0.5 and 0.75 are tried where a layer would keep less and samples are held out.
        rows: Gauss-Newton rows of G where BatchNorm will be recalibrated: ``"mini-batches"``, with statistics of their
            own; ``"samples"``, with those that are stored; or ``"auto"``: mini-batches, and where much is removed
            whichever of the two leads lower on held-out samples. Elsewhere rows are those of samples.
        mini_batch: Samples of a mini-batch that makes a row, at the most, >= 2. Larger ones have statistics that are
            nearer to those of all samples, and give fewer rows.
        all_samples: Whether the steps that held-out samples have chosen are taken once more, with slopes over these
            samples as well, where no later stage asks them again.
    """

    fisher: FisherKind = "auto"
    ridge: float | Literal["auto"] = "auto"
    metric: Metric | Literal["auto"] = "auto"
    damping: float | Literal["auto"] = "auto"
    iterations: int = 10
    swaps: int = 10
    first_order: float | Literal["auto"] = "auto"
    steps: int = STEPS
    floor: float | Literal["auto"] = "auto"
    rows: RowKind = "auto"
    mini_batch: int = MINI_BATCH
    all_samples: bool = True

    name: ClassVar[str] = "lr"
    needs_gradients: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_regression_settings(self)

    @property
    def needs_held_out(self) -> bool:
        """Whether a setting is chosen by the loss on held-out samples."""
        return chooses(self)

    @property
    def compares_rows(self) -> bool:
        """Whether rows of mini-batches are compared with those of single samples, where both may be had."""
        return self.first_order == "auto" and self.rows == "auto"

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Solve the regression by iterative hard thresholding with refits."""
        if problem.keep in (0, problem.reference.numel()):
            return problem.trivial_solution()
        paired = fit_pairing(self, problem)
        steps = paired.steps_from(problem, self)
        fit, evidence = steps_again(self, problem, paired.regression, paired.fit, steps)
        return solution_of(fit, paired.evidence | evidence)
