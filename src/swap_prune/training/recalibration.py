"""BatchNorm's statistics of a network that was trained under its mask, estimated anew.

Place in the pipeline: after it, at the end of a training loop of one's own; :func:`swap_prune.prune` and
:func:`swap_prune.finetune` do it by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from swap_prune.checks import checked_seed, whole_number
from swap_prune.losses import LossFn, check_pair, cross_entropy
from swap_prune.network.device import check_network, check_values
from swap_prune.network.modes import check_no_inference, isolated
from swap_prune.randomness import forked_generator, seeded
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.surgery.batchnorm import RECALIBRATION_SAMPLES, batchnorm_layers
from swap_prune.surgery.batchnorm import recalibrate_batchnorm as recalibrate
from swap_prune.surgery.snapshot import bystanders_given_back, statistics_restored_on_error

__all__ = ["recalibrate_batchnorm"]


def recalibrate_batchnorm(
    model: nn.Module,
    data: Any,
    *,
    loss_fn: LossFn | None = None,
    samples: int = RECALIBRATION_SAMPLES,
    seed: int = 0,
) -> bool:
    """Estimate BatchNorm's running statistics anew, as the average over batches of the data.

    Running statistics lag behind the last steps of a training, and a pruned network has channels that are all but
    constant, where a small lag is many standard deviations.

    Args:
        model: The network, on its own device; nothing but BatchNorm's buffers changes. If anything goes wrong they are
            left as they were.
        data: A Dataset, a DataLoader or an iterable of batches, as for :func:`swap_prune.prune`.
        loss_fn: ``(model, batch) -> (n,)``, by which the network is run on a batch: that of :func:`swap_prune.prune`.
            By default the cross-entropy of batches ``(inputs, targets)``.
        samples: How many, at the most.
        seed: Seed of which samples.

    Returns:
        Whether any statistics were estimated: not where no layer keeps some, or no batch holds two samples.

    Raises:
        ValueError: If an argument, the data, the model or the loss cannot be used, or the statistics are not finite.
    """
    check_network(model)
    check_no_inference(model)
    check_values(model)
    samples, generator = whole_number("samples", samples), forked_generator(checked_seed(seed), "recalibration")
    if not batchnorm_layers(model):
        return False
    loss, place = cross_entropy if loss_fn is None else loss_fn, next(model.parameters()).device
    stream = CalibrationStream(data, generator, place)
    with isolated(place), seeded(seed, place), bystanders_given_back(model), statistics_restored_on_error(model):
        return recalibrate(model, _checked(stream.read(samples)) if loss_fn is None else stream.read(samples), loss)


def _checked(batches: Iterable[Any]) -> Iterator[Any]:
    """Pass batches on that the default loss can take apart."""
    for batch in batches:
        if not (isinstance(batch, Sequence) and len(batch) == 2):
            check_pair(batch)
        yield batch
