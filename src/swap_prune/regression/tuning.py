"""Couplings as regressions, and the choice among them on held-out rows.

A coupling turns the regression of LR into that of EWR: it replaces the target (exact gradient) or smooths the
residual (paper's gradient). Which one to use is decided by rows that the weights were not fitted to: a part of the rows
is set aside, every candidate refits the weights on the rest, and the one whose change of the weights the held-out
gradients feel least, ``mean_i (g_i . (w - w_bar))^2 / 2``, is taken. The support and the metric are those of all
rows. LR is a candidate, and stays unless it is beaten by more than one standard error of the paired difference.

No weights are needed for that. With ``K = G_s M^-1 G_s^T`` and v of the refit (:mod:`swap_prune.regression.objective`),
``G w = G_s w_bar_s + K v`` on any rows, held out or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from swap_prune.fisher.factor import SubFactor
from swap_prune.regression.iht import hard_threshold
from swap_prune.regression.objective import Refit, WeightedRidge
from swap_prune.regression.square import SquareSystem
from swap_prune.transport import TransportPlan, barycentric_target, relaxed_target, squared_cost, transport_plan

__all__ = ["Coupling", "choose_coupling", "couple", "mean_cost", "plans_of"]

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
        relaxation: tau > 0, in the unit of the cost: how much it costs to drop mass; infinite where none may be.
    """

    anchor: float
    epsilon: float
    gradient: Literal["exact", "paper"] = "exact"
    debias: bool = True
    relaxation: float = math.inf

    @property
    def is_pairing(self) -> bool:
        """Whether the regression is that of LR."""
        return self.anchor == 0 and self.relaxation == math.inf


def mean_cost(x: Tensor, y: Tensor) -> float:
    """Return the mean of ``(x_i - y_j)^2`` over all pairs; 1 if it is zero."""
    mean = float(squared_cost(x, y).mean())
    return mean if mean > 0 else 1.0


def plans_of(pairing: WeightedRidge, x: Tensor, coupling: Coupling) -> list[TransportPlan]:
    """Return the plan between x and y, and that of x on itself where the target is debiased by it."""
    ends = [pairing.target]
    if coupling.gradient == "exact" and coupling.debias and coupling.anchor > 0 and coupling.relaxation == math.inf:
        ends.append(x)
    return [
        transport_plan(
            x,
            end,
            coupling.epsilon,
            anchor=coupling.anchor,
            relaxation=coupling.relaxation,
            tolerance=_PLAN_TOLERANCE,
        )
        for end in ends
    ]


def couple(
    pairing: WeightedRidge, x: Tensor, coupling: Coupling, plans: Sequence[TransportPlan] | None = None
) -> WeightedRidge:
    """Return the regression of EWR at x with its plan fixed.

    Args:
        pairing: The regression of LR; its target is y.
        x: ``G w`` at the current weights, (n,).
        coupling: Anchor, eps and gradient.
        plans: Those of :func:`plans_of`, where they are known already.

    Returns:
        The same regression with the barycentric target, debiased as in the Sinkhorn divergence
        (``T_xy(x) - T_xx(x) + x``; Feydy et al., 2019), or with residuals smoothed by ``n P``, of which the
        symmetric positive part is taken, so that there is a minimum. Where mass may be dropped, residuals count by what
        is left of it: ``S = n diag(P 1)``; such targets are not debiased.
    """
    y = pairing.target
    plan, *itself = (found.plan for found in plans or plans_of(pairing, x, coupling))
    if coupling.gradient == "paper":
        values, vectors = torch.linalg.eigh((plan + plan.T) * (len(y) / 2))
        smoothing = (vectors * values.clamp(min=0)) @ vectors.T
        return replace(pairing, smoothing=smoothing.to(y.dtype))
    if coupling.relaxation < math.inf:
        target, mass = relaxed_target(plan, y)
        return replace(pairing, target=target, smoothing=torch.diag(mass))
    target = barycentric_target(plan, y)
    for own in itself:
        target = target - barycentric_target(own, x) + x
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
    relaxation: float = math.inf,
    known: Refit | None = None,
) -> tuple[Coupling, dict[str, Any]]:
    """Choose anchor and eps on held-out rows; the pairing (anchor 0) is always a candidate.

    Args:
        pairing: The regression of LR; its target is y.
        support: The kept weights of its solution, (k,): candidates are refitted on it.
        generator: Draws the held-out rows.
        anchors: Candidates for a, or None for the default grid.
        epsilons: Candidates for eps in the unit of the cost, or None for a grid around the mean cost.
        gradient: The gradient that will be used.
        debias: Whether targets are debiased.
        relaxation: tau of the candidates.
        known: The refit on this support, where there is one: no pass over G is then needed for k > n.

    Returns:
        The coupling, and the evidence for the report.
    """
    n = pairing.factor.shape[0]
    lone = Coupling(0.0, epsilons[0] if epsilons else 1.0, gradient, debias)
    if n < 8:
        return lone, {"coupling": f"pairing: {n} rows are too few to hold any out"}
    order = torch.randperm(n, generator=generator, device="cpu")[:TUNING_ROWS].to(support.device)
    kept = order[round(_HELD_OUT * len(order)) :]
    by_products = pairing.factor.iterative or pairing.penalty == 0  # without a ridge K may be singular
    rows = pairing.factor.rows(kept) if by_products else SubFactor(pairing.factor, kept)
    fitting = replace(pairing, factor=rows, target=pairing.target[kept])
    fits = _passes(pairing, support, order) if by_products else _refits(pairing, support, order, known)
    moved, x = fits(fitting)
    baseline = moved.square() / 2
    unit = mean_cost(x, fitting.target)
    best, best_loss, best_margin = lone, baseline, 0.0
    for anchor in anchors or (_ANCHORS if relaxation == math.inf else (0.0, *_ANCHORS)):
        for epsilon in epsilons or tuple(unit * e for e in _EPSILONS):
            candidate = Coupling(anchor, epsilon, gradient, debias, relaxation)
            losses = fits(couple(fitting, x, candidate))[0].square() / 2
            gain = baseline - losses
            margin = float(gain.mean() - gain.std() / len(gain) ** 0.5)
            if margin > best_margin:
                best, best_loss, best_margin = candidate, losses, margin
    evidence = {
        "coupling": "held-out rows favour it" if not best.is_pairing else "held-out rows favour the pairing",
        "held_out_loss": float(best_loss.mean()),
        "held_out_loss_pairing": float(baseline.mean()),
    }
    return best, evidence


_Fits = Callable[[WeightedRidge], tuple[Tensor, Tensor]]
"""Maps a regression on the kept rows to ``G (w - w_bar)`` on those held out, and ``G w`` on those kept, w its refit."""


def _refits(pairing: WeightedRidge, support: Tensor, order: Tensor, known: Refit | None) -> _Fits:
    """Return refits on rows, those held out first, from the Gram matrix of all of them; sums are in float64."""
    gram, start = (part.index_select(0, order) for part in _without_change(pairing, support, known))
    gram, start = gram.index_select(1, order).double(), start.double()
    count, y = round(_HELD_OUT * len(order)), pairing.target[order].double()

    def fits(regression: WeightedRidge) -> tuple[Tensor, Tensor]:
        own, residual = gram[count:, count:], regression.target.double() - start[count:]
        smoothing = None if regression.smoothing is None else regression.smoothing.double()
        system = own.clone() if smoothing is None else smoothing @ own
        system.diagonal().add_(regression.penalty)
        right = residual if smoothing is None else smoothing @ residual
        x = start + gram[:, count:] @ SquareSystem.of(system, symmetric=smoothing is None).solve(right)
        return x[:count] - y[:count], x[count:].to(regression.target.dtype)

    return fits


def _without_change(pairing: WeightedRidge, support: Tensor, known: Refit | None) -> tuple[Tensor, Tensor]:
    """Return ``G_s M^-1 G_s^T``, (n, n), and ``G_s w_bar_s``, (n,)."""
    if len(support) <= pairing.factor.shape[0]:
        columns = pairing.factor.columns(support).double()
        return (columns / pairing.metric[support]) @ columns.T, columns @ pairing.reference[support].double()
    refit = pairing.refit(support) if known is None else known
    assert refit.gram is not None, "only products are known of factors that iterate"
    if refit.fitted is None or refit.dual is None:
        return refit.gram.matrix, pairing.factor.matvec(hard_threshold(pairing.reference, support))
    return refit.gram.matrix, refit.fitted - refit.gram.matrix @ refit.dual


def _passes(pairing: WeightedRidge, support: Tensor, order: Tensor) -> _Fits:
    """Return the function that fits couplings, from products with G."""
    held_out = pairing.factor.rows(order[: round(_HELD_OUT * len(order))])

    def fits(regression: WeightedRidge) -> tuple[Tensor, Tensor]:
        w = regression.refit(support).weights
        return held_out.matvec(w - pairing.reference), regression.factor.matvec(w)

    return fits
