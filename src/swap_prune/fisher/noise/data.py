"""Noisy data: corrupted inputs and wrong labels, in calibration and held-out samples alike.

Gradients, slopes and choices then see nothing but noisy data. BatchNorm alone is recalibrated on the data as they came.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.checks import first_line
from swap_prune.fisher.noise.base import NoiseModel, check_choice, check_number
from swap_prune.losses import LossFn, check_labels, describe
from swap_prune.losses.base import IGNORE_INDEX
from swap_prune.network.modes import eval_mode
from swap_prune.process_memory import pass_on_shortage
from swap_prune.randomness import forked_generator, standard_normal, uniform
from swap_prune.samples.batches import map_tensors, replace_part

__all__ = ["InputNoise", "LabelNoise", "choose", "inputs_of"]


_STD = (0.35, 0.5, 0.8, 1.2, 1.7)  # in standard deviations of the sample
_IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)  # part of the entries
_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # in 1/32 of the shorter side
_PATCH = (0.2, 0.3, 0.4, 0.5, 0.6)  # part of each side


@dataclass(frozen=True)
class InputNoise(NoiseModel):
    """Common corruptions of inputs, after D. Hendrycks and T. Dietterich (ICLR 2019, arXiv 1903.12261).

    The scale of the pixels is unknown here (inputs are normalised), so it is taken from each sample, and nothing is
    clipped to a range. Severities 1 to 5:

    - ``gaussian``: ImageNet-C's deviations (.08 to .38 of the pixel range) divided by 0.225, the deviation of
      ImageNet's pixels: 0.35, 0.5, 0.8, 1.2, 1.7 times the sample's own.
    - ``impulse``: salt and pepper; 3, 6, 9, 17, 27 % of the entries (ImageNet-C) become the sample's maximum or
      minimum.
    - ``blur``: Gaussian of 0.4, 0.6, 0.7, 0.8, 1.0 pixels in an image of 32 (CIFAR-10-C), in proportion in others.
    - ``occlusion``: a patch at a random place is set to 0 (T. DeVries and G. Taylor, arXiv 1708.04552), its sides
      20, 30, 40, 50, 60 % of the image's.

    Attributes:
        kind: ``gaussian``, ``impulse``, ``blur`` or ``occlusion``. The last two need (n, channels, side, ...).
        severity: 1 to 5.
        fraction: Part of the samples that is corrupted, drawn without replacement.
        key: Where the inputs lie in batches that are mappings. Otherwise a batch's first part is taken.
    """

    kind: str = "gaussian"
    severity: int = 3
    fraction: float = 1.0
    key: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, _CORRUPTIONS)
        check_number("severity", self.severity, 1, len(_STD), whole=True)
        check_number("fraction", self.fraction, 0, 1)

    def corrupt(self, batches: list[Any], generator: torch.Generator, model: nn.Module, loss_fn: LossFn) -> list[Any]:
        """Return batches whose inputs are corrupted, as copies."""
        parts = [inputs_of(batch, self.key) for batch in batches]
        noisy = []
        for batch, inputs, hit in zip(batches, parts, choose(parts, self.fraction, generator), strict=True):
            if self.kind in ("blur", "occlusion") and inputs.ndim < 3:
                raise ValueError(
                    f"noise input:kind={self.kind} needs inputs (n, channels, side, ...), got {tuple(inputs.shape)}; "
                    "use kind=gaussian or kind=impulse"
                )
            changed = inputs.clone()
            if bool(hit.any()):
                changed[hit] = _CORRUPTIONS[self.kind](inputs[hit], self.severity - 1, generator)
            noisy.append(replace_part(batch, 0, self.key, changed))
        return noisy


@dataclass(frozen=True)
class LabelNoise(NoiseModel):
    """Wrong labels, as a property of the data: a sample that comes again has the same label again.

    Whether a label is wrong, and which it is then, is drawn for each sample by itself, from a random state that the
    run's seed and the sample's own numbers give. So noise does not average out over the stages of a run that draws the
    same samples again. Samples that are augmented are others each time.

    Attributes:
        kind: ``symmetric``: any other class, all equally likely (B. van Rooyen et al., NeurIPS 2015, arXiv 1505.07634);
            ``pair``: the next class, the last one becoming the first (B. Han et al., NeurIPS 2018,
            arXiv 1804.06872).
        fraction: Probability that a label is wrong, in [0, 1]. Labels of -100 (no label) stay as they are.
        classes: Number of classes; 0 takes the network's outputs.
        key: Where the labels lie in batches that are mappings. Otherwise a batch's second part is taken.
    """

    kind: str = "symmetric"
    fraction: float = 0.2
    classes: int = 0
    key: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("symmetric", "pair"))
        check_number("fraction", self.fraction, 0, 1)
        check_number("classes", self.classes, 0, whole=True)
        if self.classes == 1:
            raise ValueError("noise setting classes must be 0 or at least 2, got 1")

    def corrupt(self, batches: list[Any], generator: torch.Generator, model: nn.Module, loss_fn: LossFn) -> list[Any]:
        """Return batches with wrong labels, as copies."""
        labels = [_part_of(batch, 1, self.key, "labels") for batch in batches]
        classes = self.classes or _outputs(model, batches[0])
        for part in labels:
            if part.is_floating_point() or part.ndim == 0:
                raise ValueError(f"noise labels needs class indices (n, ...), got {describe(part)}")
            check_labels(part[~_is_ignored(part)], classes)
            if classes - 1 > (1 if part.dtype == torch.bool else torch.iinfo(part.dtype).max):
                raise ValueError(f"noise labels cannot write {classes} classes into labels of {part.dtype}: use int64")
        return [
            replace_part(batch, 1, self.key, self._wrong(batch, part, classes, generator.initial_seed()))
            for batch, part in zip(batches, labels, strict=True)
        ]

    def _wrong(self, batch: Any, labels: Tensor, classes: int, seed: int) -> Tensor:
        """Return the labels (n, ...) of a batch with some of them wrong."""
        shifts = torch.zeros(labels.shape, dtype=torch.long, device="cpu")
        for shift, digest in zip(shifts, _digests(batch, len(labels)), strict=True):
            source = forked_generator(seed, digest)
            hit = uniform(shift.shape, source) < self.fraction
            most = classes if self.kind == "symmetric" else 2
            shift.copy_(torch.randint(1, most, shift.shape, generator=source, device="cpu") * hit)
        wrong = ((labels.long() + shifts.to(labels.device)) % classes).to(labels.dtype)
        return torch.where(_is_ignored(labels), labels, wrong)


def _is_ignored(labels: Tensor) -> Tensor:
    """Return where there is no label; unsigned numbers have none to say so."""
    return labels == IGNORE_INDEX if labels.dtype.is_signed else torch.zeros_like(labels, dtype=torch.bool)


def _digests(batch: Any, count: int) -> list[str]:
    """Return what tells each of some samples from others: a hash of all that the batch holds of it."""
    hashes = [hashlib.sha256() for _ in range(count)]

    def add(tensor: Tensor) -> None:
        if tensor.ndim == 0 or len(tensor) != count:
            return
        for one, sample in zip(hashes, tensor.detach().cpu().contiguous(), strict=True):
            one.update(sample.reshape(-1).view(torch.uint8).numpy())

    map_tensors(add, batch)
    return [one.hexdigest() for one in hashes]


def inputs_of(batch: Any, key: str) -> Tensor:
    """Return the inputs (n, ...) of a batch.

    Raises:
        ValueError: If they cannot be found or are not floating-point numbers.
    """
    inputs = _part_of(batch, 0, key, "inputs")
    if not inputs.is_floating_point() or inputs.ndim == 0:
        raise ValueError(f"noise on inputs needs floating-point inputs (n, ...), got {describe(inputs)}")
    return inputs


def choose(parts: Sequence[Tensor], fraction: float, generator: torch.Generator, chance: float = 0.5) -> list[Tensor]:
    """Choose ``floor(fraction * n + chance)`` of the n entries that the parts hold together.

    Args:
        parts: Tensors (n_b, ...).
        fraction: Part of the entries, in [0, 1].
        generator: Random state.
        chance: In [0, 1): one half rounds; a uniform draw gives ``fraction * n`` on average.

    Returns:
        A boolean mask (n_b,) for each part, on its device.
    """
    sizes = [len(part) for part in parts]
    total = sum(sizes)
    hit = torch.zeros(total, dtype=torch.bool, device="cpu")
    hit[torch.randperm(total, generator=generator, device="cpu")[: math.floor(fraction * total + chance)]] = True
    return [mask.to(part.device) for mask, part in zip(torch.split(hit, sizes), parts, strict=True)]


def _part_of(batch: Any, position: int, key: str, what: str) -> Tensor:
    if isinstance(batch, Mapping):
        if key not in batch:
            raise ValueError(
                f"noise cannot tell the {what} of a batch with keys {sorted(map(str, batch))}, got key={key!r}; "
                "name one of them as key"
            )
        part = batch[key]
    elif isinstance(batch, Tensor) and position == 0:
        part = batch
    elif isinstance(batch, Sequence) and len(batch) > position:
        part = batch[position]
    else:
        raise ValueError(f"noise needs batches (inputs, labels) or mappings to find {what}, got {describe(batch)}")
    if not isinstance(part, Tensor):
        raise ValueError(f"noise needs {what} that are a tensor, got {describe(part)}")
    return part


def _outputs(model: nn.Module, batch: Any) -> int:
    try:
        with eval_mode(model), torch.no_grad():
            return int(model(_part_of(batch, 0, "", "inputs")[:1]).shape[1])
    except Exception as error:  # whatever the caller's model raises
        pass_on_shortage(error)
        reason = first_line(error, typed=True)
        raise ValueError(f"noise labels cannot count the network's classes ({reason}); set classes") from error


def _gaussian(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    deviation = x.reshape(len(x), -1).std(1, correction=0).view(-1, *[1] * (x.ndim - 1))
    return x + _STD[severity] * deviation * standard_normal(x.shape, generator).to(x)


def _impulse(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    low, high = (bound.view(-1, *[1] * (x.ndim - 1)) for bound in x.reshape(len(x), -1).aminmax(dim=1))
    draw = uniform(x.shape, generator).to(x.device)
    part = _IMPULSES[severity]
    return torch.where(draw < part / 2, low, torch.where(draw < part, high, x))


def _blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    sigma = _BLUR[severity] * min(x.shape[2:]) / 32
    for dim in range(2, x.ndim):
        place = torch.arange(x.shape[dim], device=x.device, dtype=torch.float64)
        kernel = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum(1, keepdim=True)).to(x)  # at the borders, the mean of what is there
        x = (x.movedim(dim, -1) @ kernel.T).movedim(-1, dim)
    return x


def _occlusion(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    hidden = torch.ones(len(x), *[1] * (x.ndim - 1), dtype=torch.bool, device=x.device)
    for dim in range(2, x.ndim):
        length = x.shape[dim]
        side = math.ceil(_PATCH[severity] * length)
        start = torch.randint(length - side + 1, (len(x), 1), generator=generator, device="cpu")
        place = torch.arange(length, device="cpu")
        inside = (place >= start) & (place < start + side)
        hidden = hidden & inside.view(len(x), *[length if d == dim else 1 for d in range(1, x.ndim)]).to(x.device)
    return x.masked_fill(hidden, 0)


_CORRUPTIONS = {"gaussian": _gaussian, "impulse": _impulse, "blur": _blur, "occlusion": _occlusion}
