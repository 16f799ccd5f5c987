"""The leading outer products of a layer's gradients, from its inputs and what came back to its outputs.

With A (T, d) what a layer saw of one sample at its T tokens or positions and D (T, out) what came back, the gradient of
its weight is ``M = D^T A``. A subspace iteration with M finds its leading outer products, for all samples of a piece at
once. M itself is only formed where that is less work than multiplying by A and D in turn.

Source: Halko, Martinsson and Tropp, 2011, algorithm 4.4. Place in the pipeline: beneath
:mod:`~swap_prune.fisher.capture.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swap_prune.fisher.backends.low_rank import OuterRows, PlainRows
from swap_prune.fisher.capture.layers import (
    Convolution,
    Layer,
    UnsupportedLayerError,
    as_samples,
    piece_bytes,
    put_weight_gradients,
    unfold_inputs,
    unfolded_bytes,
    whole_gradient,
)

__all__ = ["Collector", "LayerCalls", "is_outer", "leading_outer_products"]

_ITERATIONS = 3  # of the subspace iteration
_SPARE = 4  # more directions than are kept: they speed up its convergence


def leading_outer_products(d: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
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
        v, u = leading_outer_products(a, d, rank)
        return u, v
    keep = min(rank, out)
    size = min(keep + _SPARE, out, tokens)
    products = (2 * _ITERATIONS + 1) * size  # of M or its transpose with a vector: each is two, with D and A, unformed
    formed = tokens * out * width + products * out * width < products * tokens * (out + width)
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
class LayerCalls:
    """What was seen of one parameter's layers."""

    rank: int
    calls: list[tuple[Layer, Tensor, Tensor]] = field(default_factory=list)  # of the chunk under way
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)


@dataclass
class Collector:
    """Turns what layers saw into factors, chunk by chunk."""

    layers: dict[str, LayerCalls]

    def see(self, name: str, layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        """Keep one call; several calls of a layer belong to one gradient."""
        self.layers[name].calls.append((layer, inputs, gradient))

    def finish(self, size: int, parameters: Mapping[str, Tensor]) -> None:
        """Work up the calls of a chunk of samples.

        Raises:
            UnsupportedLayerError: If a weight is used in several shapes.
        """
        for name, seen in self.layers.items():
            calls, seen.calls = seen.calls, []
            if len({(layer.shape, layer.groups) for layer, _, _ in calls}) > 1:
                raise UnsupportedLayerError(f"{name!r} is used in several shapes")
            if calls and is_outer(calls[0][0].shape, calls[0][0].groups, seen.rank):
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

    def rows(self, dtype: torch.dtype) -> dict[str, OuterRows | PlainRows]:
        """Join the chunks.

        Args:
            dtype: That of the factor; layers may have others.

        Raises:
            UnsupportedLayerError: If a layer ran for some samples and not for others.
            ValueError: If a gradient is not finite.
        """
        result: dict[str, OuterRows | PlainRows] = {}
        for name, seen in self.layers.items():
            if seen.left and not seen.plain:
                most = max(part.shape[2] for part in seen.left)
                result[name] = OuterRows(_join(seen.left, most).to(dtype), _join(seen.right, most).to(dtype))
            elif seen.plain and not seen.left:
                result[name] = PlainRows(torch.cat(seen.plain).to(dtype))
            else:
                raise UnsupportedLayerError(f"the layer of {name!r} ran for some samples only")
            seen.left, seen.right, seen.plain = [], [], []
            if not all(bool(torch.isfinite(tensor).all()) for tensor in result[name].tensors):
                raise ValueError(f"the gradient of {name!r} is not finite; check the loss and the data")
        return result


def _join(parts: list[Tensor], rank: int) -> Tensor:
    """Concatenate factors along the samples; those of lower rank are filled up with zeros."""
    padded = [nn.functional.pad(part, (0, 0, 0, rank - part.shape[2])) for part in parts]
    return torch.cat(padded, 1)


def is_outer(shape: Sequence[int], groups: int, rank: int) -> bool:
    """Whether outer products of a weight's gradient take less room than itself."""
    out, width = shape[0] // groups, math.prod(shape[1:])
    one_column = len(shape) > 2 and shape[1] == 1
    return not one_column and min(rank, out, width) * (out + width) < out * width


def _factors(calls: list[tuple[Layer, Tensor, Tensor]], size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return u and v, (groups, size, r, .), of the summed gradient of some calls, a bounded piece at a time."""
    shaped = [(layer, *as_samples(layer, inputs, gradient, size)) for layer, inputs, gradient in calls]
    bytes_each = 1
    for layer, inputs, gradient in shaped:
        bytes_each += len(inputs) // size * (unfolded_bytes(layer, inputs, gradient) + gradient[0].nbytes)
    parts: list[tuple[Tensor, Tensor]] = []
    step = max(1, piece_bytes(shaped[0][1].device) // bytes_each)
    for start in range(0, size, step):
        count = min(step, size - start)
        both = []
        for layer, inputs, gradient in shaped:
            each = len(inputs) // size
            items = slice(start * each, (start + count) * each)
            both.append(_matrices(layer, inputs[items], gradient[items], count))
        a, d = (torch.cat(tensors, 2) for tensors in zip(*both, strict=True))  # (count, groups, T, .)
        left, right = leading_outer_products(d.flatten(0, 1), a.flatten(0, 1), rank)
        right = _in_weight_order(shaped[0][0], right)
        parts.append((left.unflatten(0, (count, -1)), right.unflatten(0, (count, -1))))  # type: ignore[no-untyped-call]
    lefts, rights = zip(*parts, strict=True)
    return torch.cat(lefts).transpose(0, 1).contiguous(), torch.cat(rights).transpose(0, 1).contiguous()


def _matrices(layer: Layer, inputs: Tensor, gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return A, (count, groups, T, d), and D, (count, groups, T, out), with the items of a sample joined."""
    a = unfold_inputs(layer, inputs)
    groups = a.shape[1]
    if isinstance(layer, Convolution):
        d = gradient.reshape(len(gradient), groups, gradient.shape[1] // groups, -1).mT
    else:
        d = whole_gradient(layer, inputs, gradient).unsqueeze(1)
    return _joined(a, count), _joined(d, count)


def _joined(x: Tensor, count: int) -> Tensor:
    return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _in_weight_order(layer: Layer, right: Tensor) -> Tensor:
    """Put the channels of v, (batch, r, d), before the places of the kernel."""
    if not isinstance(layer, Convolution):
        return right
    return right.reshape(*right.shape[:2], math.prod(layer.kernel), -1).mT.flatten(2)
