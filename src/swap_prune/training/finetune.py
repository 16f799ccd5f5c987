"""Fine-tuning of a pruned network: ordinary training, with what is pruned kept at exactly zero.

    repeat for every epoch and batch:  w <- optimiser(w, m * grad mean loss),  w <- m * w

The masks m are kept by :mod:`swap_prune.training.masks`. Where the dense network is known, the loss is averaged with
the divergence from its outputs (knowledge distillation; Hinton et al., 2015; :mod:`swap_prune.training.teaching`).

Place in the pipeline: after a stage's weights are written and before BatchNorm is recalibrated, where gradual pruning
trains between stages (the paper, section 5); or after pruning, by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from swap_prune.checks import checked_seed
from swap_prune.losses import GaussNewtonLoss, LossFn, check_calibration, cross_entropy, failures_named
from swap_prune.network.device import check_network, check_values, moved, usable_device
from swap_prune.network.layout import images_laid_out, takes_channels_last
from swap_prune.network.modes import check_no_inference, eval_mode, exact_kernels, no_autocast, training_mode
from swap_prune.progress import StageProgress
from swap_prune.randomness import forked_generator, seeded
from swap_prune.samples.batches import batch_size, is_single
from swap_prune.samples.calibration import BATCH, CalibrationStream
from swap_prune.samples.peek import peek
from swap_prune.selection import DEFAULT_TARGETS
from swap_prune.surgery.batchnorm import RECALIBRATION_SAMPLES, batchnorm_layers
from swap_prune.surgery.batchnorm import recalibrate_batchnorm as recalibrate
from swap_prune.surgery.snapshot import restored_on_error
from swap_prune.surgery.weights import fill_lost
from swap_prune.training.masks import MaskKeeper, pair_masks, resolve_masks
from swap_prune.training.settings import OPTIMIZERS, SCHEDULES, FineTune
from swap_prune.training.teaching import Taught, Teacher, taught_losses

__all__ = ["FineTuneReport", "finetune", "train"]


@dataclass(frozen=True)
class FineTuneReport:
    """What a fine-tuning did.

    Attributes:
        epochs: Passes over the data.
        steps: Steps of the optimiser.
        losses: Mean training loss of each epoch, distillation included, while its weights were changing.
        seconds: Wall-clock seconds.
    """

    epochs: int
    steps: int
    losses: tuple[float, ...]
    seconds: float


def finetune(
    model: nn.Module,
    data: Any,
    settings: FineTune | None = None,
    *,
    loss_fn: LossFn | None = None,
    teacher: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    ignore: Sequence[str] = (),
    recalibrate_batchnorm: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> FineTuneReport:
    """Train a pruned network in place; what is pruned stays exactly zero.

    All parameters that require a gradient are trained, in training mode: BatchNorm's running statistics move, dropout
    is active. Modes and gradients are given back afterwards.

    Args:
        model: The network. If anything goes wrong it is left as it was.
        data: Training data: a Dataset or a DataLoader, or an iterable of batches that ``loss_fn`` takes. It has to come
            to an end, if ``settings.steps_per_epoch`` does not end epochs before. What it draws from PyTorch's own
            random state, such as an augmentation, is reproducible from ``seed``, and so is the order of a DataLoader
            that shuffles.
        settings: Optimiser, epochs and so on.
        loss_fn: ``(model, batch) -> (n,)`` per-sample losses, of which the mean is taken; by default the
            cross-entropy of batches ``(inputs, targets)``.
        teacher: The dense network, or any that gives outputs of the same kind: it is learnt from too, in eval mode, as
            ``settings.distillation`` says. It lies where the model does, or is moved with it.
        masks: Parameter name to boolean mask of its shape, true where a weight is kept. By default what is zero now
            is pruned.
        targets: Without ``masks``: where zeros are looked for, as for ``prune``.
        ignore: The same, where they are not.
        recalibrate_batchnorm: Estimate BatchNorm's statistics anew at the end, as
            :func:`swap_prune.recalibrate_batchnorm` does, unless ``data`` is an iterator, which is read only once.
        seed: Seed of the order and of dropout; PyTorch's own random state is the same afterwards.
        device: Where to compute; the model is moved there. By default where it is.
        progress: Show progress on standard error.

    Returns:
        Epochs, steps, losses, seconds.

    Raises:
        ValueError: If an argument, the data, the model or the loss cannot be used, or the training diverges. The
            message says what was received and what to do.
    """
    settings = FineTune() if settings is None else settings
    if not isinstance(settings, FineTune):
        raise ValueError(f"settings must be a swap_prune.FineTune, got {settings!r}")
    seed = checked_seed(seed)
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher must be a torch.nn.Module or None, got a {type(teacher).__name__}")
    check_network(model)
    check_no_inference(model)
    check_values(model)
    if teacher is not None:
        check_values(teacher, "teacher")
    kept = resolve_masks(model, masks, targets, ignore)
    loss = cross_entropy if loss_fn is None else loss_fn
    share = settings.share_of_teacher(loss, known=teacher is not None)
    chosen = None if device is None else usable_device(device)
    generator, place = forked_generator(seed, "fine-tuning"), chosen or next(model.parameters()).device
    stream = CalibrationStream(data, generator, place, max(BATCH, settings.batch_size))
    with (
        torch.inference_mode(False),
        no_autocast(place),  # which keeps copies of weights
        moved(model, chosen),
        moved(teacher, chosen),
        restored_on_error(model),
        images_laid_out(model, takes_channels_last(model, loss, peek(data, place))),
        StageProgress(progress) as shown,
    ):
        dense = None if teacher is None or share == 0 else Teacher(teacher, None, cast(GaussNewtonLoss, loss))
        shown.train(settings.epochs)
        report = train(model, stream, settings, loss, kept, generator, shown.reach, dense)
        if recalibrate_batchnorm and batchnorm_layers(model) and not isinstance(data, Iterator):
            recalibrate(model, stream.read(RECALIBRATION_SAMPLES), loss)
    return report


def train(
    model: nn.Module,
    stream: CalibrationStream,
    settings: FineTune,
    loss_fn: LossFn,
    masks: Mapping[str, Tensor],
    generator: torch.Generator,
    reach: Callable[[float], None],
    teacher: Teacher | None = None,
) -> FineTuneReport:
    """Train under masks; see :func:`finetune`. Nothing is given back on an error.

    Args:
        model: The network, changed in place.
        stream: The data.
        settings: Optimiser, epochs and so on.
        loss_fn: Per-sample loss.
        masks: Parameter name to mask.
        generator: Random state of the order, and of what PyTorch's own is seeded with meanwhile (CPU).
        reach: Called with the number of epochs done, in fractions.
        teacher: The dense network, where it is learnt from.

    Raises:
        ValueError: If there is nothing to train, a mask does not fit, a share of the teacher cannot be had, no batch
            has the two samples that BatchNorm needs, or a loss or a weight is not finite.
    """
    started = time.perf_counter()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: unfreeze what is to be trained")
    share = settings.share_of_teacher(loss_fn, known=teacher is not None)
    pairs = pair_masks(model, masks)
    were_zero = [parameter.detach() == 0 for parameter, _ in pairs]
    losses: list[float] = []
    steps = 0
    with _training(model, trained, generator):
        optimizer = OPTIMIZERS[settings.optimizer](trained, settings)
        with MaskKeeper(pairs, [optimizer]):
            course = _Course(model, optimizer, settings, loss_fn, stream, generator, reach, teacher, share)
            for epoch in range(settings.epochs):
                loss, taken = course.run_epoch(epoch)
                losses.append(loss)
                steps += taken
    for (parameter, mask), zero in zip(pairs, were_zero, strict=True):
        fill_lost(parameter, mask.to(zero.device) & ~zero)
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise ValueError(_diverged("the weights are not finite after the last step", settings))
    return FineTuneReport(settings.epochs, steps, tuple(losses), time.perf_counter() - started)


@dataclass(frozen=True)
class _Course:
    """What all epochs of a training share."""

    model: nn.Module
    optimizer: Optimizer
    settings: FineTune
    loss_fn: LossFn
    stream: CalibrationStream
    generator: torch.Generator
    reach: Callable[[float], None]
    teacher: Teacher | None
    share: float

    def run_epoch(self, epoch: int) -> tuple[float, int]:
        """Train on every sample once, or as many as an epoch has; returns the mean loss and the number of steps."""
        total, samples, steps, most = 0.0, 0, 0, self.settings.steps_per_epoch
        alone = any(isinstance(module, _BatchNorm) for module in self.model.modules())  # one sample has no variance
        for share, batch in self.stream.read_pass(self.settings.batch_size, self.generator):
            if alone and is_single(batch):
                continue
            share = share if most is None else max(share, steps / most)
            if epoch == 0:
                self._check(batch, first=steps == 0)
            loss = self._step((epoch + share) / self.settings.epochs, batch)
            if not math.isfinite(loss):
                where = f"the loss is {loss} in step {steps + 1} of epoch {epoch + 1}"
                raise ValueError(_diverged(where, self.settings))
            size = batch_size(batch)
            total, samples, steps = total + loss * size, samples + size, steps + 1
            self.reach(epoch + share)
            if steps == most:
                break
        if steps == 0:
            raise ValueError(
                "fine-tuning needs batches of at least 2 samples for a network with BatchNorm, got none: raise "
                f"batch_size (now {self.settings.batch_size}), or give larger batches"
            )
        return total / samples, steps

    def _check(self, batch: Any, *, first: bool) -> None:
        """Check a batch of the first epoch: the targets of each, and all else of the first.

        Raises:
            ValueError: If it cannot be trained on.
        """
        if first:
            with eval_mode(self.model):
                check_calibration(self.model, self.loss_fn, [batch])
        elif callable(check := getattr(self.loss_fn, "check_targets", None)):
            with failures_named("training batch", batch):
                check(batch)

    def _step(self, done: float, batch: Any) -> float:
        """Take one step of the optimiser; returns the mean loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * SCHEDULES[self.settings.schedule](done)
        self.optimizer.zero_grad(set_to_none=True)
        taught = Taught(batch) if self.teacher is None else self.teacher.teach([batch])[0]
        with failures_named("training batch", batch):
            losses = taught_losses(self.loss_fn, self.model, taught, self.share, self.settings.temperature)
            loss = losses.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return loss.item()


@contextmanager
def _training(model: nn.Module, trained: Sequence[nn.Parameter], generator: torch.Generator) -> Iterator[None]:
    """Run a block in training mode, with PyTorch's random state seeded; give modes, gradients and states back."""
    gradients = [parameter.grad for parameter in trained]
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    with seeded(seed, trained[0].device), exact_kernels(trained[0].device), training_mode(model), torch.enable_grad():
        for parameter in trained:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient


def _diverged(what: str, settings: FineTune) -> str:
    return f"fine-tuning diverged: {what}; lower lr (now {settings.lr:g}), or check the data and the weights"
