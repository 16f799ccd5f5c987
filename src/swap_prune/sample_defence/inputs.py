"""Calibration inputs that an attacker has shifted, shifted back.

An attack moves an input x to where the loss at its label is high, within a small ball: ``max loss(x + d)``. The network
is close to linear there, so that as many steps *down* the loss at the label lead back to about x. It is the
anti-adversary of Alfarra et al. (AAAI 2022, arXiv 2103.14347), which has to guess labels; calibration samples have
theirs. The radius is not known. It is the smallest at which labels are as likely as the network says that they are::

    mean log q(label) >= mean sum_c q(c) log q(c),      q the network's prediction at the shifted inputs.

In later stages the attack may be on the pruned network. Where that is so close to linear that its slope is the same at
both ends of its own way back, this is the attack's way, reversed. Elsewhere it only leads to inputs on which the loss
is low, and the network would no longer be told what it gets wrong: there inputs go the way of the dense network, by the
radius that was seen when that was attacked.

Labels that are wrong look like attacked inputs, and must not be made true. What tells them apart is how near a label
is: an attack's way back is short, and the same shift leads to fewer of the other classes; to a label drawn at random it
is as far as to any other. Errors of a network that is too sure of itself are near as well. What tells these apart is
the mark that an attack leaves on the inputs: a part along the slope that it went up.

Place in the pipeline: a defence, before capture, where the dense network contradicts the labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from swap_prune.fisher.storage import AT_ONCE
from swap_prune.losses import CrossEntropy, LossFn
from swap_prune.randomness import uniform
from swap_prune.sample_defence.labels import TEMPERATURES
from swap_prune.samples.batches import split_batches

__all__ = [
    "Network",
    "can_be_asked",
    "labels_contradicted",
    "shift_back",
    "shift_seen",
    "straight_shift",
]

Network = Callable[[Tensor], Tensor]  # in eval mode: inputs (n, ...) to logits (n, classes)

_RADII = (0.02, 0.03, 0.045, 0.07, 0.1, 0.15, 0.22, 0.33, 0.5)  # in standard deviations of the inputs
_STEPS = 10  # down the loss, of a quarter of the radius each (Madry et al., ICLR 2018)
_LOOKED_AT = 256  # samples that the radius is found on
_ASKED, _DRAWS = 512, 4  # samples that are asked whether they lie along slopes; labels drawn for each
_LEAST_EVIDENCE = 5.0  # standard errors that labels must be less likely than expected
_LEAST_REACHED = 0.5  # of contradicted samples that must be led to their label: errors of the network's own stay
_LEAST_GAP = 0.1  # of contradicted samples, between those led to their label and those led to another class
_LEAST_ERRORS = 3.0  # standard errors that this gap must be above zero
_LEAST_ALONG = 3.0  # standard errors that inputs must lie further along the slopes at their labels than at others
_TEMPERATURES = (*TEMPERATURES, 32.0, math.inf)  # at which the network may be calibrated
_LEAST_STRAIGHT = 0.5  # mean cosine between slopes at both ends of a way back
_LEAST_RARITY = 4.0  # standard errors that labels must be predicted less often than by chance


def labels_contradicted(loss_fn: LossFn, outputs: Sequence[Tensor], batches: Sequence[Any]) -> bool:
    """Whether labels are less likely, beyond chance, than the network's predictions say that they should be.

    Args:
        loss_fn: Only for the cross-entropy of one label a sample is there an answer; else False.
        outputs: Logits of the network on the batches, (n, classes) each.
        batches: Pairs of inputs and class indices (n,).
    """
    if not can_be_asked(loss_fn, batches) or any(z.ndim != 2 for z in outputs):
        return False
    surplus = _surplus(torch.cat(list(outputs)), torch.cat([batch[1] for batch in batches]))
    if len(surplus) < 2:
        return False
    return float(surplus.mean()) < -_LEAST_EVIDENCE * float(surplus.std()) / math.sqrt(len(surplus))


def shift_seen(
    network: Network,
    loss_fn: LossFn,
    batches: Sequence[Any],
    generator: torch.Generator,
    at_once: int = AT_ONCE,
) -> float | None:
    """Return how far inputs seem to have been shifted against their labels.

    Args:
        network: The dense network.
        loss_fn: Only for the cross-entropy of one label a sample is there an answer.
        batches: Pairs of floating-point inputs (n, ...) and class indices (n,).
        generator: Draws the other classes (CPU).
        at_once: Samples that run through the network at once.

    Returns:
        The radius in the largest entry, in the unit of the inputs; None where labels fit, or their misfit is another.
    """
    if not can_be_asked(loss_fn, batches):
        return None
    inputs, labels = _first_samples(batches, _LOOKED_AT)
    outputs = _outputs(network, inputs, at_once)
    wrong = outputs.argmax(1) != labels
    if outputs.ndim != 2 or outputs.shape[1] < 3 or not bool(wrong.any()):
        return None
    if float(_surplus(outputs, labels).mean()) >= 0:
        return None
    found = _least_shift(network, inputs, labels, [r * float(inputs.std()) for r in _RADII], at_once)
    if found is None:
        return None
    radius, moved = found
    if _is_rarer_than_chance(wrong, outputs.shape[1]):
        return radius
    if not _lie_along_slopes(network, *_first_samples(batches, _ASKED), generator, at_once):
        return None
    reached = (_outputs(network, moved, at_once).argmax(1) == labels)[wrong]
    others = _other_classes(outputs, labels, generator)[wrong]
    elsewhere = _shifted(network, inputs[wrong], others, radius, at_once)
    led = _outputs(network, elsewhere, at_once).argmax(1) == others
    return radius if _is_nearer(reached, led) else None


def straight_shift(network: Network, batches: Sequence[Any], at_once: int = AT_ONCE) -> float | None:
    """Return how far a network's own way back leads from inputs that fool it, where that is the attack's, reversed.

    Args:
        network: The network as the stages so far have left it.
        batches: Pairs that can be asked.
        at_once: Samples that run through the network at once.

    Returns:
        The radius; 0 where labels are as likely as it says; None where its slope turns on the way, or none suffices.
    """
    inputs, labels = _first_samples(batches, _LOOKED_AT)
    found = _least_shift(network, inputs, labels, [r * float(inputs.std()) for r in (0.0, *_RADII)], at_once)
    if found is None:
        return None
    radius, moved = found
    if radius == 0:
        return radius
    here, there = (_slopes(network, ends, labels, at_once).reshape(len(labels), -1) for ends in (inputs, moved))
    return radius if float(cosine_similarity(here, there).mean()) >= _LEAST_STRAIGHT else None


def shift_back(network: Network, batches: Sequence[Any], radius: float, at_once: int = AT_ONCE) -> Iterator[Any]:
    """Yield pairs whose inputs went down the loss at their labels, by ``radius`` in each entry at the most."""
    for inputs, labels in batches:
        yield _shifted(network, inputs, labels, radius, at_once), labels


def can_be_asked(loss_fn: LossFn, batches: Sequence[Any]) -> bool:
    """Whether batches are pairs of floating-point inputs (n, ...) and class indices (n,), of a cross-entropy."""

    def is_pair(batch: Any) -> bool:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
            return False
        inputs, labels = batch
        classes = labels.ndim == 1 and not labels.is_floating_point() and bool((labels >= 0).all())  # -100: no label
        return inputs.is_floating_point() and classes

    if not isinstance(loss_fn, CrossEntropy) or not batches or not all(map(is_pair, batches)):
        return False
    return len({batch[0].shape[1:] for batch in batches}) == 1


def _first_samples(batches: Sequence[Any], count: int) -> tuple[Tensor, Tensor]:
    """Return the first inputs and labels of pairs; what comes behind them is not read."""
    sizes = itertools.accumulate((len(batch[0]) for batch in batches), initial=0)
    looked_at = [batch for before, batch in zip(sizes, batches, strict=False) if before < count]
    inputs, labels = (torch.cat([batch[part] for batch in looked_at])[:count] for part in (0, 1))
    return inputs, labels


@torch.no_grad()
def _outputs(network: Network, inputs: Tensor, at_once: int) -> Tensor:
    """Return the logits, (n, classes)."""
    return torch.cat([network(part) for part in torch.split(inputs, at_once)])


def _surplus(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return ``log q(label) - sum_c q(c) log q(c)``, (n,): 0 in the mean where predictions are calibrated."""
    logs = outputs.double().log_softmax(1)
    return logs.gather(1, labels.long().unsqueeze(1)).squeeze(1) - (logs.exp() * logs).sum(1)


def _least_shift(
    network: Network, inputs: Tensor, labels: Tensor, radii: Sequence[float], at_once: int
) -> tuple[float, Tensor] | None:
    """Return the first of some radii at which labels are as likely as a network says, and the inputs there."""
    for radius in radii:
        moved = _shifted(network, inputs, labels, radius, at_once) if radius > 0 else inputs
        if float(_surplus(_outputs(network, moved, at_once), labels).mean()) >= 0:
            return radius, moved
    return None


def _slopes(network: Network, inputs: Tensor, classes: Tensor, at_once: int) -> Tensor:
    """Return the gradient of each sample's loss with respect to its inputs, (n, ...)."""
    parts = []
    for part, goal in split_batches([(inputs, classes)], at_once):
        slope = _slope(network, part, goal)
        parts.append(torch.zeros_like(part) if slope is None else slope)
    return torch.cat(parts)


@torch.enable_grad()
def _slope(network: Network, inputs: Tensor, classes: Tensor) -> Tensor | None:
    """Return the slopes of samples that run at once; None where what comes first in the network is detached."""
    inputs = inputs.detach().requires_grad_()
    loss = cross_entropy(network(inputs), classes.long(), reduction="sum")
    return torch.autograd.grad(loss, inputs, allow_unused=True)[0] if loss.requires_grad else None


def _shifted(network: Network, inputs: Tensor, classes: Tensor, radius: float, at_once: int) -> Tensor:
    """Go down the loss at classes (n,), within the ball of the largest entry around the inputs."""
    parts = []
    for part, goal in split_batches([(inputs, classes)], at_once):
        shift = torch.zeros_like(part)
        for _ in range(_STEPS):
            slope = _slope(network, part + shift, goal)
            if slope is None:  # nobody attacked it by gradients
                break
            shift = (shift - radius / 4 * slope.sign()).clamp_(-radius, radius)
        parts.append(part + shift)
    return torch.cat(parts)


def _other_classes(outputs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each sample a class that is neither its label nor what is predicted, (n,)."""
    drawn = uniform(outputs.shape, generator).to(outputs.device)
    barred = torch.stack([labels.long(), outputs.argmax(1)], dim=1)
    return drawn.scatter(1, barred, -1.0).argmax(1)


def _likely_labels(outputs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class for each sample, (n,), by the predictions at the temperature at which they fit the labels best."""
    outputs = outputs.double()
    best = min(_TEMPERATURES, key=lambda temperature: float(cross_entropy(outputs / temperature, labels.long())))
    shares = (outputs / best).softmax(1)
    return torch.multinomial(shares.cpu(), 1, generator=generator).squeeze(1).to(outputs.device)


def _lie_along_slopes(
    network: Network, inputs: Tensor, labels: Tensor, generator: torch.Generator, at_once: int
) -> bool:
    """Whether inputs have a part along the signs of the slopes at their labels, as an attack leaves it.

    Against it stands the same at labels that are as likely. Were the network only too sure of itself, its own labels
    would be such draws, and neither would be further along than the other.
    """
    centre, outputs = inputs.mean(0), _outputs(network, inputs, at_once)

    def along(classes: Tensor) -> Tensor:
        parts = []
        for part, goal in split_batches([(inputs, classes)], at_once):
            signs = _slopes(network, part, goal, at_once).sign()
            parts.append((signs * (part - centre)).reshape(len(part), -1).mean(1).double())
        return torch.cat(parts)

    others = [along(_likely_labels(outputs, labels, generator)) for _ in range(_DRAWS)]
    further = along(labels) - torch.stack(others).mean(0)
    return float(further.mean()) > _LEAST_ALONG * float(further.std(correction=0)) / math.sqrt(len(further))


def _is_rarer_than_chance(wrong: Tensor, classes: int) -> bool:
    """Whether fewer labels are predicted than of labels drawn at random would be: somebody saw to it, (m,)."""
    expected = len(wrong) / classes
    right = len(wrong) - int(wrong.sum())
    return expected - right > _LEAST_RARITY * math.sqrt(expected * (1 - 1 / classes))


def _is_nearer(reached: Tensor, led: Tensor) -> bool:
    """Whether a shift leads to most labels, and to more of them than of other classes, both boolean, (m,): paired."""
    if float(reached.double().mean()) < _LEAST_REACHED:
        return False
    gap = reached.double() - led.double()
    error = float(gap.std(correction=0)) / math.sqrt(len(gap))
    return float(gap.mean()) >= max(_LEAST_GAP, _LEAST_ERRORS * error)
