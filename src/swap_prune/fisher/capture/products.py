"""What a call of one of torch's functions computes with a weight: a product, or the weight in another form.

A product with a weight, a convolution or a lookup is a call whose inputs and output gradients make the gradient of the
weight (:mod:`swap_prune.fisher.capture.layers`). Where the weight lies the other way round, as in a transposed
convolution, in an embedding or in ``x @ weight``, inputs and output gradients change places.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from swap_prune.fisher.capture.layers import Convolution, Layer, Linear, Lookup

__all__ = ["Product", "Read", "Weight", "flat", "in_another_form", "read_product"]


@dataclass(frozen=True)
class Weight:
    """A selected parameter, or a view or copy of it with all its values in order, or the other way round."""

    name: str
    tensor: Tensor  # held, so that no other gets its id
    turned: bool = False
    version: int | None = None  # of a view or copy: one that was changed since is none any more

    @property
    def holds(self) -> bool:
        """Whether the tensor still has the values of the parameter."""
        return self.version is None or self.version == _version(self.tensor)


@dataclass(frozen=True)
class Product:
    """A call that makes a gradient of a weight.

    Attributes:
        name: The parameter.
        layer: What it computes, with a weight of the parameter's shape.
        turned: Whether the layer's inputs are the gradients at the output of the call, and the other way round.
        left: Whether the weight stands before what it is multiplied with, (..., in, tokens).
        padding: Of a lookup, the word that has no gradient.
        within: Whether it is one of several in a call of attention or of a recurrent layer.
        recurrent: Whether it is in a recurrent layer, before which networks like to sort samples by their lengths.
    """

    name: str
    layer: Layer
    turned: bool = False
    left: bool = False
    padding: int | None = None
    within: bool = False
    recurrent: bool = False

    def sides(self, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and the output gradient of the layer, of those of the call."""
        if isinstance(self.layer, Lookup):
            inputs = inputs.long().unsqueeze(-1)
            if self.padding is not None:  # torch gives it no gradient
                gradient = gradient.masked_fill(inputs == self.padding, 0)
        if self.left:
            inputs, gradient = inputs.mT, gradient.mT
        return (gradient, inputs) if self.turned else (inputs, gradient)


class Read(NamedTuple):
    """A product, and what is multiplied.

    Attributes:
        product: What the call computes.
        weight: The weight.
        inputs: What it is multiplied with.
    """

    product: Product
    weight: Weight
    inputs: Tensor


@dataclass(frozen=True)
class _Call:
    """A product as its arguments tell it."""

    inputs: Tensor
    weight: Tensor
    kind: type[Linear] | Convolution = Linear
    turned: bool = False
    left: bool = False
    padding: int | None = None


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def flat(values: Sequence[Any]) -> Iterator[Any]:
    """Yield what lists and tuples hold, but for those of numbers."""
    for value in values:
        if not isinstance(value, list | tuple):
            yield value
        elif value and not isinstance(value[0], int | float):
            yield from flat(value)


def in_another_form(func: Any, args: Any, kwargs: Any, weight: Weight, result: Any) -> Weight | None:
    """Return a weight as a function gave it, turned or with all its values in their order; None: it is another."""
    if not isinstance(result, Tensor) or not args or args[0] is not weight.tensor:
        return None
    if func in _TURNS and weight.tensor.ndim == 2 and not kwargs:
        turned = weight.turned != _TURNS[func](*args[1:])
        return Weight(weight.name, result, turned, _version(result))
    if func not in _SAME or result.numel() != weight.tensor.numel() or not result.is_floating_point():
        return None
    whole = result.shape == weight.tensor.shape or not weight.turned
    return Weight(weight.name, result, weight.turned, _version(result)) if whole else None


def _product(weight: Weight, call: _Call) -> Product | None:
    """Return what a call makes of a parameter; None if it is not known."""
    if not isinstance(call.kind, Convolution) and weight.tensor.ndim != 2:
        return None
    shape = tuple(weight.tensor.shape)
    if isinstance(call.kind, Convolution):
        return Product(weight.name, replace(call.kind, shape=shape), call.turned)
    shape = shape[::-1] if weight.turned else shape
    if call.kind is Lookup and weight.turned:
        return None
    return Product(weight.name, call.kind(shape), call.turned != weight.turned, call.left, call.padding)


def read_product(func: Any, args: Any, kwargs: Any, given: Sequence[Weight]) -> Read | None:
    """Return the product that a call is; None if it is none that is known.

    Args:
        func: What is called.
        args: Its arguments.
        kwargs: The same.
        given: The weights among them.
    """
    reader = _PRODUCTS.get(func)
    try:
        call = None if reader is None else reader(*args, **kwargs)
    except (TypeError, ValueError):  # other arguments than are known
        return None
    if call is None or not isinstance(call.inputs, Tensor):
        return None
    if reader is _matmul and call.inputs is given[0].tensor and call.weight.ndim > 2:
        call = _Call(call.weight, call.inputs, left=True)
    weight = next((one for one in given if one.tensor is call.weight), None)
    product = None if weight is None or call.inputs is call.weight else _product(weight, call)
    return None if product is None or weight is None else Read(product, weight, call.inputs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Call:
    return _Call(input, weight)


def _matmul(input: Tensor, other: Tensor) -> _Call:
    return _Call(input, other, turned=True)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> _Call | None:
    return _Call(mat1, mat2, turned=True) if alpha == 1 else None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Call:
    kernel, dilation = weight.shape[2:], _each(dilation, weight)
    both: tuple[tuple[int, int], ...]
    if padding == "same":
        whole = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        both = tuple((amount // 2, amount - amount // 2) for amount in whole)
    else:
        both = tuple((amount, amount) for amount in _each(0 if padding == "valid" else padding, weight))
    return _Call(input, weight, Convolution((), _each(stride, weight), both, dilation, groups))


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Call | None:
    if any(more >= step for more, step in zip(_each(output_padding, weight), _each(stride, weight), strict=True)):
        return None  # the convolution whose gradient it is would have more places than the inputs
    call = _convolution(input, weight, None, stride, padding, dilation, groups)
    return replace(call, turned=True)


def _each(value: Any, weight: Tensor) -> tuple[int, ...]:
    """Return a value for each dimension of a kernel."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * (weight.ndim - 2) if len(values) == 1 else values


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Call | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    word = padding_idx if padding_idx is None or padding_idx >= 0 else len(weight) + padding_idx
    return _Call(input, weight, Lookup, turned=True, padding=word)


def _taken(weight: Tensor, index: Any) -> _Call | None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype in (torch.bool, torch.uint8):
        return None  # a mask, or a slice that all samples share
    return _Call(index.remainder(len(weight)), weight, Lookup, turned=True)


def _attribute(name: str) -> Any:
    """Return the function that an attribute of tensors is asked by."""
    attribute: Any = getattr(Tensor, name)
    return attribute.__get__


_PRODUCTS: dict[Any, Callable[..., _Call | None]] = {
    functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
    functional.embedding: _embedding,
    Tensor.__getitem__: _taken,
}
_TURNS: dict[Any, Callable[..., bool]] = {  # of two dimensions: whether they change places
    **dict.fromkeys((torch.t, Tensor.t, _attribute("T"), _attribute("mT")), lambda: True),
    **dict.fromkeys(
        (torch.transpose, Tensor.transpose, Tensor.swapaxes, Tensor.swapdims), lambda one, other: one % 2 != other % 2
    ),
    **dict.fromkeys((torch.permute, Tensor.permute), lambda *order: next(iter(flat(order))) % 2 == 1),
}
_SAME = {  # all values in their order, in another type, place or shape
    Tensor.cpu,
    Tensor.cuda,
    Tensor.flatten,
    Tensor.requires_grad_,
    Tensor.reshape,
    Tensor.squeeze,
    Tensor.unflatten,
    Tensor.unsqueeze,
    Tensor.view,
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.contiguous,
    Tensor.clone,
    torch.clone,
}
