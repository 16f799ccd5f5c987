"""Couplings as regressions, and the choice among them on held-out rows.

A coupling turns the regression of LR into that of EWR: it replaces the target (exact gradient) or smooths the
residual (paper's gradient). Which one to use is decided by data that the fit has not seen: a part of the rows is
set aside, every candidate refits the weights on the rest, and the one whose change of the weights the held-out
gradients feel least, ``mean_i (g_i . (w - w_bar))^2 / 2``, is taken. LR is a candidate, and stays unless it
is beaten by more than one standard error of the paired difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from swap_prune.regression.objective import WeightedRidge
from swap_prune.transport import barycentric_target, squared_cost, transport_plan

__all__ = ["Coupling", "choose_coupling", "couple", "mean_cost"]

_HELD_OUT = 0.25
TUNING_ROWS = 256  # a plan costs n^2; the choice does not need all rows
_ANCHORS = (0.1, 1.0)
_EPSILONS = (0.1, 1.0)  # in units of the mean cost
_PLAN_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Coupling:
    """How x is matched with y.

    Attributes:
        anchor: a in [0, 1]; 0 is the pairing.
        epsilon: eps > 0, in the unit of the cost.
        gradient: ``exact`` or ``paper``.
        debias: Whether the target is debiased.
    """

    anchor: float
    epsilon: float
    gradient: Literal["exact", "paper"] = "exact"
    debias: bool = True


def mean_cost(x: Tensor, y: Tensor) -> float:
    """Return the mean of ``(x_i - y_j)^2`` over all pairs; 1 if it is zero."""
    mean = float(squared_cost(x, y).mean())
    return mean if mean > 0 else 1.0


def couple(pairing: WeightedRidge, x: Tensor, coupling: Coupling) -> WeightedRidge:
    """Return the regression of EWR at x with its plan fixed.

    Args:
        pairing: The regression of LR; its target is y.
        x: ``G w`` at the current weights, (n,).
        coupling: Anchor, eps and gradient.

    Returns:
        The same regression with the barycentric target, debiased as in the Sinkhorn divergence
        (``T_xy(x) - T_xx(x) + x``; Feydy et al., 2019), or with residuals smoothed by ``n P``, of which the
        symmetric positive part is taken, so that there is a minimum.
    """
    y = pairing.target
    plan = transport_plan(x, y, coupling.epsilon, anchor=coupling.anchor, tolerance=_PLAN_TOLERANCE).plan
    if coupling.gradient == "paper":
        values, vectors = torch.linalg.eigh((plan + plan.T) * (len(y) / 2))
        smoothing = (vectors * values.clamp(min=0)) @ vectors.T
        return replace(pairing, smoothing=smoothing.to(y.dtype))
    target = barycentric_target(plan, y)
    if coupling.debias and coupling.anchor > 0:
        itself = transport_plan(x, x, coupling.epsilon, anchor=coupling.anchor, tolerance=_PLAN_TOLERANCE).plan
        target = target - barycentric_target(itself, x) + x
    return replace(pairing, target=target)


def choose_coupling(
    pairing: WeightedRidge,
    support: Tensor,
    generator: torch.Generator,
    anchors: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    *,
    gradient: Literal["exact", "paper"] = "exact",
    debias: bool = True,
) -> tuple[Coupling, dict[str, Any]]:
    """Choose anchor and eps on held-out rows; the pairing (anchor 0) is always a candidate.

    Args:
        pairing: The regression of LR.
        support: The kept weights of its solution, (k,): candidates are refitted on it.
        generator: Draws the held-out rows.
        anchors: Candidates for a, or None for the default grid.
        epsilons: Candidates for eps in the unit of the cost, or None for a grid around the mean cost.
        gradient: The gradient that will be used.
        debias: Whether targets are debiased.

    Returns:
        The coupling, and the evidence for the report.
    """
    n = pairing.factor.shape[0]
    lone = Coupling(0.0, epsilons[0] if epsilons else 1.0, gradient, debias)
    if n < 8:
        return lone, {"coupling": f"pairing: {n} rows are too few to hold any out"}
    order = torch.randperm(n, generator=generator, device="cpu")[:TUNING_ROWS].to(support.device)
    held_out = pairing.factor.rows(order[: round(_HELD_OUT * len(order))])
    kept = order[round(_HELD_OUT * len(order)) :]
    fitting = replace(pairing, factor=pairing.factor.rows(kept), target=pairing.target[kept])

    def loss(regression: WeightedRidge) -> tuple[Tensor, Tensor]:
        w = regression.refit(support).weights
        return held_out.matvec(w - pairing.reference).square() / 2, w

    baseline, w = loss(fitting)
    x = fitting.factor.matvec(w)
    unit = mean_cost(x, fitting.target)
    best, best_loss, best_margin = lone, baseline, 0.0
    for anchor in anchors or _ANCHORS:
        for epsilon in epsilons or tuple(unit * e for e in _EPSILONS):
            candidate = Coupling(anchor, epsilon, gradient, debias)
            losses, _ = loss(couple(fitting, x, candidate))
            gain = baseline - losses
            margin = float(gain.mean() - gain.std() / len(gain) ** 0.5)
            if margin > best_margin:
                best, best_loss, best_margin = candidate, losses, margin
    evidence = {
        "coupling": "held-out rows favour it" if best.anchor > 0 else "held-out rows favour the pairing",
        "held_out_loss": float(best_loss.mean()),
        "held_out_loss_pairing": float(baseline.mean()),
    }
    return best, evidence
