"""Where pruning changes a model: selected weights, and BatchNorm's statistics.

The solution is written to the parameters in place, then the running statistics of BatchNorm are estimated anew, since
pruning moves the activations that they describe.

Place in the pipeline: the end of a stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_prune.fisher.layers import layer_input
from swap_prune.losses import LossFn, check_calibration, run_loss
from swap_prune.network.modes import batch_statistics, eval_mode, is_frozen
from swap_prune.samples.batches import is_single
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.selection import Selection

__all__ = [
    "Snapshot",
    "batchnorm_layers",
    "batchnorm_misfit",
    "bystanders_given_back",
    "fill_lost",
    "recalibrate_batchnorm",
    "repair_batchnorm",
    "restored_on_error",
    "temporary_weights",
    "unexpanded",
    "write_weights",
]

RECALIBRATION_SAMPLES = 10_000  # at the end of a run; all the data, if it holds fewer
MISFIT_SAMPLES = 512
_KIND = "batch for BatchNorm's statistics"
_MISFIT, _MISFIT_MARGIN = 1.5, 0.1  # stored statistics are given up when their loss exceeds 1.5 own + 0.1


def write_weights(model: nn.Module, selection: Selection, weights: Tensor, kept: Tensor) -> None:
    """Write w to the selected parameters; what is not kept becomes exactly zero.

    A kept weight that the parameter's dtype would round to zero becomes the smallest number that it has, so
    that storing in half precision does not change the sparsity; one that it would round to infinity the largest.

    Args:
        model: The network, changed in place.
        selection: Where the p weights lie.
        weights: w, (p,).
        kept: Kept set, (p,), boolean.
    """
    parameters = dict(model.named_parameters())
    masks = selection.split(kept)
    with torch.no_grad():
        for name, values in selection.split(weights).items():
            parameter = parameters[name]
            largest = torch.finfo(parameter.dtype).max
            stored = values.clamp(-largest, largest).to(parameter)
            if stored.dtype != values.dtype:
                lost = (stored == 0) & (values.to(parameter.device) != 0)
                least = torch.finfo(parameter.dtype).smallest_normal
                stored = torch.where(lost, values.sign().to(parameter) * least, stored)
            parameter.copy_(stored.masked_fill(~masks[name].to(parameter.device), 0))


def fill_lost(parameter: nn.Parameter, kept: Tensor) -> None:
    """Give kept weights that became exactly zero, as training in half precision may have it, the smallest number.

    Args:
        parameter: Changed in place.
        kept: Mask of its shape, boolean.
    """
    with torch.no_grad():
        parameter.masked_fill_((parameter == 0) & kept, torch.finfo(parameter.dtype).smallest_normal)


def unexpanded(tensor: Tensor) -> Tensor:
    """Return a view of a tensor that holds each of its numbers once, so that they can be written."""
    if tensor.layout != torch.strided:
        return tensor.detach()
    for dimension, stride in enumerate(tensor.stride()):
        tensor = tensor.narrow(dimension, 0, 1) if stride == 0 and tensor.shape[dimension] > 1 else tensor
    return tensor.detach()


class _Buffers:
    """Buffers of some modules, and the values that they had: a module may write to one, replace it, or resize it."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.held = [
            (module, name, buffer, unexpanded(buffer).clone())
            for module in modules
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]

    def restore(self) -> None:
        """Give them back."""
        with torch.no_grad():
            for module, name, buffer, values in self.held:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                place = unexpanded(buffer)
                if place.shape == values.shape:
                    place.copy_(values)
                else:
                    buffer.data = values.clone()


class Snapshot:
    """What a network has now, to give it back later.

    Args:
        model: The network.
        selection: Only these of the parameters will change; by default all may.
    """

    def __init__(self, model: nn.Module, selection: Selection | None = None) -> None:
        parameters = dict(model.named_parameters())
        chosen = parameters.values() if selection is None else (parameters[name] for name in selection.names)
        self._tensors = list(map(unexpanded, chosen))
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._statistics, self._bystanders = _Buffers(batchnorm_layers(model)), _Buffers(_bystanders(model))

    def restore(self) -> None:
        """Write it to the network."""
        with torch.no_grad():
            for tensor, values in zip(self._tensors, self._values, strict=True):
                tensor.copy_(values)
        self._statistics.restore()
        self.restore_bystanders()

    def restore_bystanders(self) -> None:
        """Write the buffers that are not BatchNorm's statistics: a network may change them whenever it is called."""
        self._bystanders.restore()

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Return the values that a parameter or a buffer has now: those held here, where they are the same."""
        buffers = self._statistics.held + self._bystanders.held
        pairs = [*zip(self._tensors, self._values, strict=True), *((own, values) for _, _, own, values in buffers)]
        for own, values in pairs:
            dense = own.layout == tensor.layout == torch.strided
            if dense and own.data_ptr() == tensor.data_ptr() and (own.shape, own.dtype) == (tensor.shape, tensor.dtype):
                return values if torch.equal(values, tensor) else tensor.detach().clone()
        return tensor.detach().clone()


def _bystanders(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose buffers pruning does not change."""
    statistics = set(batchnorm_layers(model))
    return (module for module in model.modules() if module not in statistics)


@contextmanager
def bystanders_given_back(model: nn.Module) -> Iterator[None]:
    """Run a block that calls a network, then give back the buffers that are not BatchNorm's statistics."""
    before = _Buffers(_bystanders(model))
    try:
        yield
    finally:
        before.restore()


@contextmanager
def restored_on_error(model: nn.Module, selection: Selection | None = None) -> Iterator[Snapshot]:
    """Give the model back what it had if the block does not end well.

    Args:
        model: The network.
        selection: As for :class:`Snapshot`.

    Yields:
        What it had.
    """
    before = Snapshot(model, selection)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


@contextmanager
def temporary_weights(model: nn.Module, selection: Selection, weights: Tensor) -> Iterator[None]:
    """Run a block with other selected weights, then give the model its own back, bit by bit, whatever happened.

    Args:
        model: The network.
        selection: Where the p weights lie.
        weights: The weights meanwhile, (p,).
    """
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in selection.names}
    try:
        with torch.no_grad():
            for name, values in selection.split(weights).items():
                parameters[name].copy_(values)
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                parameters[name].copy_(values)


def batchnorm_layers(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers that keep running statistics, and are not frozen by ``track_running_stats=False``."""
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [layer for layer in layers if layer.running_mean is not None and not is_frozen(layer)]


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
    with _averaging(model, layers), torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()  # type: ignore[operator]
        for batch in itertools.chain(first, usable):
            run_loss(model, batch, loss_fn, _KIND)
        for layer, values in zip(layers, before, strict=True):
            if int(layer.num_batches_tracked) == 0:  # type: ignore[arg-type]
                for buffer, value in zip(layer.buffers(), values, strict=True):
                    buffer.copy_(value)
    if not all(bool(buffer.isfinite().all()) for layer in layers for buffer in layer.buffers()):
        raise ValueError(
            "BatchNorm's statistics of the data are not finite: a sample holds NaN or infinity, or grows to it in the "
            "network; leave it out, or use recalibrate_batchnorm=False"
        )
    return True


@contextmanager
def _averaging(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run a block in eval mode, but for BatchNorm, whose running statistics become means over the batches.

    Each batch counts by the values a channel that it brings, from the first one on.
    """
    seen, momenta = dict.fromkeys(layers, 0), [layer.momentum for layer in layers]

    def set_momentum(layer: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs = layer_input(arguments, named)
        values = inputs.numel() // inputs.shape[1]
        seen[layer] += values
        layer.momentum = values / seen[layer]  # type: ignore[assignment]

    with eval_mode(model):
        for layer in layers:
            layer.training = True
        handles = [layer.register_forward_pre_hook(set_momentum, with_kwargs=True) for layer in layers]
        try:
            yield
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
