"""Losses on targets that are numbers, or yes-or-no answers: regression, several labels at once, masks of pixels.

Outputs z and targets t of a sample have the same shape, m numbers of which count. The loss of the sample is the mean
over these,

    SquaredError         (z - t)^2                       second derivative  2 / m
    BinaryCrossEntropy   log(1 + e^z) - t z              second derivative  q (1 - q) / m,    q = sigmoid(z / T),

at T = 1. That matrix is diagonal, so that a root of it is taken entry by entry.

Place in the pipeline: a loss, as :mod:`swap_prune.losses` describes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swap_prune.checks import positive_number
from swap_prune.losses import describe
from swap_prune.losses.base import precise
from swap_prune.losses.tokens import call_model, logits_in, told_apart

__all__ = ["BinaryCrossEntropy", "SquaredError"]


@dataclass(frozen=True)
class _ValueLoss:
    """What both share: where outputs and targets come from, and which of them count."""

    labels: str = "labels"
    ignore: float | None = None
    forward: Callable[[nn.Module, Any], Tensor] = call_model

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample, (n,)."""
        return self.losses(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return z, (n, ...).

        Raises:
            ValueError: If the batch holds no targets, or the outputs are not of their shape.
        """
        inputs, targets = told_apart(batch, self.labels, self)
        outputs = logits_in(self.forward(model, inputs))
        if not isinstance(outputs, Tensor) or _without_ones(outputs) != _without_ones(targets):
            raise ValueError(
                f"{type(self).__name__} needs a target for each output, got outputs {describe(outputs)} and targets "
                f"{describe(targets)}; bring targets into the shape of the outputs, or give forward=, a function "
                "(model, inputs) -> outputs"
            )
        values: Tensor = precise(outputs)
        return values

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the loss of each sample from its outputs, (n,)."""
        raise NotImplementedError

    def _targets(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Return targets in the shape and type of the outputs, and which of them count; the others are 0."""
        targets = told_apart(batch, self.labels, self)[1].view_as(outputs)
        counted = ~self._ignored(targets)  # before they are rounded
        return targets.to(outputs.dtype).where(counted, 0), counted

    def _ignored(self, targets: Tensor) -> Tensor:
        """Return which targets do not count, boolean; of wider ones also those that were once float32."""
        if self.ignore is None:
            return torch.zeros_like(targets, dtype=torch.bool)
        if math.isnan(self.ignore):
            return targets.isnan()
        targets = targets if targets.is_floating_point() else targets.double()  # unsigned ones have no -1
        missing = targets == float(self.ignore)
        return missing | (targets == float(torch.tensor(self.ignore, dtype=torch.float32, device="cpu")))


@dataclass(frozen=True)
class SquaredError(_ValueLoss):
    """Squared error of each sample, the mean over its outputs; a ``GaussNewtonLoss``.

    A batch is a pair ``(what the model takes, targets)``, or a dict with the targets under ``labels`` and all else for
    the model by name. Targets have the shape of the outputs, (n, ...); dimensions of one entry may be missing.

    Attributes:
        labels: Key of the targets in dict batches.
        ignore: Targets of this value are missing and do not count, such as -9999 or NaN; None: all count.
        forward: ``(model, what the model takes) -> outputs``, or what has them under the name ``logits``; by default
            the model is called with what the batch holds: a dict by name, a pair or list in order.
    """

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean squared error of each sample, (n,); 0 where no target counts."""
        targets, counted = self._targets(outputs, batch)
        return _mean(functional.mse_loss(outputs, targets, reduction="none"), counted)

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return ``sqrt(2 / m) xi``, (n, ...), 0 where no target counts."""
        return signs * (2 * _shares(self._targets(outputs, batch)[1], outputs)).sqrt()

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return the mean squared difference of each sample's outputs from a teacher's, (n,)."""
        counted = self._targets(outputs, batch)[1]
        return _mean(functional.mse_loss(outputs, teacher, reduction="none"), counted)


@dataclass(frozen=True)
class BinaryCrossEntropy(_ValueLoss):
    """Binary cross-entropy of each sample's logits, the mean over them; a ``GaussNewtonLoss``.

    For one answer a sample, several labels at once, or a mask. A batch is a pair ``(what the model takes, targets)``,
    or a dict with the targets under ``labels`` and all else for the model by name. Targets are 0, 1, booleans or
    probabilities, of the shape of the logits, (n, ...); dimensions of one entry may be missing.

    Attributes:
        labels: Key of the targets in dict batches.
        ignore: Targets of this value are missing and do not count, such as -1 or NaN; None: all count.
        forward: ``(model, what the model takes) -> logits``; by default as for :class:`SquaredError`.
        temperature: Of the sigmoid in the curvature, > 0; as for :class:`swap_prune.losses.CrossEntropy`.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        positive_number("temperature", self.temperature)

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean binary cross-entropy of each sample, (n,); 0 where no target counts."""
        targets, counted = self._targets(outputs, batch)
        return _mean(functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none"), counted)

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return ``sqrt(q (1 - q) / m) xi``, (n, ...), q the sigmoid of z over the temperature; 0 without a target."""
        q = (outputs / self.temperature).sigmoid()
        return signs * (q * (1 - q) * _shares(self._targets(outputs, batch)[1], outputs)).sqrt()

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of the teacher's answers from the network's, their mean, (n,)."""
        yes, log_yes, log_no = teacher.sigmoid(), functional.logsigmoid(teacher), functional.logsigmoid(-teacher)
        surplus_yes = log_yes - functional.logsigmoid(outputs)
        surplus_no = log_no - functional.logsigmoid(-outputs)
        return _mean(yes * surplus_yes + (1 - yes) * surplus_no, self._targets(outputs, batch)[1])

    def check_targets(self, batch: Any) -> None:
        """Check the targets of a batch, before any gradient is taken.

        Raises:
            ValueError: If one that counts is not in [0, 1].
        """
        targets = told_apart(batch, self.labels, self)[1]
        targets = targets.double()[~self._ignored(targets)]
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(
                f"BinaryCrossEntropy needs targets in [0, 1], got {float(targets.min()):g} to "
                f"{float(targets.max()):g}: for class indices leave loss_fn= out, for numbers use SquaredError(), and "
                "say by ignore= which number stands for a missing one"
            )


def _without_ones(tensor: Tensor) -> list[int]:
    """Return the number of samples, and the other dimensions without those of one entry."""
    return [*tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1)]


def _shares(counted: Tensor, like: Tensor) -> Tensor:
    """Return 1 / m where one of a sample's m targets counts, and 0 elsewhere, (n, ...)."""
    counts = counted.reshape(len(counted), -1).sum(1).clamp(min=1).view(-1, *[1] * (counted.ndim - 1))
    return counted.to(like) / counts


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Average those values (n, ...) of each sample that count, (n,); 0 where none does."""
    return (values * _shares(counted, values)).reshape(len(values), -1).sum(1)
