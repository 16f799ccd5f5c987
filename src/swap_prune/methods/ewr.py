"""EWR ("SWAP"): sparse entropic Wasserstein regression (You and Cheng, ICLR 2024).

minimise  n/2 OT_eps(G w, G w_bar) + n lam/2 sum_j m_j (w_j - w_bar_j)^2   subject to  ||w||_0 <= k
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from swap_prune.checks import is_finite, true_or_false, whole_number
from swap_prune.fisher.capture.sketch import MINI_BATCH
from swap_prune.methods.contest import finite_entries, fit_pairing
from swap_prune.methods.descent import LEAST_GAIN, STEPS, step_down
from swap_prune.methods.held_out import gains, held_out_losses, is_significant, loss_floor, mean_loss
from swap_prune.methods.pairing import (
    candidates_of,
    check_regression_settings,
    chooses,
    pairing_regression,
    solution_of,
)
from swap_prune.methods.steps_again import steps_again
from swap_prune.problem import FisherKind, PruningProblem, PruningSolution, RowKind
from swap_prune.regression.iht import SparseFit, hard_threshold, solve_sparse
from swap_prune.regression.metric import Metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.top_k import top_k
from swap_prune.regression.tuning import Coupling, choose_coupling, couple, mean_cost, plans_of
from swap_prune.regression.two_regime import two_regime_step
from swap_prune.transport import transport_plan

__all__ = ["EWR"]


@dataclass(frozen=True)
class EWR:
    """Sparse entropic Wasserstein regression.

    Attributes:
        epsilon: eps, how strongly entropy regularises the plan, in units of ``epsilon_unit``; or ``"auto"``.
        ridge: lam, or ``"auto"``; see :class:`swap_prune.LR`.
        anchor: a in [0, 1], how far the plan may leave the pairing (1 is the paper, 0 is LR); or ``"auto"``.
            What is ``"auto"`` among epsilon and anchor is chosen on held-out rows and confirmed by the loss on
            held-out samples, LR among the candidates.
        epsilon_unit: ``"mean_cost"`` (the mean of the cost matrix) or ``"absolute"``.
        gradient: ``"exact"``, the envelope theorem's, or ``"paper"``, that of Algorithm 1.
        solver: ``"iht"``, hard thresholding with exact refits, or ``"algorithm1"``, the paper's steps.
        debias: Subtract the shrinkage that entropy puts on the target (exact gradient, ``iht``, no ``relaxation``;
            else it has no effect).
        fisher: As for :class:`swap_prune.LR`. The paper's is ``"empirical"``.
        couplings: How often the plan is computed anew within a stage, >= 1. With ``algorithm1`` each is one
            step; the paper takes one a stage.
        metric: As for LR. ``algorithm1`` steps in the identity metric, as the paper does.
        damping: As for LR.
        iterations: As for LR; not used by ``algorithm1``.
        swaps: As for LR; not used by ``algorithm1``.
        first_order: As for LR; not used by ``algorithm1``.
        steps: As for LR; not used by ``algorithm1``.
        floor: As for LR; ``algorithm1`` keeps to one that is fixed.
        rows: As for LR.
        mini_batch: As for LR.
        all_samples: As for LR.
        relaxation: tau > 0, in units of ``epsilon_unit``: what it costs a plan to drop the mass of samples that lie far
            from all others, which then count less (unbalanced transport; ``iht`` only; ``debias`` has no effect then).
            None: all count alike.
    """

    epsilon: float | Literal["auto"] = "auto"
    ridge: float | Literal["auto"] = "auto"
    anchor: float | Literal["auto"] = "auto"
    epsilon_unit: Literal["mean_cost", "absolute"] = "mean_cost"
    gradient: Literal["exact", "paper"] = "exact"
    solver: Literal["iht", "algorithm1"] = "iht"
    debias: bool = True
    fisher: FisherKind = "auto"
    couplings: int = 1
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
    relaxation: float | None = None

    name: ClassVar[str] = "ewr"
    needs_gradients: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_regression_settings(self)
        if self.epsilon != "auto" and not (is_finite(self.epsilon) and float(self.epsilon) >= sys.float_info.min):
            raise ValueError(f"epsilon must be 'auto' or a number of at least 2.3e-308, got {self.epsilon!r}")
        if self.anchor != "auto" and not (is_finite(self.anchor) and 0 <= float(self.anchor) <= 1):
            raise ValueError(f"anchor must be 'auto' or lie in [0, 1], got {self.anchor!r}")
        if self.relaxation is not None and not (is_finite(self.relaxation) and self.relaxation > 0):
            raise ValueError(f"relaxation must be a positive number or None, got {self.relaxation!r}")
        choices = {"epsilon_unit": ("mean_cost", "absolute"), "gradient": ("exact", "paper")}
        choices["solver"] = ("iht", "algorithm1")
        for setting, allowed in choices.items():
            if getattr(self, setting) not in allowed:
                raise ValueError(f"{setting} must be {' or '.join(map(repr, allowed))}, got {getattr(self, setting)!r}")
        true_or_false("debias", self.debias)
        if self.relaxation is not None and self.solver == "algorithm1":
            raise ValueError("relaxation needs solver='iht', got 'algorithm1', whose plan has exact marginals")
        whole_number("couplings", self.couplings)

    @property
    def needs_held_out(self) -> bool:
        """Whether a setting is chosen by the loss on held-out samples."""
        return self.solver == "iht" and (chooses(self) or self._chooses_coupling)

    @property
    def _chooses_coupling(self) -> bool:
        """Whether a coupling is chosen; without an anchor there is none, whatever epsilon."""
        return (self.anchor != 0 or self.relaxation is not None) and "auto" in (self.anchor, self.epsilon)

    @property
    def compares_rows(self) -> bool:
        """Whether rows of mini-batches are compared with those of single samples, where both may be had."""
        return self.solver == "iht" and self.first_order == "auto" and self.rows == "auto"

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Couple, regress, and repeat; with nothing to gain from coupling this is LR."""
        if problem.keep in (0, problem.reference.numel()):
            return problem.trivial_solution()
        if self.solver == "algorithm1":
            return self._algorithm_1(problem)
        paired = fit_pairing(self, problem)
        pairing, evidence = paired.regression, paired.evidence
        coupling, reason = self._coupling(pairing, paired.fit, generator)
        evidence |= reason
        fit, steps = paired.fit, paired.steps_from(problem, self)
        if not coupling.is_pairing:
            coupled, solved = self._coupled(pairing, fit, coupling)
            others = step_down(problem, pairing, coupled, self.first_order, self.steps)
            if self._earns_its_place(problem, steps.applied_to(fit), others.applied_to(coupled), evidence):
                fit, steps = coupled, others
                evidence["objective"] = pairing.value(coupled.weights)
                if not solved:
                    evidence["plan_converged"] = False
            else:
                coupling = replace(coupling, anchor=0.0, relaxation=math.inf)
                evidence["coupling"] = "held-out samples do not confirm it"
        fit, walked = steps_again(self, problem, pairing, fit, steps)
        evidence |= {"anchor": coupling.anchor, "epsilon": coupling.epsilon} | walked
        if coupling.relaxation < math.inf:
            evidence["relaxation"] = coupling.relaxation
        return solution_of(fit, finite_entries(evidence))

    def _coupled(self, pairing: WeightedRidge, fit: SparseFit, coupling: Coupling) -> tuple[SparseFit, bool]:
        """Alternate between the plan and the regression, from the fit of LR; say whether all plans converged."""
        converged = True
        for _ in range(self.couplings):
            x = _fitted(pairing, fit)
            plans = plans_of(pairing, x, coupling)
            converged = converged and all(plan.converged for plan in plans)
            regression = couple(pairing, x, coupling, plans)
            fit = solve_sparse(
                regression,
                len(fit.support),
                start=fit.support,
                previous=None if fit.refit is None else fit.refit.known,
                max_iterations=self.iterations,
            )
        return fit, converged

    def _earns_its_place(
        self, problem: PruningProblem, paired: SparseFit, coupled: SparseFit, evidence: dict[str, Any]
    ) -> bool:
        """Whether held-out samples confirm a coupling; one that was asked for, or cannot be tested, needs no test.

        A gain too small for a further step counts as none: it would change later stages and not improve this one.
        """
        if "auto" not in (self.anchor, self.epsilon) or problem.held_out is None:
            return True
        before = held_out_losses(problem, paired)
        gain = gains(before, held_out_losses(problem, coupled))
        evidence["held_out_gain"] = float(gain.mean())
        if len(gain) > 1:
            evidence["held_out_gain_error"] = float(gain.std() / len(gain) ** 0.5)
        above = mean_loss(before) - loss_floor(problem, before)
        return is_significant(gain) and float(gain.mean()) >= LEAST_GAIN * above

    def _coupling(
        self, pairing: WeightedRidge, fit: SparseFit, generator: torch.Generator
    ) -> tuple[Coupling, dict[str, Any]]:
        """Return the coupling that is asked for, or the one that held-out rows favour."""
        anchors = None if self.anchor == "auto" else (float(self.anchor),)
        epsilons, relaxation = None, math.inf
        if self.epsilon != "auto" or self.relaxation is not None:
            unit = self._unit(_fitted(pairing, fit), pairing.target)
            epsilons = None if self.epsilon == "auto" else (float(self.epsilon) * unit,)
            relaxation = math.inf if self.relaxation is None else float(self.relaxation) * unit
        if anchors and (epsilons or (anchors == (0.0,) and relaxation == math.inf)):
            epsilon = epsilons[0] if epsilons else 1.0  # which counts for nothing without an anchor
            return Coupling(anchors[0], epsilon, self.gradient, self.debias, relaxation), {}
        return choose_coupling(
            pairing,
            fit.support,
            generator,
            anchors,
            epsilons,
            gradient=self.gradient,
            debias=self.debias,
            relaxation=relaxation,
            known=fit.refit,
        )

    def _unit(self, x: Tensor, y: Tensor) -> float:
        return mean_cost(x, y) if self.epsilon_unit == "mean_cost" else 1.0

    def _algorithm_1(self, problem: PruningProblem) -> PruningSolution:
        """The paper's Algorithm 1, one stage.

        Departures from the paper's text: its stage starts at ``w = w_bar``, where its gradient is zero; here it
        starts at the hard-thresholded ``w_bar``. And its gradient ``G^T nP (G w - y)`` is that of no function, unless P
        is symmetric: here nP is replaced by its symmetric positive part (:func:`couple`), so that direction and step
        size belong to one function. With a step size of another the direction leads uphill in some stages.
        """
        diagonal = problem.fisher().diagonal()
        plain = candidates_of(replace(self, metric="identity"), diagonal)[0]
        pairing = pairing_regression(problem, *plain, diagonal=diagonal)
        support = top_k(problem.reference.abs(), problem.keep, pairing.floors, pairing.pattern)
        w = hard_threshold(problem.reference, support)
        fit = SparseFit(w, support, pairing.value(w), 0, converged=False)
        anchor = 1.0 if self.anchor == "auto" else float(self.anchor)
        evidence: dict[str, Any] = {"ridge": pairing.ridge, "anchor": anchor}
        for taken in range(self.couplings):
            x = pairing.factor.matvec(fit.weights)
            epsilon = (1.0 if self.epsilon == "auto" else float(self.epsilon)) * self._unit(x, pairing.target)
            transport = transport_plan(x, pairing.target, epsilon, anchor=anchor)
            evidence["epsilon"] = epsilon
            if not transport.converged:
                evidence["plan_converged"] = False
            coupling = Coupling(anchor, epsilon, self.gradient, debias=False)
            step = two_regime_step(couple(pairing, x, coupling, [transport]), fit.weights, fit.support)
            if step.iterations == 0:
                fit = replace(fit, iterations=taken, converged=True)
                break
            fit = replace(step, iterations=taken + 1, converged=False)
        return solution_of(fit, evidence | {"objective": pairing.value(fit.weights)})


def _fitted(pairing: WeightedRidge, fit: SparseFit) -> Tensor:
    """Return ``G w`` of a fit, (n,); its refit may know it."""
    known = None if fit.refit is None else fit.refit.fitted
    return pairing.factor.matvec(fit.weights) if known is None else known
