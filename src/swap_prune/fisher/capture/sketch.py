"""Rows of G from the generalised Gauss-Newton matrix, where the loss knows its curvature.

The empirical Fisher takes the gradients of the losses on the calibration labels. Those are noisy and, where the
network is right, almost zero. The generalised Gauss-Newton matrix has the curvature of the loss itself and needs no
labels. A row here is the gradient of ``<z, L xi>`` with ``L L^T`` the second derivative of the loss at the outputs z,
taken as constant, and xi random signs::

    g = J^T L xi,        E[g g^T] = J^T L E[xi xi^T] L^T J = J^T H J

so that ``G^T G / n`` is an unbiased estimate of it (Rademacher sketch; docs/method.md). A draw of signs sees one of the
directions in which the loss of a sample is curved. Where samples are few, each gives several rows, of draws of its own.

When BatchNorm will be recalibrated after pruning, what matters is the network on the statistics of its own batches.
Rows then are gradients through whole mini-batches, over the root of their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.row_buffer import RowStore
from swap_prune.fisher.capture.rows import Capture, capture_gradients
from swap_prune.fisher.capture.shared_rows import SharedStore
from swap_prune.fisher.capture.source import RowSource, write_batch_gradient
from swap_prune.fisher.capture.stores import open_store
from swap_prune.fisher.storage import Storage
from swap_prune.losses import CrossEntropy, GaussNewtonLoss, check_calibration, check_losses, failures_named
from swap_prune.network.modes import batch_statistics, eval_mode
from swap_prune.samples.batches import batch_size, is_single, split_batches
from swap_prune.selection import Selection

__all__ = [
    "MINI_BATCH",
    "CurvatureSketch",
    "comparable",
    "draw_signs",
    "draw_sketch",
    "mini_batches",
    "most_rows",
    "once_each",
    "sketch_curvature",
    "sketch_draws",
    "sketch_rows",
    "without_singles",
]

MINI_BATCH = 16  # samples that share their statistics, by default
_ENOUGH_ROWS = 1024  # signs are drawn more than once for samples that give fewer,
_MOST_DRAWS = 8  # so often at the most,
_MOST_NUMBERS = 134_217_728  # where G has no more entries than that
_MOST_COMPARED = 536_870_912  # entries of G of single samples, where that may be compared with G of mini-batches


@dataclass(frozen=True)
class CurvatureSketch:
    """``<z, L xi>`` of each sample: a function of (model, (batch, L xi)) whose gradients are the rows.

    Attributes:
        loss: What knows the outputs z, and L.
    """

    loss: GaussNewtonLoss

    def __call__(self, model: nn.Module, drawn: tuple[Any, Tensor]) -> Tensor:
        """Return the products, (n,)."""
        batch, root = drawn
        return _products(self.loss.outputs(model, batch), root)


def sketch_draws(samples: int, weights: int) -> int:
    """Return how often signs are drawn at the most for each of some samples, where rows are of so many weights."""
    samples = max(1, samples)
    return max(1, min(_MOST_DRAWS, _ENOUGH_ROWS // samples, _MOST_NUMBERS // (samples * weights)))


def comparable(samples: int, weights: int) -> bool:
    """Whether rows of single samples are few enough to be taken beside those of mini-batches."""
    return samples * weights <= _MOST_COMPARED


def most_rows(weights: int) -> int:
    """Return how many rows few samples give at the most, however few they turn out to be."""
    return min(_ENOUGH_ROWS, _MOST_NUMBERS // weights)


def sketch_rows(samples: int, *, in_batches: bool, draws: int = 1, mini_batch: int = MINI_BATCH) -> int:
    """Return how many rows a number of samples gives; batches that cannot be joined or split give a row each."""
    return math.ceil(samples / mini_batch) if in_batches else samples * draws


def sketch_curvature(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    loss: GaussNewtonLoss,
    generator: torch.Generator,
    *,
    in_batches: bool,
    draws: int = 1,
    mini_batch: int = MINI_BATCH,
    storage: Storage | None = None,
    advance: Callable[[int], None] = lambda _count: None,
) -> Capture:
    """Sketch the generalised Gauss-Newton matrix at the model's current weights.

    Args:
        model: The network; its weights, buffers and modes are as before when this returns.
        selection: The p weights that gradients are taken of.
        batches: Calibration batches on the model's device.
        loss: A loss that knows its curvature.
        generator: Draws the signs.
        in_batches: Whether BatchNorm sees mini-batches, as after recalibration, rather than single samples.
        draws: Rows of each sample, of signs of their own, at the most; mini-batches give one each.
        mini_batch: Samples of one, at the most.
        storage: How G is held; by default dense.
        advance: Called with the number of samples that were done, for progress.

    Returns:
        G, and the loss of each sample, with BatchNorm as for the rows.

    Raises:
        ValueError: As for ``capture_gradients``.
    """
    if in_batches:
        with eval_mode(model), torch.no_grad():
            check_calibration(model, loss, batches)
        parts = mini_batches(batches, mini_batch)
        device = next(model.parameters()).device
        store = open_store(storage or Storage(), len(parts), selection, selection.dtype(model), device)
        losses, sizes = _mini_batch_rows(model, selection, parts, loss, generator, store, advance)
        return Capture(store.finish(), losses, "mini-batch", mini_batch, sizes)
    source = draw_sketch(model, batches, loss, generator, in_batches=False, draws=draws)
    assert source.losses is not None, "found on the way"
    counted = once_each(advance, source.draws)
    capture = capture_gradients(model, selection, source.batches, source.function, storage=storage, advance=counted)
    sizes = torch.cat([torch.linalg.vector_norm(root.reshape(len(root), -1), dim=1) for _, root in source.batches])
    return Capture(capture.factor, source.losses, capture.backend, capture.chunk, _positive(sizes))


def draw_sketch(
    model: nn.Module,
    batches: Sequence[Any],
    loss: GaussNewtonLoss,
    generator: torch.Generator,
    *,
    in_batches: bool,
    draws: int = 1,
    mini_batch: int = MINI_BATCH,
) -> RowSource:
    """Draw the signs, once: what :func:`sketch_curvature` takes gradients of, with the same random numbers.

    One pass without gradients finds ``L xi`` of each draw, of the size of the outputs, which is kept. There are no more
    draws than directions in which a loss can be curved: as many as outputs, one less of the cross-entropy of a class.

    Raises:
        ValueError: If a batch does not fit the loss or the model, or a loss is not finite.
    """
    with eval_mode(model), torch.no_grad():
        check_calibration(model, loss, batches)
    parts = mini_batches(batches, mini_batch) if in_batches else batches
    drawn, losses = [], []
    with (batch_statistics if in_batches else eval_mode)(model), torch.no_grad():
        for part in parts:
            with failures_named("calibration batch", part):
                outputs = loss.outputs(model, part)
                found = loss.losses(outputs, part)
                count = max(1, min(draws, _directions(loss, outputs)))
                roots = [loss.curvature_root(outputs, part, draw_signs(outputs, generator)) for _ in range(count)]
            losses.append(check_losses(found, None))
            drawn += [(part, root) for root in roots]
    return RowSource(CurvatureSketch(loss), drawn, in_batches, torch.cat(losses), len(drawn) // len(parts))


def once_each(advance: Callable[[int], None], draws: int) -> Callable[[int], None]:
    """Return ``advance`` for batches in which each sample comes ``draws`` times: it is told of each once."""
    seen = 0

    def count(number: int) -> None:
        nonlocal seen
        advance((seen + number) // draws - seen // draws)
        seen += number

    return count


def _directions(loss: GaussNewtonLoss, outputs: Tensor) -> int:
    """Return in how many directions the loss of a sample can be curved."""
    each = outputs.numel() // max(1, len(outputs))
    return each - 1 if isinstance(loss, CrossEntropy) and outputs.ndim == 2 else each


def _products(outputs: Tensor, root: Tensor) -> Tensor:
    """Return ``<z, L xi>`` of each sample, (n,)."""
    return (outputs * root).reshape(len(outputs), -1).sum(1)


def draw_signs(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return signs of the shape and device of the outputs, drawn on the CPU."""
    return (
        torch.randint(0, 2, outputs.shape, generator=generator, dtype=torch.int8, device="cpu")
        .mul_(2)
        .sub_(1)
        .to(outputs)
    )


def mini_batches(batches: Sequence[Any], size: int = MINI_BATCH) -> list[Any]:
    """Return batches of about so many samples, without those of one sample where there are others."""
    return without_singles(split_batches(batches, size))


def without_singles(batches: Sequence[Any]) -> list[Any]:
    """Return batches without those of one sample, which has no variance, where there are others."""
    return [batch for batch in batches if not is_single(batch)] or list(batches)


def _mini_batch_rows(
    model: nn.Module,
    selection: Selection,
    parts: Sequence[Any],
    loss: GaussNewtonLoss,
    generator: torch.Generator,
    store: RowStore,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Store a row ``sum_i J_i^T L_i xi_i / sqrt(size)`` for each mini-batch.

    Returns:
        The losses of all samples, and the norm of ``L xi / sqrt(size)`` of each mini-batch.
    """
    losses, sizes = [], []

    def product(network: nn.Module, part: Any) -> Tensor:
        outputs = loss.outputs(network, part)
        losses.append(check_losses(loss.losses(outputs.detach(), part), None))
        root = loss.curvature_root(outputs.detach(), part, draw_signs(outputs, generator))
        sizes.append(torch.linalg.vector_norm(root) / batch_size(part) ** 0.5)
        return _products(outputs, root)

    shared = store if isinstance(store, SharedStore) else None
    with batch_statistics(model):
        for part in parts:
            with failures_named("calibration batch", part):
                if shared is None or shared.is_next:
                    write_batch_gradient(store.room(1)[0], model, selection, part, product)
                else:  # every process draws the signs, and sees the losses
                    with torch.no_grad():
                        product(model, part)
            if shared is None:
                store.keep(1)
            else:
                shared.pass_on(1)
            advance(batch_size(part))
    return torch.cat(losses), _positive(torch.stack(sizes))


def _positive(sizes: Tensor) -> Tensor:
    return sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
