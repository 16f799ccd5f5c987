"""BatchNorm's running statistics, estimated anew: pruning moves the activations that they describe.

Place in the pipeline: the end of a stage; before the first, where the stored statistics do not fit the data at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_prune.losses import LossFn, check_calibration, run_loss
from swap_prune.network.calls import layer_input
from swap_prune.network.modes import batch_statistics, eval_mode, is_frozen
from swap_prune.samples.batches import is_single
from swap_prune.samples.calibration import CalibrationStream

__all__ = [
    "batchnorm_layers",
    "batchnorm_misfit",
    "normalises_vectors",
    "recalibrate_batchnorm",
    "repair_batchnorm",
]

RECALIBRATION_SAMPLES = 10_000  # at the end of a run; all the data, if it holds fewer
MISFIT_SAMPLES = 512
_KIND = "batch for BatchNorm's statistics"
_MISFIT, _MISFIT_MARGIN = 1.5, 0.1  # stored statistics are given up when their loss exceeds 1.5 own + 0.1


def batchnorm_layers(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers that keep running statistics, and are not frozen by ``track_running_stats=False``."""
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [layer for layer in layers if layer.running_mean is not None and not is_frozen(layer)]


def normalises_vectors(model: nn.Module) -> bool:
    """Whether a BatchNorm layer has a number or few of each sample, and not one for each position of an image."""
    return any(isinstance(layer, nn.BatchNorm1d) for layer in batchnorm_layers(model))


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn) -> bool:
    """Estimate BatchNorm's running statistics anew: the average over the batches, by the values that each has.

    Everything but BatchNorm stays in eval mode. Batches of one sample are passed over, since they have no
    variance. A layer that no batch reaches, such as that of another task's head, keeps its statistics.

    Args:
        model: The network; only its BatchNorm buffers change.
        batches: Batches on the model's device; each is read once, when its turn comes.
        loss_fn: Used to run the network on a batch.

    Returns:
        Whether any layer was: not where there is none, or no batch was usable.

    Raises:
        ValueError: If reading a batch or running it fails, or the statistics are not finite. The buffers are then not
            what they were.
    """
    layers = batchnorm_layers(model)
    usable = (batch for batch in batches if not is_single(batch))
    first = list(itertools.islice(usable, 1))
    if not layers or not first:
        return False
    before = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    with _averaging(model, layers) as seen, torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()  # type: ignore[operator]
        for batch in itertools.chain(first, usable):
            run_loss(model, batch, loss_fn, _KIND)
        for layer, values in zip(layers, before, strict=True):
            if seen[layer] == 0:
                for buffer, value in zip(layer.buffers(), values, strict=True):
                    buffer.copy_(value)
    if not all(bool(buffer.isfinite().all()) for layer in layers for buffer in layer.buffers()):
        raise ValueError(
            "BatchNorm's statistics of the data are not finite: a sample holds NaN or infinity, or grows to it in the "
            "network; leave it out, or use recalibrate_batchnorm=False"
        )
    return True


@contextmanager
def _averaging(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[Mapping[nn.Module, int]]:
    """Run a block in eval mode, but for BatchNorm, whose running statistics become means over the batches.

    Each batch counts by the values a channel that it brings, from the first one on; those of no sample bring none.

    Yields:
        How many values a channel each layer has seen so far.
    """
    seen, momenta = dict.fromkeys(layers, 0), [layer.momentum for layer in layers]

    def set_momentum(layer: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs = layer_input(arguments, named)
        values = inputs.numel() // inputs.shape[1]
        seen[layer] += values
        layer.momentum = values / max(1, seen[layer])  # type: ignore[assignment]

    with eval_mode(model):
        for layer in layers:
            layer.training = True
        handles = [layer.register_forward_pre_hook(set_momentum, with_kwargs=True) for layer in layers]
        try:
            yield seen
        finally:
            for layer, handle, momentum in zip(layers, handles, momenta, strict=True):
                handle.remove()
                layer.momentum = momentum


def batchnorm_misfit(model: nn.Module, batches: Sequence[Any], loss_fn: LossFn) -> tuple[float, float]:
    """Compare the stored statistics with those of the data.

    Args:
        model: The network; nothing of it changes, if its BatchNorm heeds ``track_running_stats``.
        batches: Batches on the model's device.
        loss_fn: Per-sample loss.

    Returns:
        The mean loss with the stored statistics, and with each batch's own; equal without BatchNorm.
    """
    usable = [batch for batch in batches if not is_single(batch)]
    if not batchnorm_layers(model) or not usable:
        return 0.0, 0.0
    means = []
    for mode in (eval_mode, batch_statistics):
        with mode(model), torch.no_grad():
            losses = torch.cat([run_loss(model, batch, loss_fn, _KIND) for batch in usable])
            means.append(float(losses.double().mean()))
    stored, own = means
    return stored, own


def repair_batchnorm(model: nn.Module, stream: CalibrationStream, loss_fn: LossFn) -> list[str]:
    """Recalibrate a network whose stored statistics do not fit the data at all.

    Args:
        model: The network; only its BatchNorm buffers may change.
        stream: Data to judge by, and to recalibrate with.
        loss_fn: Per-sample loss.

    Returns:
        What was found and done, as a sentence; empty when the statistics fit.

    Raises:
        ValueError: If the data are empty, a batch does not fit the loss, or a loss or the statistics are not finite.
    """
    if not batchnorm_layers(model):
        return []
    batches = stream.draw(MISFIT_SAMPLES)
    with eval_mode(model):
        check_calibration(model, loss_fn, batches[:1])
    stored, own = batchnorm_misfit(model, batches, loss_fn)
    if not math.isfinite(own):
        raise ValueError(
            f"the mean loss of {MISFIT_SAMPLES} samples is {own} with BatchNorm on the statistics of each batch: "
            "check the samples for NaN and infinity, or use recalibrate_batchnorm=False"
        )
    if stored <= _MISFIT * own + _MISFIT_MARGIN:
        return []
    recalibrate_batchnorm(model, stream.read(RECALIBRATION_SAMPLES), loss_fn)
    return [
        f"BatchNorm's stored statistics did not fit the data (mean loss {stored:.3f}, against {own:.3f} with the "
        "batches' own) and were recalibrated first"
    ]
