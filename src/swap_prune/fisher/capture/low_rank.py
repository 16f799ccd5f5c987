"""Low-rank rows of G straight from the activations and output gradients of the layers.

With A (T, d) what a layer saw of one sample at its T tokens or positions and D (T, out) what came back, the gradient of
its weight is ``M = D^T A``. Its leading outer products come from a subspace iteration with M (Halko, Martinsson and
Tropp, 2011, algorithm 4.4; :mod:`~swap_prune.fisher.capture.outer_products`). One token is its own outer product, and
exact.

Depthwise layers, whose matrices have one column for each place of the kernel, and layers too small for a gain keep
their rows.

A row that belongs to a whole mini-batch, because BatchNorm works on its statistics, is the same sum over the tokens of
all its samples: one "sample" with more tokens. Its matrix has a higher rank, and more outer products are kept of it.

Place in the pipeline: instead of ``capture_gradients``, for solvers that work with any ``FisherFactor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swap_prune.checks import whole_number
from swap_prune.fisher.backends.low_rank import LowRankFactor
from swap_prune.fisher.capture.hooks import OutputGradients, check_against
from swap_prune.fisher.capture.layers import UnsupportedLayerError
from swap_prune.fisher.capture.outer_products import Collector, LayerCalls, is_outer
from swap_prune.fisher.capture.rows import Capture, capture_gradients
from swap_prune.fisher.capture.source import RowSource, write_batch_gradient
from swap_prune.fisher.storage import AT_ONCE, Storage
from swap_prune.losses import LossFn, check_calibration, check_losses, least_precise
from swap_prune.network.modes import batch_statistics, eval_mode
from swap_prune.samples.batches import batch_size, is_sliceable, slice_batch, split_batches
from swap_prune.selection import Selection

__all__ = ["BATCH_RANK", "RANK", "capture_low_rank", "numbers_of_a_row"]

RANK = 3  # outer products that are kept of a row
BATCH_RANK = 16  # of the row of a mini-batch
_CHECKED = 2  # samples
_OTHERWISE = "use another storage, such as 'matrix-free', or select other weights with targets= and ignore="


def capture_low_rank(
    model: nn.Module,
    selection: Selection,
    source: RowSource,
    advance: Callable[[int], None] = lambda _count: None,
    at_once: int = AT_ONCE,
    *,
    rank: int | None = None,
) -> Capture:
    """Compute G, (n, p), with rows of low rank in each layer, at the model's current weights.

    Args:
        model: The network; its weights, buffers and modes are as before when this returns.
        selection: The p weights that gradients are taken of: of products only.
        source: What the rows are gradients of.
        advance: Called with the number of samples that were done, for progress.
        at_once: Samples that run through the network at once, at the most, where memory is a GPU's.
        rank: Outer products kept of each row, in each layer; by default 3, or 16 where rows are joined.

    Returns:
        G as a :class:`LowRankFactor`, and the losses.

    Raises:
        ValueError: If the rank is not at least 1, a batch cannot be split in samples, a selected weight is used
            in other ways than in products, or as for ``capture_gradients``.
    """
    batches, loss_fn = source.batches, source.function
    kept = whole_number("rank", rank if rank is not None else BATCH_RANK if source.in_batches else RANK)
    if not batches or not all(map(is_sliceable, batches)):
        raise ValueError(
            "batches must be at least one, of tensors with samples in front, for low-rank rows (what all samples share "
            f"has a first dimension of 1, such as mask[None]); {_OTHERWISE}"
        )
    try:
        collector = Collector({name: LayerCalls(kept) for name in selection.names})
        if source.in_batches:
            losses, chunk = _capture_batches(model, selection, batches, loss_fn, collector, advance)
        else:
            losses, chunk = _capture_samples(model, selection, batches, loss_fn, collector, advance, at_once)
        losses = losses if source.losses is None else source.losses
        return Capture(LowRankFactor(collector.rows(selection.dtype(model))), losses, "hooks", chunk)
    except UnsupportedLayerError as error:
        raise ValueError(f"low-rank rows do not suit the network: {error}; {_OTHERWISE}") from error


def numbers_of_a_row(model: nn.Module, selection: Selection, *, in_batches: bool) -> int:
    """Return how many numbers a row takes at the most.

    Args:
        model: The network.
        selection: The selected weights.
        in_batches: Whether a mini-batch makes one row.

    Raises:
        UnsupportedLayerError: If a selected parameter is no weight of two dimensions or more, which alone multiply.
    """
    rank, total = BATCH_RANK if in_batches else RANK, 0
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    parameters = dict(model.named_parameters())
    for name, shape in selection.shapes.items():
        if len(shape) < 2:
            raise UnsupportedLayerError(f"{name!r} has shape {tuple(shape)}, and multiplies no inputs", (name,))
        owner = owners[id(parameters[name])]
        groups = owner.groups if isinstance(owner, _ConvNd) else 1
        out, width = shape[0] // groups, math.prod(shape[1:])
        outer = is_outer(shape, groups, rank)
        total += groups * min(rank, out, width) * (out + width) if outer else shape.numel()
    return total


def _capture_samples(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    loss_fn: LossFn,
    collector: Collector,
    advance: Callable[[int], None],
    at_once: int,
) -> tuple[Tensor, int]:
    """Collect a row a sample; return the losses and the samples that ran at once."""
    first = slice_batch(batches[0], 0, _CHECKED)
    try:
        storage = Storage(at_once=at_once)
        probe = capture_gradients(model, selection, [first], loss_fn, backend="hooks", storage=storage)  # says why not
    except ValueError as error:
        if isinstance(error.__cause__, UnsupportedLayerError):
            raise error.__cause__ from None
        raise
    chunk = max(1, probe.chunk // 2)  # the gradients of outputs are kept besides the activations
    losses = []
    with eval_mode(model):
        check_calibration(model, loss_fn, batches)
        gradients = OutputGradients(model, selection, loss_fn)
        for part in split_batches(batches, chunk):
            count = batch_size(part)
            losses.append(check_losses(gradients.run(part, collector.see, count), count))
            collector.finish(batch_size(part), dict(model.named_parameters()))
            advance(batch_size(part))
    return torch.cat(losses), chunk


def _capture_batches(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    loss_fn: LossFn,
    collector: Collector,
    advance: Callable[[int], None],
) -> tuple[Tensor, int]:
    """Collect a row a batch; the first is compared with that of a backward pass to the weights."""

    def scaled(network: nn.Module, batch: Any) -> Tensor:
        scale: float = batch_size(batch) ** -0.5
        return loss_fn(network, batch) * scale

    weights = selection.read(model)
    losses = []
    with batch_statistics(model):
        gradients = OutputGradients(model, selection, scaled)
        found, expected = weights.new_empty(2, 1, len(weights))
        values = gradients.fill_rows(batches[0], found, in_batches=True)
        write_batch_gradient(expected[0], model, selection, batches[0], loss_fn)
        check_against((found, values), (expected, values), selection, least_precise(model.parameters()))
        for batch in batches:
            losses.append(gradients.run(batch, collector.see) * batch_size(batch) ** 0.5)
            collector.finish(1, dict(model.named_parameters()))
            advance(batch_size(batch))
    return torch.cat(losses), max(map(batch_size, batches))
