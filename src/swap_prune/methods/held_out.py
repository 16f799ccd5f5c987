"""What held-out samples say of a candidate: the losses on them, and whether it gains by them beside another.

Place in the pipeline: every choice of LR and EWR.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swap_prune.problem import PruningProblem
from swap_prune.regression.iht import SparseFit

__all__ = ["gains", "held_out_losses", "is_significant", "loss_floor", "mean_loss"]


def held_out_losses(problem: PruningProblem, fit: SparseFit) -> Tensor:
    """Return the network's losses on held-out samples with the weights of a fit, (n_v,)."""
    assert problem.held_out is not None, "the caller checks"
    return problem.held_out(fit.weights, fit.kept())


def loss_floor(problem: PruningProblem, losses: Tensor) -> float:
    """Return what losses on held-out samples, (n_v,), are taken not to fall below.

    That is 0 where the loss knows its curvature and its mean is above that. The zero of a plain function may mean
    nothing (a log density, a reward, a constant added): of it the lowest loss is as low as losses go.
    """
    known = losses.double()[losses.isfinite()]
    if len(known) == 0 or (problem.blank is not None and float(known.mean()) > 0):
        return 0.0
    return float(known.min())


def gains(before: Tensor, after: Tensor) -> Tensor:
    """Return by how much losses on held-out samples have fallen, (n_v,), float64.

    One that is not a number counts as infinite. A sample that is lost before and after has gained nothing.
    """
    before, after = (losses.double().masked_fill(losses.isnan(), math.inf) for losses in (before, after))
    return torch.where(before == after, 0.0, before - after)


def is_significant(gain: Tensor, errors: float = 1.0) -> bool:
    """Whether the mean of paired gains on held-out samples, (n_v,), is above so many of its standard errors.

    A sample whose loss is infinite no longer is a gain whatever the others say.
    """
    if math.isinf(float(gain.mean())):
        return bool(gain.mean() > 0)
    return len(gain) > 1 and bool(gain.mean() > errors * gain.std() / len(gain) ** 0.5)


def mean_loss(losses: Tensor) -> float:
    """Return the mean of losses, (n_v,), infinite when it is not a number; those in 16 bits have no such mean."""
    mean = float(losses.double().mean())
    return mean if math.isfinite(mean) else math.inf
