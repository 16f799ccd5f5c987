"""Self-distillation: a loss without labels, for networks whose outputs are vectors.

What a sentence encoder, or any network that embeds, should do is not written on its calibration data: its dense self
says it. The loss of a sample is the squared distance of its output from what the dense network gave,

    1/2 ||z - t||^2,     for vectors of unit length  1 - cosine(z, t),

whose second derivative at the outputs is the identity. At the dense weights both the loss and its gradient are zero.
Only the curvature says what a weight is worth there, so that the rows of G have to come from the Gauss-Newton matrix,
``g = J^T xi``; per-sample gradients would be rounding errors.

Place in the pipeline: a loss, as :mod:`swap_prune.losses` describes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from swap_prune.losses import describe, errors_worded
from swap_prune.losses.base import precise
from swap_prune.losses.tokens import call_model
from swap_prune.network.device import check_network, check_values
from swap_prune.network.modes import eval_mode
from swap_prune.samples.batches import map_tensors

__all__ = ["SelfDistillation"]


def _not_embedded(batch: Any, reason: str) -> str:
    """Say that a model failed on what a batch holds."""
    return (
        f"the model failed on {describe(batch)}: {reason} (a dict is passed by name, a pair or list in order; embed=, "
        "a function (model, inputs) -> (n, d), calls it in another way)"
    )


@dataclass(frozen=True)
class SelfDistillation:
    """Half the squared distance of each sample's output from the dense network's; a ``GaussNewtonLoss``.

    A batch is a pair ``(what the model takes, the dense network's outputs)``, made by :meth:`label` before pruning.

    Attributes:
        embed: ``(model, what the model takes) -> (n, d)``; by default the model is called with what the batch holds: a
            dict by name, a pair or list in order.
        unit: Scale outputs to unit length, so that the loss is 1 - cosine. An output of length zero stays.
    """

    embed: Callable[[nn.Module, Any], Tensor] = call_model
    unit: bool = True

    stationary: ClassVar[bool] = True  # at the dense network its gradient is zero

    def label(self, model: nn.Module, batches: Iterable[Any]) -> list[tuple[Any, Tensor]]:
        """Return batches with the outputs of a model, which is to be the dense network.

        Args:
            model: The network, not pruned yet; it runs in eval mode, where it is.
            batches: What it takes.

        Returns:
            Pairs, on the devices where the batches are: calibration data for ``prune``.

        Raises:
            ValueError: If the model cannot be called, there are no batches, or the outputs are not one vector a sample.
        """
        check_network(model)
        check_values(model)
        if not isinstance(batches, Iterable):
            raise ValueError(f"batches must be an iterable of what the model takes, got a {type(batches).__name__}")
        place = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0, device="cpu")).device
        pairs = []
        with eval_mode(model), torch.no_grad():
            for batch in batches:
                devices: list[torch.device] = []
                map_tensors(lambda t: devices.append(t.device), batch)  # noqa: B023 (called here and now)
                with errors_worded(partial(_not_embedded, batch)):
                    dense = self._vectors(model, map_tensors(lambda t: t.to(place), batch))
                pairs.append((batch, dense.to(devices[0]) if devices else dense))
        return pairs

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample, (n,)."""
        return self.losses(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Return z, (n, d).

        Raises:
            ValueError: If the batch is not such a pair, or the outputs are not one vector a sample.
        """
        if not (isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            raise ValueError(
                "SelfDistillation needs pairs (what the model takes, outputs of the dense network), got "
                f"{describe(batch)}; make them by loss.label(model, batches) before pruning"
            )
        return self._vectors(model, batch[0])

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return half the squared distance of z from the dense network's outputs, (n,)."""
        return self.divergence(outputs, batch, batch[1])

    def curvature_root(self, outputs: Tensor, batch: Any, signs: Tensor) -> Tensor:
        """Return the signs: the second derivative is the identity."""
        return signs

    def divergence(self, outputs: Tensor, batch: Any, teacher: Tensor) -> Tensor:
        """Return half the squared distance from the outputs of a teacher, (n,)."""
        return (outputs - teacher).square().sum(1) / 2

    def _vectors(self, model: nn.Module, inputs: Any) -> Tensor:
        outputs = self.embed(model, inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise ValueError(
                f"SelfDistillation compares one vector a sample, shape (n, d), got {describe(outputs)}; pass embed=, a "
                "function (model, inputs) -> (n, d)"
            )
        outputs = precise(outputs)
        return functional.normalize(outputs, dim=1) if self.unit else outputs
