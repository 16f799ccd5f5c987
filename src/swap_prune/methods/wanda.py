"""Wanda: keep the weights of largest ``|W_ij| ||X_j||``, unchanged, compared within each output row.

Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from swap_prune.methods.scoring import check_scope, keep_unchanged, select_best
from swap_prune.problem import PruningProblem, PruningSolution

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda:
    """Pruning by weights and activations (Sun et al., 2024). A layer-wise method without labels.

    Attributes:
        scope: What a weight is compared with: ``"row"``, the weights of the same output (the paper), ``"layer"``, or
            ``"global"``, all weights. Row and layer give every layer the same sparsity.
    """

    scope: Literal["row", "layer", "global"] = "row"

    name: ClassVar[str] = "wanda"
    needs_gradients: ClassVar[bool] = False
    needs_held_out: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_scope(self.scope, ("row", "layer", "global"))

    def solve(self, problem: PruningProblem, generator: torch.Generator) -> PruningSolution:
        """Keep the weights of largest ``|w|`` times the root mean square of their input."""
        norms = {name: squares.sqrt() for name, squares in problem.layer_inputs().mean_squares().items()}
        scores = [
            # (groups, outputs, d) * (groups, 1, d): the outputs of a group see the same inputs
            (w.view(len(norms[name]), -1, norms[name].shape[1]).abs() * norms[name].unsqueeze(1)).flatten()
            for name, w in ((layer.name, problem.reference[layer.place]) for layer in problem.layers())
        ]
        return keep_unchanged(problem, select_best(problem, torch.cat(scores), self.scope))
