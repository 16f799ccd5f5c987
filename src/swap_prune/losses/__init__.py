"""Per-sample losses: classes, tokens, numbers, self-distillation; and the checks of those that a caller brings.

What a loss has to give is in :mod:`~swap_prune.losses.base`, the checks are in :mod:`~swap_prune.losses.checks`, and
:mod:`~swap_prune.losses.failures` names what one fails on.
"""

from swap_prune.losses.base import CrossEntropy, GaussNewtonLoss, LossFn, cross_entropy
from swap_prune.losses.checks import (
    check_calibration,
    check_divergence,
    check_independence,
    check_labels,
    check_losses,
    check_pair,
    least_precise,
)
from swap_prune.losses.failures import describe, errors_worded, failures_named, run_loss

__all__ = [
    "CrossEntropy",
    "GaussNewtonLoss",
    "LossFn",
    "check_calibration",
    "check_divergence",
    "check_independence",
    "check_labels",
    "check_losses",
    "check_pair",
    "cross_entropy",
    "describe",
    "errors_worded",
    "failures_named",
    "least_precise",
    "run_loss",
]
