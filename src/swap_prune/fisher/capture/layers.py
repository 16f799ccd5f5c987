"""Weight gradients of single samples, from what goes into a product and what comes back to its output.

What multiplies inputs by a weight is called a layer here, be it a module of its own or not. A Linear layer, or a group
of a convolution read as a matrix, computes ``W a_t`` at every token or position t. With ``d_t`` the gradient of sample
i's loss with respect to that output, the gradient with respect to W is::

    dl_i/dW = sum_t d_t a_t^T = D^T A,        D (T, out), A (T, in)

so that a batched product gives the rows of G of a whole chunk of samples. For a convolution the ``a_t`` are cut out
of its padded inputs as the kernel sees them (``unfold``), a bounded piece at a time; inputs that are too large for
that, and depthwise layers, whose products are too thin, go through PyTorch's own weight gradient instead. A depthwise
layer of c channels on n samples is there one sample of n c channels.

Source: Goodfellow, "Efficient per-example gradient computations" (arXiv 1510.01799, 2015); Rochette, Manoel and
Tramel (arXiv 1912.06015, 2019) for convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional, grad

__all__ = [
    "Convolution",
    "Layer",
    "Linear",
    "Lookup",
    "Multiply",
    "UnsupportedLayerError",
    "as_samples",
    "items_of",
    "piece_bytes",
    "put_weight_gradients",
    "unfold_inputs",
    "unfolded_bytes",
    "whole_gradient",
]

PIECE_BYTES = 16 * 2**20  # unfolded inputs and weight gradients that are held at once; larger pieces were no faster
_GPU_PIECE_BYTES = 256 * 2**20  # the same there

_WEIGHT_GRADIENTS: tuple[Any, ...] = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)


class UnsupportedLayerError(RuntimeError):
    """A network that gradients cannot be taken of from the outputs of its layers.

    Attributes:
        names: The parameters that they cannot be taken of, where it is for them.
    """

    def __init__(self, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class Linear:
    """Products with a matrix.

    Attributes:
        shape: Of the weight, (out, in).
    """

    shape: tuple[int, ...]

    groups = 1


class Lookup(Linear):
    """An embedding as a Linear layer with its weight, (words, width).

    ``A`` are the gradients at what was looked up, and ``D`` has a one at each token's word among zeros. It is as large
    as there are words, and told by the words alone, (..., 1), until it is needed.
    """


@dataclass(frozen=True)
class Convolution:
    """A convolution of one, two or three dimensions.

    Attributes:
        shape: Of the weight, (out, in / groups, kernel).
        stride: Along each dimension.
        padding: Zeros before and after, along each dimension.
        dilation: Along each dimension.
        groups: Of channels.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """Its size."""
        return self.shape[2:]


Layer = Linear | Convolution


class Multiply(Protocol):
    """``x W^T + b``, by a product that may be seen; ``own`` says whether it is one within a larger call."""

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, own: bool = True) -> Tensor:
        """Return (..., out) of (..., in)."""


def piece_bytes(device: torch.device) -> int:
    """Return how many bytes of unfolded inputs and weight gradients are held at once."""
    return _GPU_PIECE_BYTES if device.type == "cuda" else PIECE_BYTES


def items_of(layer: Layer, inputs: Tensor) -> int:
    """Return the leading dimension of what a layer was called with: one item, where it has no such dimension."""
    own = len(layer.kernel) + 1 if isinstance(layer, Convolution) else 1
    return inputs.shape[0] if inputs.ndim > own else 1


def as_samples(layer: Layer, inputs: Tensor, gradient: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Give a layer's inputs and output gradients the shapes of their batch, in at least float32.

    Args:
        layer: The layer.
        inputs: What it was called with.
        gradient: Of the losses with respect to its output; same leading dimensions.
        size: Samples of the batch. Several items of one sample must lie side by side.

    Returns:
        For a Linear layer (size, tokens, in) and (size, tokens, out), for a lookup 1 in the place of out; for a
        convolution (items, channels, ...), the number of items being a multiple of ``size``.

    Raises:
        UnsupportedLayerError: If the leading dimension is not that of the samples.
    """
    dtype = torch.promote_types(inputs.dtype if isinstance(layer, Lookup) else gradient.dtype, torch.float32)
    inputs, gradient = inputs.to(dtype), gradient if isinstance(layer, Lookup) else gradient.to(dtype)
    if inputs.ndim == (len(layer.kernel) + 1 if isinstance(layer, Convolution) else 1):
        inputs, gradient = inputs.unsqueeze(0), gradient.unsqueeze(0)
    if inputs.shape[0] == 0 or inputs.shape[0] % size:
        raise UnsupportedLayerError(
            f"a {type(layer).__name__} saw inputs {tuple(inputs.shape)} in a batch of {size}: "
            "its leading dimension is not that of the samples"
        )
    if isinstance(layer, Linear):
        inputs = inputs.reshape(size, -1, inputs.shape[-1])
        gradient = gradient.reshape(size, -1, gradient.shape[-1])
    return inputs, gradient


def put_weight_gradients(layer: Layer, inputs: Tensor, gradient: Tensor, out: Tensor, *, add: bool) -> None:
    """Write the weight gradients of a batch of samples.

    Args:
        layer: The layer.
        inputs: What it was called with.
        gradient: Of the losses with respect to its output.
        out: Where the gradients go, (n, numel of the weight); any strides.
        add: Whether they are added to what is there, as for the second call of a layer.

    Raises:
        UnsupportedLayerError: As for :func:`as_samples`.
    """
    inputs, gradient = as_samples(layer, inputs, gradient, len(out))
    if isinstance(layer, Lookup):
        place = out.view(len(out), *layer.shape)
        _add_at_words(place if add else place.zero_(), gradient, inputs.to(out.dtype))
        return
    if isinstance(layer, Linear) and inputs.shape[1] == 1:
        gradient = whole_gradient(layer, inputs, gradient)
        place = out.view(len(out), *layer.shape)
        left, right = gradient.mT, inputs
        if add:
            place += left * right
        else:
            torch.mul(left, right, out=place)
        return
    each = len(inputs) // len(out)
    for start, stop in _pieces(layer, inputs, gradient, each):
        items = slice(start * each, stop * each)
        value = _weight_gradients(layer, inputs[items], gradient[items])
        if each > 1:
            value = value.reshape(-1, each, *value.shape[1:]).sum(1)
        place = out[start:stop].view(value.shape)
        if add:
            place += value
        else:
            place.copy_(value)


def _add_at_words(place: Tensor, words: Tensor, values: Tensor) -> None:
    """Add values, (n, tokens, width), to the rows of their words, (n, tokens, 1), in place, (n, words, width)."""
    if place.device.type == "cpu":
        place.scatter_add_(1, words.expand(values.shape), values)
    else:  # which would add in any order; by index it sorts words before
        samples = torch.arange(len(place), device=place.device)[:, None]
        place.index_put_((samples, words.squeeze(2)), values, accumulate=True)


def whole_gradient(layer: Layer, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return D, (size, tokens, out) for a Linear layer, of what :func:`as_samples` gave."""
    if not isinstance(layer, Lookup):
        return gradient
    return inputs.new_zeros(*gradient.shape[:2], layer.shape[0]).scatter_(2, gradient, 1)


def unfold_inputs(layer: Layer, inputs: Tensor) -> Tensor:
    """Cut inputs into what the weight sees at each token or position.

    Args:
        layer: The layer.
        inputs: As from :func:`as_samples`.

    Returns:
        A, (items, groups, positions, d). The d inputs of a convolution have the kernel first and the channel last,
        which is the other way round in its weight.
    """
    if not isinstance(layer, Convolution):
        return inputs.unsqueeze(1)
    return _cut_out(layer, _pad_channels_last(layer, inputs), 0).flatten(2, 3)


def unfolded_bytes(layer: Layer, inputs: Tensor, gradient: Tensor) -> int:
    """Return the size of what :func:`unfold_inputs` and :func:`whole_gradient` make of one item."""
    if not isinstance(layer, Convolution):
        return inputs.shape[1] * layer.shape[0] * inputs.element_size() if isinstance(layer, Lookup) else 0
    positions = math.prod(gradient.shape[2:])
    return positions * inputs.shape[1] * math.prod(layer.kernel) * inputs.element_size()


def _cut_out(layer: Convolution, x: Tensor, first: int) -> Tensor:
    """Cut padded inputs (items, ..., channels) along the axes from ``first`` on.

    Returns:
        (items, groups, rows, positions of the rest, d): rows are positions of axis 0, cut or not.
    """
    dimensions = len(layer.kernel)
    cut = range(first, dimensions)
    for axis in cut:
        size, step, gap = layer.kernel[axis], layer.stride[axis], layer.dilation[axis]
        x = x.unfold(axis + 1, gap * (size - 1) + 1, step)[..., ::gap]
    x = x.reshape(*x.shape[: dimensions + 1], layer.groups, -1, *x.shape[dimensions + 2 :])
    kernel = range(dimensions + 3, dimensions + 3 + len(cut))
    x = x.permute(0, dimensions + 1, *range(1, dimensions + 1), *kernel, dimensions + 2)
    width = math.prod(x.shape[dimensions + 2 :])
    x = x.reshape(*x.shape[:3], math.prod(x.shape[3 : dimensions + 2]), width)
    return x.contiguous()  # reshape may return a view whose rows overlap: that would be copied once for each offset


def _pieces(layer: Layer, inputs: Tensor, gradient: Tensor, each: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of samples of ``each`` items; bytes decide, so that two runs of one seed agree."""
    bytes_each = each * (unfolded_bytes(layer, inputs, gradient) + 2 * math.prod(layer.shape) * inputs.element_size())
    size, count = max(1, piece_bytes(inputs.device) // bytes_each), len(inputs) // each
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _weight_gradients(layer: Layer, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradients of items, (items, out, in) or (items, out, in, kernel)."""
    if not isinstance(layer, Convolution):
        return whole_gradient(layer, inputs, gradient).mT @ inputs
    if layer.shape[1] == 1:
        return _of_depthwise(layer, inputs, gradient)
    if unfolded_bytes(layer, inputs, gradient) > piece_bytes(inputs.device):
        return torch.cat([_of_layer(layer, inputs[i : i + 1], gradient[i : i + 1]) for i in range(len(inputs))])
    items, outputs = gradient.shape[:2]
    grouped = gradient.reshape(items, layer.groups, outputs // layer.groups, -1)
    if math.prod(layer.kernel) == 1:
        steps: list[Any] = [slice(None, None, step) for step in layer.stride]
        x = _pad(layer, inputs)[(..., *steps)]
        product = grouped @ x.reshape(items, layer.groups, x.shape[1] // layer.groups, -1).mT
        return product.reshape(items, outputs, -1, 1)
    if layer.stride[0] > 1:
        product = grouped @ unfold_inputs(layer, inputs)
    else:  # the kernel's offsets along the first axis are views of what is cut out along the others
        strips = _cut_out(layer, _pad_channels_last(layer, inputs), 1)
        high, gap = gradient.shape[2], layer.dilation[0]
        parts = [grouped @ strips[:, :, i * gap : i * gap + high].flatten(2, 3) for i in range(layer.kernel[0])]
        product = torch.stack(parts, 3)
    return product.reshape(items, outputs, math.prod(layer.kernel), -1).mT


def _of_layer(layer: Convolution, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a convolution's weight, summed over items, (1, out, in, kernel)."""
    weight = _WEIGHT_GRADIENTS[len(layer.kernel) - 1](
        _pad(layer, inputs), layer.shape, gradient, layer.stride, 0, layer.dilation, layer.groups
    )
    return weight.flatten(2).unsqueeze(0)  # type: ignore[no-any-return]


def _of_depthwise(layer: Convolution, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradients of a layer with one channel a group, (items, out, 1, kernel)."""
    items, outputs = gradient.shape[:2]
    even = all(before == after for before, after in layer.padding)
    x = inputs if even else _pad(layer, inputs)
    weight = _WEIGHT_GRADIENTS[len(layer.kernel) - 1](
        x.reshape(1, -1, *x.shape[2:]),
        (items * outputs, 1, *layer.kernel),
        gradient.reshape(1, -1, *gradient.shape[2:]),
        layer.stride,
        tuple(before for before, _ in layer.padding) if even else 0,
        layer.dilation,
        items * layer.groups,
    )
    return weight.reshape(items, outputs, 1, -1)  # type: ignore[no-any-return]


def _pad_channels_last(layer: Convolution, inputs: Tensor) -> Tensor:
    """Return padded inputs (items, ..., channels): whole channels can then be copied at a time."""
    if not any(map(any, layer.padding)):
        return inputs.movedim(1, -1).contiguous()
    sizes = inputs.shape[2:]
    whole = [before + size + after for (before, after), size in zip(layer.padding, sizes, strict=True)]
    padded = inputs.new_zeros(len(inputs), *whole, inputs.shape[1])
    inner = tuple(slice(before, before + size) for (before, _), size in zip(layer.padding, sizes, strict=True))
    padded[(slice(None), *inner)] = inputs.movedim(1, -1)
    return padded


def _pad(layer: Convolution, inputs: Tensor) -> Tensor:
    """Pad inputs as the layer does before its kernel runs over them."""
    amounts = [amount for both in reversed(layer.padding) for amount in both]
    return functional.pad(inputs, amounts) if any(amounts) else inputs
