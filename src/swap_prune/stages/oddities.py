"""What is odd about the calibration samples of a stage, and worth a note in the report.

Place in the pipeline: beside the capture, whose losses are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.losses import CrossEntropy, LossFn
from swap_prune.network.modes import eval_mode
from swap_prune.samples.batches import slice_batch

__all__ = ["few_classes", "one_that_rules"]

_RULES = 0.5  # of what losses have above their median: as much for one sample alone
_LEAST_SAMPLES = 32  # of which one is not to have that much


def few_classes(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any]) -> dict[str, list[int]]:
    """Look for data in the order of their classes: labels of less than half of those that there could be.

    Returns:
        For the report: how many classes labels are of, how many there are, and how many labels; else nothing.
    """
    if not isinstance(loss_fn, CrossEntropy):
        return {}
    with eval_mode(model), torch.no_grad():
        outputs = loss_fn.outputs(model, slice_batch(batches[0], 0, 2))
    labels = [batch[1] for batch in batches]
    if outputs.ndim != 2 or any(one.is_floating_point() for one in labels):
        return {}
    count, classes = sum(map(len, labels)), outputs.shape[1]
    seen = len(set(torch.cat(labels).tolist()))
    return {"few_classes": [seen, classes, count]} if 2 * seen < min(classes, count) else {}


def one_that_rules(losses: Tensor) -> dict[str, float]:
    """Look for one sample that has most of the loss, as a number that stands for a missing target gives it.

    Args:
        losses: Of the samples, (n,).

    Returns:
        For the report: its share of what losses have above their median; else nothing.
    """
    if len(losses) < _LEAST_SAMPLES:
        return {}
    above = (losses.double() - losses.double().median()).clamp_min(0)
    share = float(above.max() / above.sum().clamp_min(torch.finfo(above.dtype).tiny))
    return {"one_sample_rules": share} if share > _RULES else {}
