"""What is odd about the calibration samples of a stage, and worth a note in the report.

Place in the pipeline: beside the capture, whose losses are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.bound import Bound, dense
from swap_prune.fisher.factor import DenseFactor
from swap_prune.losses import CrossEntropy, LossFn
from swap_prune.losses.tokens import TokenCrossEntropy
from swap_prune.losses.values import BinaryCrossEntropy
from swap_prune.network.modes import eval_mode
from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import forked_generator, uniform
from swap_prune.samples.batches import batch_size, is_sliceable, slice_batch
from swap_prune.selection import Selection

__all__ = ["WatchedLosses", "few_classes", "is_stationary", "no_number", "share_of_largest", "without_gradient"]

_RULES = 0.5  # of what losses have above their median: as much for one sample alone,
_AHEAD = 20.0  # and so many times as much as for the next: one that is merely hard is not far ahead
_LEAST_SAMPLES = 32  # of which one is not to have that much
_LOOKED_AT = 4  # samples whose gradients are compared
_NEAR = 1e-3  # share by which weights are changed for that
_ROUNDINGS = 32  # of outputs: what they may be off from targets that are their own
_OF_CLASSES = (CrossEntropy, BinaryCrossEntropy, TokenCrossEntropy)
_WRONG_CLASS = 50.0  # nats: a network that is wrong about a class loses less, however seldom it is wrong


def few_classes(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> list[int] | None:
    """Look for data in the order of their classes: labels of less than half of those that there could be.

    Returns:
        How many classes labels are of, how many there are, and how many labels; None where there is nothing to say.
    """
    if not isinstance(loss_fn, CrossEntropy):
        return None
    with eval_mode(model), torch.no_grad():
        outputs = loss_fn.outputs(model, slice_batch(batches[0], 0, 2))
    labels = [batch[1] for batch in batches]
    if outputs.ndim != 2 or any(one.is_floating_point() for one in labels):
        return None
    count, classes = sum(map(len, labels)), outputs.shape[1]
    seen = len(set(torch.cat(labels).tolist()))
    return [seen, classes, count] if 2 * seen < min(classes, count) else None


def share_of_largest(losses: Tensor, loss_fn: LossFn) -> float | None:
    """Look for one sample that has most of the loss, as a number that stands for a missing target gives it.

    Args:
        losses: Of the samples, (n,).
        loss_fn: What they were computed by.

    Returns:
        Its share of what losses have above their median, where that is most of it; else None.
    """
    if len(losses) < _LEAST_SAMPLES:
        return None
    above = (losses.double() - losses.double().median()).clamp_min(0)
    largest, second = above.topk(2).values.tolist()
    share = largest / max(float(above.sum()), torch.finfo(above.dtype).tiny)
    least = max(_AHEAD * second, _WRONG_CLASS if isinstance(loss_fn, _OF_CLASSES) else 0)
    return share if share > _RULES and largest >= least else None


def without_gradient(factor: DenseFactor, selection: Selection) -> list[str]:
    """Return the names of the layers whose gradients are zero in all rows of G (n, p)."""
    places = selection.slices()
    return [name for name, place in places.items() if not bool(factor.matrix[:, place].any())]


def is_stationary(model: nn.Module, selection: Selection, loss_fn: LossFn, batches: Sequence[Any]) -> bool:
    """Whether some samples' losses have gradients of rounding size, as where targets are the network's own outputs.

    Such a gradient is nothing beside that with weights that differ by a thousandth; another hardly changes.

    Args:
        model: The network; nothing of it changes.
        selection: The p weights.
        loss_fn: Per-sample loss.
        batches: Calibration batches on the model's device.
    """
    own, bound = selection.read(model), Bound(model, loss_fn)
    eps = torch.finfo(own.dtype).eps
    share = max(_NEAR, 4 * eps)
    near = own * uniform(own.shape, forked_generator(0, "near")).mul_(2 * share).add_(1 - share).to(own)

    def energy(sample: Any, weights: Tensor) -> float:
        losses, leaves = bound.with_leaves(selection, sample, weights)
        found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        return sum(dense(one).double().square().sum().item() for one in found if one is not None)

    try:
        with eval_mode(model), torch.enable_grad():
            samples = _spread([batch for batch in batches if is_sliceable(batch)])
            here, there = (sum(energy(sample, weights) for sample in samples) for weights in (own, near))
            return here < (_ROUNDINGS * eps / share) ** 2 * there
    except Exception as error:  # it is only a look
        pass_on_shortage(error)
        return False


def _spread(batches: Sequence[Any]) -> list[Any]:
    """Return a few samples from all over the batches."""
    places = [(batch, number) for batch in batches for number in range(batch_size(batch))]
    step = max(1, len(places) // _LOOKED_AT)
    return [slice_batch(batch, number, number + 1) for batch, number in places[::step][:_LOOKED_AT]]


def no_number(model: nn.Module, loss_fn: LossFn, batch: Any) -> list[str]:
    """Return a note where the loss of a network that was pruned is not finite on a batch; None is no batch."""
    try:
        with eval_mode(model), torch.no_grad():
            if batch is None or bool(loss_fn(model, batch).isfinite().all()):
                return []
    except Exception:  # a look at one sample, which the caller's loss, or the memory, may not bear
        return []
    return ["the pruned network gives no finite loss: min_keep=, ignore= or a lower sparsity may help"]


class WatchedLosses:
    """Losses of candidates on held-out samples; of the best of them it is remembered whether one sample has most.

    Candidates that are far off, as at the end of too long a step, may do badly on any sample.

    Args:
        losses: Maps weights w (p,) and a kept set (p,) to losses, (n_v,).
        loss_fn: What they are computed by.
        tell: Called for each candidate.

    Attributes:
        share_of_largest: Its share; None: none has.
    """

    def __init__(
        self, losses: Callable[[Tensor, Tensor], Tensor], loss_fn: LossFn, tell: Callable[[], None] = lambda: None
    ) -> None:
        self._losses, self._loss_fn, self._tell = losses, loss_fn, tell
        self._least = math.inf
        self.share_of_largest: float | None = None

    def __call__(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Return the losses of a candidate."""
        found = self._losses(weights, kept)
        self._tell()
        mean = float(found.double().mean())
        if mean < self._least and not bool(kept.all()):  # the dense network may have learned an odd target
            self._least, self.share_of_largest = mean, share_of_largest(found, self._loss_fn)
        return found
