"""Accuracy and loss of a classifier on a data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swap_prune.checks import first_line
from swap_prune.experiments.images import iterate
from swap_prune.losses import check_labels, check_pair, describe, errors_worded
from swap_prune.network.layout import images_laid_out, takes_channels_last
from swap_prune.network.modes import eval_mode, exact_kernels
from swap_prune.process_memory import pass_on_shortage

__all__ = ["Evaluation", "evaluate"]

_END = object()  # of the test data


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation.

    Attributes:
        accuracy: Correct top-1 predictions, in percent; one whose logits hold NaN is wrong.
        loss: Mean cross-entropy; None when it is not finite.
        samples: Number of samples.
        undefined: How many of them have logits that hold NaN.
    """

    accuracy: float
    loss: float | None
    samples: int
    undefined: int = 0

    @property
    def notes(self) -> list[str]:
        """What a reader should know."""
        if self.undefined == 0:
            return []
        return [f"the outputs of {self.undefined} of {self.samples} test samples are not numbers: they count as wrong"]


def evaluate(model: nn.Module, dataset: Any | Iterable[Any], batch_size: int = 256) -> Evaluation:
    """Evaluate a classifier in eval mode, on the device where it is.

    Args:
        model: Maps inputs to logits (n, classes).
        dataset: A Dataset or an iterable of batches ``(inputs, targets)``.
        batch_size: Samples a batch, for a Dataset.

    Raises:
        ValueError: If the data is empty or does not fit the model, or a label is out of range.
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    correct, total, undefined, loss = 0, 0, 0, 0.0
    with eval_mode(model), torch.no_grad(), exact_kernels(device), ExitStack() as layout:
        for batch in _read(dataset, batch_size):
            check_pair(batch)
            inputs, targets = (part.to(device) for part in batch)
            if len(targets) == 0:
                continue
            if total == 0:
                laid = takes_channels_last(model, _forward, inputs[:1], backwards=False)
                layout.enter_context(images_laid_out(model, laid))
            try:
                logits = model(inputs)
            except Exception as error:  # whatever the caller's model raises
                pass_on_shortage(error)
                reason = first_line(error, typed=True)
                raise ValueError(f"the model failed on test images {describe(inputs)}: {reason}") from error
            if not isinstance(logits, Tensor):
                raise ValueError(
                    f"evaluation needs a model that returns logits (n, classes), got a {type(logits).__name__}: "
                    "wrap it in one that does"
                )
            if logits.ndim != 2 or targets.shape != logits.shape[:1]:
                raise ValueError(
                    f"evaluation needs logits (n, classes) and labels (n,), got {tuple(logits.shape)} and "
                    f"{tuple(targets.shape)}"
                )
            if targets.is_floating_point():
                raise ValueError(f"evaluation needs class indices for labels, got {targets.dtype}: convert them")
            check_labels(targets, logits.shape[1])
            bad = logits.isnan().any(1)
            correct += int(((logits.argmax(1) == targets) & ~bad).sum())
            undefined += int(bad.sum())
            loss += float(functional.cross_entropy(logits.double(), targets.long(), reduction="sum"))
            total += len(targets)
    if total == 0:
        raise ValueError("the test data is empty: nothing to evaluate on")
    mean = loss / total
    return Evaluation(100 * correct / total, mean if math.isfinite(mean) else None, total, undefined)


def _read(dataset: Any | Iterable[Any], batch_size: int) -> Iterator[Any]:
    """Yield batches of test data, and word what fails there."""
    batches = iterate(dataset, batch_size=batch_size)
    while True:
        with errors_worded(lambda reason: f"the test data failed: {reason}"):
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


def _forward(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs: Tensor = model(inputs)
    return outputs
