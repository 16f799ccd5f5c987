"""Per-sample losses: the default one, and what a loss has to know for Gauss-Newton rows and a teacher.

A loss function takes ``(model, batch)`` and returns one loss a sample, shape (n,). The default is the
cross-entropy of ``model(inputs)`` against ``targets`` for batches ``(inputs, targets)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from swap_prune.checks import positive_number

__all__ = ["IGNORE_INDEX", "CrossEntropy", "GaussNewtonLoss", "LossFn", "cross_entropy", "precise"]

LossFn = Callable[[nn.Module, Any], Tensor]

IGNORE_INDEX = -100  # torch's own


@runtime_checkable
class GaussNewtonLoss(Protocol):
    """A loss that knows its own curvature at the outputs of the network.

    With outputs z and a loss of second derivative H(z), the generalised Gauss-Newton matrix of the network is the
    mean over samples of ``J^T H J``, J being the derivative of z with respect to the weights (Schraudolph, 2002;
    Martens, 2020). It needs no labels.
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample, (n,)."""
        ...

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return z, (n, ...)."""
        ...

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each sample from z, (n,)."""
        ...

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return ``L xi`` for random signs xi shaped like z, where ``L L^T = H(z)`` sample by sample."""
        ...

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return how far each sample's outputs are from those of a teacher, (n,), in the unit of the loss."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of each sample, averaged over positions when there are several a sample.

    The model maps inputs to logits z, (n, classes) or (n, classes, ...). A batch is ``(inputs, targets)`` with targets
    (n,) or (n, ...) of class indices, or (n, classes) of probabilities.

    Attributes:
        temperature: Of the softmax in the curvature, > 0. 1 is the exact second derivative of the loss. A higher one
            (Hinton et al., 2015) lets every class count, also where the network is sure of itself.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        positive_number("temperature", self.temperature)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample, (n,)."""
        inputs, targets = batch
        return self.losses(precise(model(inputs)), (inputs, targets))

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the logits z."""
        logits: Tensor = precise(model(batch[0]))
        return logits

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each sample from its logits, (n,)."""
        targets = batch[1] if batch[1].is_floating_point() else batch[1].long()
        losses: Tensor = functional.cross_entropy(outputs, targets, reduction="none", ignore_index=IGNORE_INDEX)
        return _mean_of_positions(losses, targets)

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return ``L xi`` with ``L = diag(q)^(1/2) - q q^(1/2)T``, q the softmax of z over the temperature.

        ``L L^T = diag(q) - q q^T``, the second derivative of the cross-entropy. Of several positions each has its own
        q, and the root of its share in the mean.
        """
        q = (outputs / self.temperature).softmax(1)
        spread = q.sqrt() * signs
        root = spread - q * spread.sum(1, keepdim=True)
        if outputs.ndim == 2:
            return root if batch[1].is_floating_point() else root * (batch[1] != IGNORE_INDEX).unsqueeze(1)
        counted = batch[1] != IGNORE_INDEX
        share = counted / counted.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (counted.ndim - 1))
        weighted: Tensor = root * share.sqrt().unsqueeze(1).to(root)
        return weighted

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of the teacher's predictions from the network's, (n,)."""
        ours, theirs = outputs.log_softmax(1), teacher.log_softmax(1)
        return _mean_of_positions((theirs.exp() * (theirs - ours)).sum(1), batch[1])


cross_entropy = CrossEntropy()  # the default loss


def precise(outputs: Any) -> Any:
    """Return outputs of 16 bits in float32, others as they are.

    A sum over the positions of a sample, and their number, need not fit in float16, whose largest number is 65,504.
    """
    half = isinstance(outputs, Tensor) and outputs.dtype in (torch.float16, torch.bfloat16)
    return outputs.float() if half else outputs


def _mean_of_positions(values: Tensor, targets: Tensor) -> Tensor:
    """Average values (n,) or (n, ...) over the positions of each sample that have a target; 0 where none has."""
    if values.ndim == 1:
        return values if targets.is_floating_point() else values * (targets != IGNORE_INDEX)
    counted = targets != IGNORE_INDEX
    mean: Tensor = (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
    return mean
