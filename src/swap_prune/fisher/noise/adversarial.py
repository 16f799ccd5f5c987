"""Adversaries: inputs that raise the loss, and rows of G that someone else wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.noise.base import Layers, NoiseModel, check_choice, check_number
from swap_prune.fisher.noise.data import choose, inputs_of
from swap_prune.fisher.noise.rows import RowNoise
from swap_prune.losses import LossFn, check_calibration, describe
from swap_prune.network.modes import eval_mode
from swap_prune.randomness import standard_normal, uniform
from swap_prune.samples.batches import replace_part, select_samples

__all__ = ["AdversarialInputs", "PoisonedRows"]

_CHUNK = 16  # samples attacked at a time: their activations are kept for the backward pass
_SPARSE = 0.01  # part of a sample's entries that one l1 step moves


@dataclass(frozen=True)
class AdversarialInputs(NoiseModel):
    """White-box attacks on the inputs of the network at the stage's weights: ``max loss(x + d), ||d|| <= budget``.

    - ``fgsm`` (I. Goodfellow et al., ICLR 2015, arXiv 1412.6572): one step of full length along the steepest
      direction of the norm.
    - ``pgd`` (A. Madry et al., ICLR 2018, arXiv 1706.06083): ``steps`` steps ``d <- P(d + step * direction)`` from a
      random start, P the projection onto the ball.

    The direction is the gradient's sign for linf, the gradient over its norm for l2, and for l1 the signs of the
    largest 1 % of its entries (F. Tramer and D. Boneh, NeurIPS 2019, arXiv 1904.13000). Each sample gets the iterate
    of the highest loss; where none is above that of the sample itself, it stays as it was. Inputs are not clipped,
    since they are normalised and their range is unknown.

    Attributes:
        attack: ``fgsm`` or ``pgd``.
        norm: ``linf``, ``l2`` or ``l1``.
        budget: Radius of the ball around each input, in the unit of the network's inputs.
        steps: Steps of pgd.
        step: Length of one step of pgd; 0 takes ``2.5 * budget / steps`` (Madry et al.).
        fraction: Part of the samples that is attacked, drawn without replacement.
        key: Where the inputs lie in batches that are mappings. Otherwise a batch's first part is taken.
    """

    attack: str = "pgd"
    norm: str = "linf"
    budget: float = 0.1
    steps: int = 10
    step: float = 0.0
    fraction: float = 1.0
    key: str = ""

    def __post_init__(self) -> None:
        check_choice("attack", self.attack, ("fgsm", "pgd"))
        check_choice("norm", self.norm, ("linf", "l2", "l1"))
        check_number("budget", self.budget, 0)
        check_number("steps", self.steps, 1, whole=True)
        check_number("step", self.step, 0)
        check_number("fraction", self.fraction, 0, 1)

    def corrupt(self, batches: list[Any], generator: torch.Generator, model: nn.Module, loss_fn: LossFn) -> list[Any]:
        """Return batches with attacked inputs, as copies."""
        parts = [inputs_of(batch, self.key) for batch in batches]
        attacked = []
        with eval_mode(model):
            check_calibration(model, loss_fn, batches)
            for batch, inputs, hit in zip(batches, parts, choose(parts, self.fraction, generator), strict=True):
                changed = inputs.clone()
                for index in torch.split(hit.nonzero().squeeze(1), _CHUNK):
                    samples = select_samples(batch, index)
                    changed[index] = self._attack(samples, generator, model, loss_fn)
                attacked.append(replace_part(batch, 0, self.key, changed))
        return attacked

    def _attack(self, batch: Any, generator: torch.Generator, model: nn.Module, loss_fn: LossFn) -> Tensor:
        """Return the inputs of the highest loss, (m, ...)."""
        inputs = inputs_of(batch, self.key)

        @torch.enable_grad()
        def ascent(shift: Tensor) -> tuple[Tensor, Tensor]:
            moved = (inputs + shift).requires_grad_()
            losses = loss_fn(model, replace_part(batch, 0, self.key, moved))
            if len(losses) != len(inputs):
                raise ValueError(f"noise adversarial needs one loss an input, got {len(losses)} for {describe(inputs)}")
            if not losses.requires_grad:
                raise ValueError("noise adversarial needs a loss that is differentiable in the inputs; this one is not")
            (gradient,) = torch.autograd.grad(losses.sum(), moved, allow_unused=True, materialize_grads=True)
            return losses.detach(), _direction(gradient, self.norm)

        shift, steps, length = torch.zeros_like(inputs), 1, self.budget
        best, (highest, direction) = shift, ascent(shift)
        if self.attack == "pgd":
            shift = _random_start(inputs, self.norm, self.budget, generator)
            steps, length = self.steps, self.step or 2.5 * self.budget / self.steps
            _, direction = ascent(shift)
        for _ in range(steps):
            shift = _project(shift + length * direction, self.norm, self.budget)
            losses, direction = ascent(shift)
            best = torch.where(_per_sample(losses > highest, best), shift, best)
            highest = highest.maximum(losses)
        return inputs + best


@dataclass(frozen=True)
class PoisonedRows(RowNoise):
    """A part of the rows of G is written by an attacker, as in Byzantine learning.

    Attributes:
        kind: ``scale``: the attacker multiplies its own rows by ``strength``; -1 flips their signs (L. Li et al.,
            AAAI 2019, arXiv 1811.03761). ``gaussian``: it sends normal noise, its deviation ``strength`` times the
            root mean square of the row replaced. ``omniscient``: it sends ``-strength`` times the mean of the honest
            rows (both P. Blanchard et al., NeurIPS 2017, arXiv 1703.02757).
        fraction: Part of the rows, in [0, 1]: ``fraction * n`` of them on average, and never further from it than the
            next whole number, drawn without replacement. So a few rows, such as the gradients of batches that a slope
            is averaged over, are hit as often as many.
        strength: Factor; negative with ``scale`` only.
    """

    kind: str = "scale"
    fraction: float = 0.1
    strength: float = 10.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("scale", "gaussian", "omniscient"))
        check_number("fraction", self.fraction, 0, 1)
        check_number("strength", self.strength, float("-inf") if self.kind == "scale" else 0)

    def overwrite(self, rows: Tensor, generator: torch.Generator, layers: Layers | None) -> None:
        """Write the attacker's rows into G, (n, p), row by row."""
        chance = float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
        (hit,) = choose([rows], self.fraction, generator, chance)
        honest = (~hit if not bool(hit.all()) else hit).to(rows)
        sent = -self.strength * (rows.T @ honest) / honest.sum() if self.kind == "omniscient" else None
        for i in hit.nonzero().squeeze(1).tolist():
            row = rows[i]
            if sent is not None:
                row.copy_(sent)
            elif self.kind == "scale":
                row.mul_(self.strength)
            else:
                size = torch.linalg.vector_norm(row) / len(row) ** 0.5
                row.copy_(self.strength * size * standard_normal(len(row), generator).to(row))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the ascent direction of unit norm, sample by sample; zero where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    flat = gradient.reshape(len(gradient), -1)
    if norm == "l1":
        top = max(1, round(_SPARSE * flat.shape[1]))
        index = flat.abs().topk(top, dim=1).indices
        flat = torch.zeros_like(flat).scatter(1, index, flat.gather(1, index).sign() / top)
    else:
        flat = torch.nn.functional.normalize(flat, dim=1, eps=torch.finfo(flat.dtype).tiny)
    return flat.view_as(gradient)


def _project(shift: Tensor, norm: str, budget: float) -> Tensor:
    """Return the nearest point of the ball, sample by sample (l1: J. Duchi et al., ICML 2008, figure 1)."""
    if norm == "linf":
        return shift.clamp(-budget, budget)
    flat = shift.reshape(len(shift), -1)
    if norm == "l2":
        return shift * _per_sample((budget / torch.linalg.vector_norm(flat, dim=1)).clamp(max=1), shift)
    sizes = flat.abs()
    ordered = sizes.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - budget
    counts = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    kept = (ordered * counts > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(1, kept - 1) / kept).clamp(min=0)
    return (flat.sign() * (sizes - threshold).clamp(min=0)).view_as(shift)


def _random_start(inputs: Tensor, norm: str, budget: float, generator: torch.Generator) -> Tensor:
    """Return a random point of the ball: uniform for linf, otherwise of random direction and length."""
    if norm == "linf":
        return budget * (2 * uniform(inputs.shape, generator) - 1).to(inputs)
    drawn, length = standard_normal(inputs.shape, generator), uniform(len(inputs), generator)
    sizes = torch.linalg.vector_norm(drawn.reshape(len(drawn), -1), ord=1 if norm == "l1" else 2, dim=1)
    return (drawn * _per_sample(budget * length / sizes, drawn)).to(inputs)
