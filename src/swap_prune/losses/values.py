"""Losses on targets that are numbers, or yes-or-no answers: regression, several labels at once, masks of pixels.

Outputs z and targets t of a sample have the same shape, m numbers each. The loss of the sample is the mean over them,

    SquaredError         (z - t)^2                       second derivative  2 / m
    BinaryCrossEntropy   log(1 + e^z) - t z              second derivative  q (1 - q) / m,    q = sigmoid(z / T),

at T = 1. That matrix is diagonal, so that a root of it is taken entry by entry.

Place in the pipeline: a loss, as :mod:`swap_prune.losses` describes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from swap_prune.checks import positive_number
from swap_prune.losses import describe
from swap_prune.losses.tokens import call_model, told_apart

__all__ = ["BinaryCrossEntropy", "SquaredError"]


@dataclass(frozen=True)
class _ValueLoss:
    """What both share: where outputs and targets come from."""

    labels: str = "labels"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample, (n,)."""
        return self.losses(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return z, (n, ...).

        Raises:
            ValueError: If the batch holds no targets, or the outputs are not of their shape.
        """
        inputs, targets = told_apart(batch, self.labels, self)
        outputs = call_model(model, inputs)
        if not isinstance(outputs, Tensor) or _without_ones(outputs) != _without_ones(targets):
            raise ValueError(
                f"{type(self).__name__} needs a target for each output, got outputs {describe(outputs)} and targets "
                f"{describe(targets)}; bring targets into the shape of the outputs"
            )
        return outputs

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each sample from its outputs, (n,)."""
        raise NotImplementedError

    def _fitted(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return targets in the shape and type of the outputs."""
        return told_apart(batch, self.labels, self)[1].to(outputs.dtype).view_as(outputs)


@dataclass(frozen=True)
class SquaredError(_ValueLoss):
    """Squared error of each sample, the mean over its outputs; a ``GaussNewtonLoss``.

    A batch is a pair ``(what the model takes, targets)``, or a dict with the targets under ``labels`` and all else for
    the model by name. Targets have the shape of the outputs, (n, ...); dimensions of one entry may be missing.

    Attributes:
        labels: Key of the targets in dict batches.
    """

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean squared error of each sample, (n,)."""
        return self.divergence(outputs, batch, self._fitted(outputs, batch))

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return ``sqrt(2 / m) xi``, (n, ...)."""
        return signs * math.sqrt(2 / _per_sample(outputs))

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of each sample's outputs from a teacher's, (n,)."""
        return _mean(functional.mse_loss(outputs, teacher, reduction="none"))


@dataclass(frozen=True)
class BinaryCrossEntropy(_ValueLoss):
    """Binary cross-entropy of each sample's logits, the mean over them; a ``GaussNewtonLoss``.

    For one answer a sample, several labels at once, or a mask. A batch is a pair ``(what the model takes, targets)``,
    or a dict with the targets under ``labels`` and all else for the model by name. Targets are 0, 1, booleans or
    probabilities, of the shape of the logits, (n, ...); dimensions of one entry may be missing.

    Attributes:
        labels: Key of the targets in dict batches.
        temperature: Of the sigmoid in the curvature, > 0; as for :class:`swap_prune.losses.CrossEntropy`.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        positive_number("temperature", self.temperature)

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean binary cross-entropy of each sample, (n,)."""
        targets = self._fitted(outputs, batch)
        return _mean(functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return ``sqrt(q (1 - q) / m) xi``, (n, ...), q the sigmoid of z over the temperature."""
        q = (outputs / self.temperature).sigmoid()
        return signs * (q * (1 - q) / _per_sample(outputs)).sqrt()

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of the teacher's answers from the network's, their mean, (n,)."""
        yes, log_yes, log_no = teacher.sigmoid(), functional.logsigmoid(teacher), functional.logsigmoid(-teacher)
        surplus_yes = log_yes - functional.logsigmoid(outputs)
        surplus_no = log_no - functional.logsigmoid(-outputs)
        return _mean(yes * surplus_yes + (1 - yes) * surplus_no)

    def check_targets(self, batch: Any) -> None:
        """Check the targets of a batch, before any gradient is taken.

        Raises:
            ValueError: If one is not in [0, 1].
        """
        targets = told_apart(batch, self.labels, self)[1]
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(
                "BinaryCrossEntropy needs targets in [0, 1], got "
                f"{float(targets.double().min()):g} to {float(targets.double().max()):g}: for class indices leave "
                "loss_fn= out, for numbers use SquaredError()"
            )


def _without_ones(tensor: Tensor) -> list[int]:
    """Return the number of samples, and the other dimensions without those of one entry."""
    return [*tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1)]


def _per_sample(outputs: Tensor) -> int:
    """Return m, how many numbers a sample has."""
    return max(1, outputs.shape[1:].numel())


def _mean(values: Tensor) -> Tensor:
    """Average values (n, ...) of each sample, (n,)."""
    mean: Tensor = values.flatten(1).mean(1) if values.ndim > 1 else values
    return mean
