"""The sparse regression that one pruning stage solves, and its answer.

Glossary of symbols, used throughout the core (You and Cheng, ICLR 2024, section 3):

======== ============ =========================================================================
symbol   shape        meaning
======== ============ =========================================================================
n        int          number of calibration rows (per-sample gradients)
p        int          number of prunable weights
k        int          number of weights that are kept
w_bar    (p,)         weights before the stage (the paper's reference)
w        (p,)         weights after the stage, at most k of them non-zero
G        (n, p)       Fisher factor; row i is the gradient of sample i's loss at ``w_bar``, or a draw from
                      its curvature (:mod:`swap_prune.fisher.capture.sketch`)
f        (p,)         diagonal of the Fisher, ``mean_i G_ij^2``
gamma    (p,)         slope: mean gradient at w of what candidates are judged by
x        (n,)         ``G w``
y        (n,)         ``G w_bar``
t        (n,)         regression target; ``y`` for LR, the barycentric projection for EWR
lam      float        ridge strength
m        (p,)         metric of the ridge and of the selection; ones in the paper
eps      float        strength of the plan's entropic regularisation: the size of the neighbourhood
plan, P  (n, n)       coupling between x and y, rows and columns sum to 1/n
======== ============ =========================================================================

``G^T G / n`` is the Fisher matrix (empirical, or Gauss-Newton). It is never formed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from swap_prune.selection import Layer, Selection

if TYPE_CHECKING:
    from swap_prune.fisher.capture.layer_inputs import LayerInputs
    from swap_prune.fisher.factor import FisherFactor
    from swap_prune.regression.pattern import GroupPattern
    from swap_prune.regression.top_k import Floors

__all__ = ["FisherKind", "PruningProblem", "PruningSolution", "RowKind", "check_solution"]

FisherKind = Literal["auto", "gauss-newton", "empirical"]  # what the rows of G stand for
RowKind = Literal["auto", "mini-batches", "samples"]  # what makes one of them where BatchNorm will be recalibrated


@dataclass(frozen=True)
class PruningProblem:
    """Keep ``k`` of the weights ``w_bar`` so that the loss, seen through ``factor``, hardly changes.

    Attributes:
        reference: w_bar, (p,), weights before the stage; not to be changed, for G may be taken at this very vector.
        keep: k, number of weights that may be non-zero, ``0 <= k <= p``.
        factor: G as a Fisher factor of shape (n, p); None for methods that need no gradients.
        held_out: Maps weights w (p,) and a kept set (p,) to losses (n_v,) that candidates are judged by, on samples
            that G does not see: the network's own, or their mean with the divergence from the dense network where the
            loss can compare outputs; None where no samples were held out, or no gradients are taken.
        slope: Maps w and a kept set to gamma (p,), the mean gradient of the same over the samples of G; None where
            there are no gradients.
        whole_slope: The same over larger batches and as it is, for where those of ``slope`` are small, so that noise
            can be told in them, and BatchNorm's statistics are those of a batch; else None.
        all_samples: Returns the same problem with slopes over held-out samples as well; None where there are none, or a
            later stage asks them again.
        rows_of_samples: Takes G of single samples, where ``factor`` is that of mini-batches and both may be compared;
            returns None where that is too noisy. Else None.
        blank: Returns the network's losses on the same samples without any of the p weights, (n_v,); None where the
            loss may not bear such a network.
        selection: The parameters that w is made of; None for a problem without layers.
        inputs: Statistics of what goes into each layer; None for methods that do not need them.
        floors: Places of layers, in their order, and how many weights of each are kept at least.
        pattern: What groups of neighbouring weights are held to.
    """

    reference: Tensor
    keep: int
    factor: FisherFactor | None = None
    held_out: Callable[[Tensor, Tensor], Tensor] | None = None
    slope: Callable[[Tensor, Tensor], Tensor] | None = None
    whole_slope: Callable[[Tensor, Tensor], Tensor] | None = None
    all_samples: Callable[[], PruningProblem] | None = None
    rows_of_samples: Callable[[], FisherFactor | None] | None = None
    blank: Callable[[], Tensor] | None = None
    selection: Selection | None = None
    inputs: LayerInputs | None = None
    floors: Floors = ()
    pattern: GroupPattern | None = None

    def __post_init__(self) -> None:
        if self.reference.ndim != 1:
            raise ValueError(f"reference must have shape (p,), got {tuple(self.reference.shape)}")
        if not 0 <= self.keep <= self.reference.numel():
            raise ValueError(f"keep must lie in [0, p={self.reference.numel()}], got {self.keep}")
        if self.factor is not None and self.factor.shape[1] != self.reference.numel():
            raise ValueError(
                f"the Fisher factor has {self.factor.shape[1]} columns for {self.reference.numel()} weights"
            )
        if self.selection is not None and self.selection.total != self.reference.numel():
            raise ValueError(f"the selection has {self.selection.total} of {self.reference.numel()} weights")

    def fisher(self) -> FisherFactor:
        """Return the Fisher factor of a problem whose method needs one.

        Raises:
            ValueError: If the problem was stated without gradients.
        """
        if self.factor is None:
            raise ValueError("this method needs per-sample gradients, but the problem was stated without")
        return self.factor

    def layers(self) -> Iterator[Layer]:
        """Yield the layers in flat order; a problem without layers counts as one."""
        if self.selection is None:
            yield Layer("weights", slice(0, self.reference.numel()), self.reference.shape)
            return
        places = self.selection.slices()
        for name, shape in self.selection.shapes.items():
            yield Layer(name, places[name], shape)

    def groups(self) -> Mapping[str, int]:
        """Return the number of groups of each parameter that has more than one, by name."""
        return {} if self.selection is None else self.selection.groups

    def trivial_solution(self) -> PruningSolution:
        """Return the only answer to keeping everything or nothing."""
        everything = self.keep > 0
        kept = torch.full_like(self.reference, everything, dtype=torch.bool)
        return PruningSolution(self.reference * everything, kept)

    def layer_inputs(self) -> LayerInputs:
        """Return the input statistics of a problem whose method needs them.

        Raises:
            ValueError: If the problem was stated without them.
        """
        if self.inputs is None:
            raise ValueError("this method needs the inputs of the layers, but the problem was stated without")
        return self.inputs


@dataclass(frozen=True)
class PruningSolution:
    """What a method found.

    Attributes:
        weights: w, (p,), zero outside the kept set.
        kept: Kept set, (p,), boolean with exactly k entries true.
        converged: Whether the method's own stopping test was met.
        iterations: Outer iterations spent.
        evidence: Plain numbers and strings that say how the answer was reached (for the report).
    """

    weights: Tensor
    kept: Tensor
    converged: bool = True
    iterations: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)


def check_solution(solution: PruningSolution, problem: PruningProblem, method: str) -> None:
    """Refuse what a method may not return; it may be the user's own.

    Args:
        solution: What it returned.
        problem: What it was asked.
        method: Its name.

    Raises:
        ValueError: If shapes, k, floors or the pattern are not as asked for, or a weight is not finite.
    """
    if not isinstance(solution, PruningSolution):
        raise ValueError(f"method {method!r} must return a PruningSolution, got a {type(solution).__name__}")
    kept, weights, total = solution.kept, solution.weights, len(problem.reference)
    if kept.dtype != torch.bool or not kept.shape == weights.shape == (total,):
        got = f"kept {tuple(kept.shape)}, {kept.dtype}, and weights {tuple(weights.shape)}"
        raise ValueError(
            f"method {method!r} returned {got}: a boolean and a number of each of {total} weights are needed"
        )
    if int(kept.sum()) != problem.keep:
        raise ValueError(f"method {method!r} kept {int(kept.sum())} weights; problem.keep is {problem.keep}")
    if weights.dtype != problem.reference.dtype:
        raise ValueError(
            f"method {method!r} returned weights of {weights.dtype}: they must be {problem.reference.dtype}, as "
            "problem.reference"
        )
    _check_evidence(solution.evidence, method)
    if not bool(weights.isfinite().all()):
        raise ValueError(f"method {method!r} returned weights that are not finite numbers")
    names = {layer.place.start: layer.name for layer in problem.layers()}
    for place, least in problem.floors:
        count = int(kept[place].sum())
        if count < least:
            raise ValueError(
                f"method {method!r} kept {count} weights of {names[place.start]!r}, and min_keep asks for {least}: "
                "as it is set it ignores min_keep; leave that out, or use a method that compares layers, such as lr"
            )
    pattern = problem.pattern
    if pattern is not None and bool((pattern.room(kept.nonzero().squeeze(1)) < 0).any()):
        raise ValueError(f"method {method!r} ignores pattern {pattern}; leave pattern out, or use lr or ewr")


def _check_evidence(evidence: Mapping[str, Any], method: str) -> None:
    """Refuse what no report can hold.

    Raises:
        ValueError: If it is no mapping of names to finite numbers, text, and lists and tables of them.
    """
    try:
        json.dumps(dict(evidence), allow_nan=False)
        named = all(isinstance(name, str) for name in evidence)
    except (TypeError, ValueError):
        named = False
    if not named:
        raise ValueError(
            f"the evidence of method {method!r} must be finite numbers, text, and lists and tables of them, by name, "
            f"since it goes to the report; got {evidence!r:.200}"
        )
