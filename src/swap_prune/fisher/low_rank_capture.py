"""Low-rank rows of G straight from the activations and output gradients of the layers.

With A (T, d) what a layer saw of one sample at its T tokens or positions and D (T, out) what came back, the gradient of
its weight is ``M = D^T A``. Its leading outer products come from a subspace iteration with M (Halko, Martinsson and
Tropp, 2011, algorithm 4.4), for all samples of a piece at once. M itself is only formed where that is less work than
multiplying by A and D in turn. One token is its own outer product, and exact.

Depthwise layers, whose matrices have one column for each place of the kernel, and layers too small for a gain keep
their rows.

Place in the pipeline: instead of ``capture_gradients``, for solvers that work with any ``FisherFactor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swap_prune.calibration import batch_size, is_sliceable, slice_batch, split_batches
from swap_prune.fisher.capture import capture_gradients
from swap_prune.fisher.hooks import OutputGradients
from swap_prune.fisher.layers import PIECE_BYTES, as_samples, put_weight_gradients, unfold_inputs, unfolded_bytes
from swap_prune.fisher.low_rank import LowRankFactor, OuterRows, PlainRows
from swap_prune.losses import LossFn, check_calibration, check_losses
from swap_prune.modes import eval_mode
from swap_prune.selection import Selection

__all__ = ["LowRankCapture", "capture_low_rank", "leading_products"]

_ITERATIONS = 3  # of the subspace iteration
_SPARE = 4  # more directions than are kept: they speed up its convergence
_CHECKED = 2  # samples


@dataclass(frozen=True)
class LowRankCapture:
    """Low-rank gradients of one set of calibration samples.

    Attributes:
        factor: G, (n, p), as factors.
        losses: Loss of each sample, (n,).
        chunk: Samples that ran through the network at once, at the most.
    """

    factor: LowRankFactor
    losses: Tensor
    chunk: int


def capture_low_rank(
    model: nn.Module,
    selection: Selection,
    batches: Sequence[Any],
    loss_fn: LossFn,
    *,
    rank: int | Mapping[str, int] = 3,
    advance: Callable[[int], None] = lambda _count: None,
) -> LowRankCapture:
    """Compute G, (n, p), with rows of low rank in each layer, at the model's current weights.

    Args:
        model: The network; its weights, buffers and modes are as before when this returns.
        selection: The p weights that gradients are taken of: of Linear and Conv layers only.
        batches: Calibration batches on the model's device.
        loss_fn: ``(model, batch) -> (n,)`` losses.
        rank: Outer products that are kept of each row: of every layer, or by parameter name (others: 3).
        advance: Called with the number of rows that were added, for progress.

    Returns:
        G and the losses.

    Raises:
        ValueError: If the rank is not at least 1 or names what is not selected, a batch cannot be split in samples, or
            as for ``capture_gradients`` with the hooks back end.
    """
    ranks = _ranks(rank, selection)
    if not batches or not all(map(is_sliceable, batches)):
        raise ValueError(
            "batches must be at least one, of tensors with samples in front; use capture_gradients instead"
        )
    first = slice_batch(batches[0], 0, _CHECKED)
    probe = capture_gradients(model, selection, [first], loss_fn, backend="hooks")  # says why it cannot
    chunk = max(1, probe.chunk // 2)  # the gradients of outputs are kept besides the activations
    collector = _Collector({name: _Layer(ranks[name]) for name in selection.names})
    losses = []
    with eval_mode(model):
        check_calibration(model, loss_fn, batches)
        gradients = OutputGradients(model, selection, loss_fn)
        for part in split_batches(batches, chunk):
            losses.append(check_losses(gradients.run(part, collector.see), batch_size(part)))
            collector.finish(batch_size(part), dict(model.named_parameters()))
            advance(batch_size(part))
    return LowRankCapture(LowRankFactor(collector.rows()), torch.cat(losses), chunk)


def leading_products(d: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading outer products of ``M = D^T A`` for each matrix of a batch.

    Args:
        d: D, (batch, T, out).
        a: A, (batch, T, d).
        rank: At least 1.

    Returns:
        u, (batch, r, out), and v, (batch, r, d), with ``M ~ sum_r u_r v_r^T`` and ``r = min(rank, T, out, d)``.
    """
    tokens, out, width = d.shape[1], d.shape[2], a.shape[2]
    if tokens <= rank:
        return d, a
    if out > width:
        v, u = leading_products(a, d, rank)
        return u, v
    keep = min(rank, out)
    size = min(keep + _SPARE, out, tokens)
    products = 2 * (2 * _ITERATIONS + 1) * size  # vectors that M is multiplied by, twice the work by D and A in turn
    formed = tokens * out * width + products // 2 * out * width < products // 2 * tokens * (out + width)
    m = d.mT @ a if formed else None

    def transposed(q: Tensor) -> Tensor:  # M^T q
        return m.mT @ q if m is not None else a.mT @ (d @ q)

    energy = (m if m is not None else d.mT).square().sum(2)
    basis = nn.functional.one_hot(energy.topk(size, dim=1).indices, out).mT.to(d)  # where the energy is
    for _ in range(_ITERATIONS):
        image = transposed(basis)
        basis, _ = torch.linalg.qr(m @ image if m is not None else d.mT @ (a @ image))
    right = transposed(basis).mT  # (batch, size, d)
    _, turn = torch.linalg.eigh(right @ right.mT)
    turn = turn[..., -keep:].flip(-1)  # largest first
    return (basis @ turn).mT, turn.mT @ right


@dataclass
class _Layer:
    """What was seen of one parameter's layers."""

    rank: int
    calls: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)  # of the chunk under way
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)


@dataclass
class _Collector:
    """Turns what layers saw into factors, chunk by chunk."""

    layers: dict[str, _Layer]

    def see(self, name: str, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """Keep one call; several calls of a layer belong to one gradient."""
        self.layers[name].calls.append((layer, inputs, gradient))

    def finish(self, size: int, parameters: Mapping[str, Tensor]) -> None:
        """Work up the calls of a chunk of samples."""
        for name, seen in self.layers.items():
            calls, seen.calls = seen.calls, []
            if calls and _is_outer(calls[0][0], seen.rank):
                left, right = _factors(calls, size, seen.rank)
                seen.left.append(left)
                seen.right.append(right)
                continue
            weight = parameters[name]
            rows = torch.zeros(
                size, weight.numel(), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
            )
            for layer, inputs, gradient in calls:
                put_weight_gradients(layer, inputs, gradient, rows, add=True)
            seen.plain.append(rows)

    def rows(self) -> dict[str, OuterRows | PlainRows]:
        """Join the chunks.

        Raises:
            ValueError: If a gradient is not finite.
        """
        result: dict[str, OuterRows | PlainRows] = {}
        for name, seen in self.layers.items():
            if seen.left and not seen.plain:
                most = max(part.shape[2] for part in seen.left)
                result[name] = OuterRows(_join(seen.left, most), _join(seen.right, most))
            elif seen.plain and not seen.left:
                result[name] = PlainRows(torch.cat(seen.plain))
            else:
                raise ValueError(f"the layer of {name!r} ran for some samples only; use capture_gradients instead")
            seen.left, seen.right, seen.plain = [], [], []
            if not all(bool(torch.isfinite(tensor).all()) for tensor in result[name].tensors):
                raise ValueError(f"the gradient of {name!r} is not finite; check the loss and the data")
        return result


def _join(parts: list[Tensor], rank: int) -> Tensor:
    """Concatenate factors along the samples; those of lower rank are filled up with zeros."""
    padded = [nn.functional.pad(part, (0, 0, 0, rank - part.shape[2])) for part in parts]
    return torch.cat(padded, 1)


def _is_outer(layer: nn.Module, rank: int) -> bool:
    """Whether outer products take less room than the gradient itself."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    out, width = weight.shape[0] // groups, math.prod(weight.shape[1:])
    one_column = isinstance(layer, _ConvNd) and weight.shape[1] == 1
    return not one_column and min(rank, out, width) * (out + width) < out * width


def _factors(calls: list[tuple[nn.Module, Tensor, Tensor]], size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return u and v, (groups, size, r, .), of the summed gradient of some calls, a bounded piece at a time."""
    shaped = [(layer, *as_samples(layer, inputs, gradient, size)) for layer, inputs, gradient in calls]
    bytes_each = 1
    for layer, inputs, gradient in shaped:
        bytes_each += len(inputs) // size * (unfolded_bytes(layer, inputs, gradient) + gradient[0].nbytes)
    parts: list[tuple[Tensor, Tensor]] = []
    step = max(1, PIECE_BYTES // bytes_each)
    for start in range(0, size, step):
        count = min(step, size - start)
        both = []
        for layer, inputs, gradient in shaped:
            each = len(inputs) // size
            items = slice(start * each, (start + count) * each)
            both.append(_matrices(layer, inputs[items], gradient[items], count))
        a, d = (torch.cat(tensors, 2) for tensors in zip(*both, strict=True))  # (count, groups, T, .)
        left, right = leading_products(d.flatten(0, 1), a.flatten(0, 1), rank)
        right = _in_weight_order(shaped[0][0], right)
        parts.append((left.unflatten(0, (count, -1)), right.unflatten(0, (count, -1))))  # type: ignore[no-untyped-call]
    lefts, rights = zip(*parts, strict=True)
    return torch.cat(lefts).transpose(0, 1).contiguous(), torch.cat(rights).transpose(0, 1).contiguous()


def _matrices(layer: nn.Module, inputs: Tensor, gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return A, (count, groups, T, d), and D, (count, groups, T, out), with the items of a sample joined."""
    a = unfold_inputs(layer, inputs)
    groups = a.shape[1]
    if isinstance(layer, _ConvNd):
        d = gradient.reshape(len(gradient), groups, gradient.shape[1] // groups, -1).mT
    else:
        d = gradient.unsqueeze(1)
    return _joined(a, count), _joined(d, count)


def _joined(x: Tensor, count: int) -> Tensor:
    return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _in_weight_order(layer: nn.Module, right: Tensor) -> Tensor:
    """Put the channels of v, (batch, r, d), before the places of the kernel."""
    if not isinstance(layer, _ConvNd):
        return right
    return right.reshape(*right.shape[:2], math.prod(layer.kernel_size), -1).mT.flatten(2)


def _ranks(rank: int | Mapping[str, int], selection: Selection) -> dict[str, int]:
    given = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(selection.names, rank)
    unknown = sorted(set(given) - set(selection.names))
    if unknown:
        raise ValueError(f"rank must name selected parameters, got {unknown}; selected: {list(selection.names)}")
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {value!r} for {name!r}")
    return {name: given.get(name, 3) for name in selection.names}
