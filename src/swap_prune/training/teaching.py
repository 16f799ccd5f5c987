"""What the network before pruning says of a batch: the teacher of what is made of it.

A loss that can compare outputs (:class:`GaussNewtonLoss`) is then averaged with the divergence from the dense network
(self-distillation; Hinton et al., 2015)::

    (1 - share) l(z, batch) + share T^2 D(z / T, t / T),      z the outputs, t the dense network's, T a temperature

Labels say where to go, the dense network says it with less noise: a few samples that it gets wrong make up much of a
loss on labels. Trials of candidates and fine-tuning learn from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.bound import Bound, functional_call
from swap_prune.losses import GaussNewtonLoss, LossFn, check_losses, failures_named
from swap_prune.network.modes import eval_mode
from swap_prune.samples.batches import in_own_containers
from swap_prune.selection import Selection
from swap_prune.surgery.batchnorm import batchnorm_layers
from swap_prune.surgery.snapshot import Snapshot

__all__ = ["Taught", "Teacher", "losses_beside_own", "output_slopes", "sizes_of", "taught_losses", "taught_outputs"]

_LEAST_SLOPE = 1e-6  # of the root mean square: smaller values are mostly rounding
_TEACHER_SHARE = 0.75  # of the divergence from the dense network, in trials: slopes and held-out losses


class Taught(NamedTuple):
    """A batch, and what is known of it beside its labels.

    Attributes:
        batch: The batch.
        teacher: Outputs of the dense network on it; None without a teacher.
        trust: How far each label is to be believed, in [0, 1], (n,); None: wholly.
    """

    batch: Any
    teacher: Tensor | None = None
    trust: Tensor | None = None


class Teacher:
    """The network as it was before pruning: what of it will change.

    Args:
        model: The network, not pruned yet.
        selection: The weights that will change, beside BatchNorm's statistics; None where all parameters and buffers
            will.
        loss: What reads the outputs.
        before: A snapshot of the network, whose copies are used in place of new ones where they are current.
    """

    def __init__(
        self, model: nn.Module, selection: Selection | None, loss: GaussNewtonLoss, before: Snapshot | None = None
    ) -> None:
        statistics = {id(buffer) for layer in batchnorm_layers(model) for buffer in layer.buffers()}
        names = None if selection is None else frozenset(selection.names)
        weights = {name: p.detach() for name, p in model.named_parameters() if names is None or name in names}
        weights |= {name: b for name, b in model.named_buffers() if names is None or id(b) in statistics}
        # a network may write to its other buffers, and to those that are given in their place
        copy_of = torch.clone if before is None or selection is None else before.copy_of
        self._state = {f"model.{name}": copy_of(tensor) for name, tensor in weights.items()}
        self._bound, self._loss = Bound(model, loss.outputs), loss

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(iter(self._state.values())).device

    @contextmanager
    def asked(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Give a block the dense network, in eval mode: a function of the inputs of pairs that returns the outputs."""
        with eval_mode(self._bound.model):
            yield lambda inputs: self._outputs((inputs, None))

    def _outputs(self, batch: Any) -> Tensor:
        outputs: Tensor = functional_call(self._bound, self._state, (in_own_containers(batch),))
        return outputs

    def outputs(self, batches: Sequence[Any]) -> list[Tensor]:
        """Return the dense network's outputs on batches, in eval mode.

        Raises:
            ValueError: If they are not finite, or the losses of some sample are not.
        """
        with eval_mode(self._bound.model), torch.no_grad():
            found = []
            for batch in batches:
                with failures_named("batch given to the dense network", batch):
                    found.append(self._outputs(batch))
                    if not isinstance(found[-1], Tensor):
                        raise ValueError(
                            f"outputs of {type(self._loss).__name__} must return one tensor, (n, ...), got a "
                            f"{type(found[-1]).__name__}"
                        )
        for outputs in found:
            bad = int((~outputs.isfinite()).reshape(len(outputs), -1).any(1).sum())
            if bad:
                raise ValueError(
                    f"the dense network's outputs are not finite on {bad} of {len(outputs)} samples: check the "
                    "weights, and the samples for NaN and infinity; where that is meant, as of classes that are "
                    "masked, use a loss_fn of your own, and distillation=0 in fine-tuning"
                )
        for outputs, batch in zip(found, batches, strict=True):
            with failures_named("batch given to the dense network", batch), torch.no_grad():
                check_losses(self._loss.losses(outputs, in_own_containers(batch)), None)
        return found

    def teach(self, batches: Sequence[Any]) -> list[Taught]:
        """Return batches with these outputs."""
        return list(map(Taught, batches, self.outputs(batches)))


def losses_beside_own(loss: GaussNewtonLoss, model: nn.Module, batch: Any) -> Tensor:
    """Return the losses (n,) of a network that is its own teacher: what trials take, before there is any pruning."""
    with torch.no_grad():
        outputs = loss.outputs(model, in_own_containers(batch))
    return taught_losses(loss, model, Taught(batch, outputs))


def taught_losses(
    loss_fn: LossFn, model: nn.Module, taught: Taught, share: float = _TEACHER_SHARE, temperature: float = 1.0
) -> Tensor:
    """Return the loss of each sample, (n,), or its mean with the divergence from the teacher.

    Args:
        loss_fn: Per-sample loss; one that compares outputs where there is a teacher.
        model: The network, in the mode that the caller wants.
        taught: The batch.
        share: Of the divergence, which has that of what is not trusted too.
        temperature: T, that outputs are divided by before they are compared.
    """
    return taught_outputs(loss_fn, model, taught, share, temperature)[0]


def taught_outputs(
    loss_fn: LossFn, model: nn.Module, taught: Taught, share: float = _TEACHER_SHARE, temperature: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`taught_losses`, (n,), and the network's outputs; None of the latter where there is no teacher."""
    batch = in_own_containers(taught.batch)
    if taught.teacher is None:
        return loss_fn(model, batch), None
    assert isinstance(loss_fn, GaussNewtonLoss), "only such a loss has a teacher"
    outputs = loss_fn.outputs(model, batch)
    return _losses_of(outputs, loss_fn, taught._replace(batch=batch), share, temperature), outputs


def _losses_of(outputs: Tensor, loss: GaussNewtonLoss, taught: Taught, share: float, temperature: float) -> Tensor:
    """Return the losses of :func:`taught_losses`, (n,), from the network's outputs."""
    batch, teacher, trust = taught
    losses = loss.losses(outputs, batch)
    if teacher is None:
        return losses
    divergence = loss.divergence(outputs / temperature, batch, teacher / temperature) * temperature**2
    return torch.lerp(losses.to(divergence), divergence, share if trust is None else 1 - (1 - share) * trust)


def output_slopes(loss_fn: LossFn, model: nn.Module, batches: Sequence[Taught]) -> Tensor | None:
    """Return the norms of the gradients of the same losses at the network's outputs, (n,), over all batches.

    The gradients at the weights are these times the network's own derivative, so that honest ones are about
    proportional to them, however unequal they are.

    Args:
        loss_fn: Per-sample loss.
        model: The network, in the mode that the caller wants.
        batches: At least one.

    Returns:
        The norms, positive; None where the loss does not tell what the outputs are, or all are zero.
    """
    if not isinstance(loss_fn, GaussNewtonLoss):
        return None
    norms = []
    for taught in batches:
        own = taught._replace(batch=in_own_containers(taught.batch))
        with torch.no_grad():
            outputs = loss_fn.outputs(model, own.batch)
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            losses = _losses_of(outputs, loss_fn, own, _TEACHER_SHARE, 1.0)
            (gradient,) = torch.autograd.grad(losses.sum(), outputs, allow_unused=True, materialize_grads=True)
        norms.append(torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1))
    return sizes_of(torch.cat(norms))


def sizes_of(norms: Tensor) -> Tensor | None:
    """Return norms, (n,), made positive, so that others may be divided by them; None where they are all zero."""
    typical = float(norms.double().square().mean().sqrt())
    return norms.clamp_min(_LEAST_SLOPE * typical) if 0 < typical < math.inf else None
