"""Which calls of torch's functions make the gradients of the selected weights.

A watch stands between the network and torch while a pass runs, and sees each function that is called with one of the
weights, whoever calls it: a module of torch, a subclass of it, or code that takes ``layer.weight`` from elsewhere. A
product with a weight, a convolution or a lookup is one whose inputs and output gradients make the gradient of the
weight (:mod:`swap_prune.fisher.capture.layers`). Where the weight lies the other way round, as in a transposed
convolution, in an embedding or in ``x @ weight``, inputs and output gradients change places. Attention and recurrent
layers compute several products in one call, and are told in them
(:mod:`~swap_prune.fisher.capture.attention`, :mod:`~swap_prune.fisher.capture.recurrent`).

Products are computed with weights that are detached. So whatever gradient reaches a weight by itself is of something
else that was done with it, seen or not, and none of it is known: such weights are refused
(:meth:`Watch.refuse_others`).

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from swap_prune.checks import first_line
from swap_prune.fisher.capture.attention import attend
from swap_prune.fisher.capture.layers import Convolution, Layer, Linear, Lookup, UnsupportedLayerError
from swap_prune.fisher.capture.recurrent import CELLS, LAYERS, Order, run_cell, run_layers
from swap_prune.process_memory import pass_on_shortage

__all__ = ["Product", "See", "Watch", "check_products"]


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


See = Callable[[Product, Tensor, Tensor], Tensor | None]  # (product, inputs, output) -> another output


def check_products(weights: Mapping[str, Tensor], run: Callable[[], Tensor]) -> None:
    """Run a network to its losses, and refuse weights that are used in other ways than in products.

    Args:
        weights: As for :class:`Watch`.
        run: Returns the losses, (n,).

    Raises:
        UnsupportedLayerError: As for :meth:`Watch.refuse_others`.
    """
    with torch.enable_grad(), Watch(weights, lambda *_: None) as watch:
        losses = run()
    if losses.requires_grad:
        watch.refuse_others(torch.autograd.grad(losses.sum(), list(weights.values()), allow_unused=True))


@dataclass(frozen=True)
class _Weight:
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
class _Call:
    """A product as its arguments tell it."""

    inputs: Tensor
    weight: Tensor
    kind: type[Linear] | Convolution = Linear
    turned: bool = False
    left: bool = False
    padding: int | None = None


class Watch(TorchFunctionMode):
    """A block in which products with some weights are shown.

    Args:
        weights: What the selected parameters of a network are meanwhile, by name. They require gradients, where these
            are on.
        see: Called with each product, what its weight was multiplied with and its output; may return another output.
    """

    def __init__(self, weights: Mapping[str, Tensor], see: See) -> None:
        super().__init__()
        self._names = tuple(weights)
        self._weights = {id(tensor): _Weight(name, tensor) for name, tensor in weights.items()}
        self._see = see
        self._with_gradients = torch.is_grad_enabled()
        self._others: dict[str, str] = {}  # what else was done with a weight, first
        self._taken: tuple[Tensor, int, Tensor] | None = None  # samples that were put in an order last, along an axis
        self._orders: dict[int, tuple[Tensor, Order]] = {}  # of packed samples, by their batch sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and look at it where a weight is among its arguments."""
        kwargs = kwargs or {}
        given = self._among((*args, *kwargs.values()) if kwargs else args)
        if given:
            return self._look(func, args, kwargs, given)
        result = func(*args, **kwargs)
        if func in _TAKING or func in _PACKING:
            self._note_order(func, args, result)
        return result

    def refuse_others(self, gradients: Sequence[Tensor | None]) -> None:
        """Refuse weights that are used in other ways than in products.

        Args:
            gradients: What came back to each of the weights by itself; zeros are nothing.

        Raises:
            UnsupportedLayerError: If anything did.
        """
        pairs = zip(self._names, gradients, strict=True)
        names = [name for name, gradient in pairs if gradient is not None and bool(gradient.any())]
        if names:
            how = self._others.get(names[0], "is used where it is not seen")
            raise UnsupportedLayerError(f"{names[0]!r} {how}", tuple(names))

    def _among(self, arguments: tuple[Any, ...]) -> list[_Weight]:
        """Return the weights among arguments."""
        known, found = self._weights, []
        for one in arguments:
            if one.__class__ is list or one.__class__ is tuple:
                found += [known[id(inner)] for inner in _flat(one) if id(inner) in known]
            elif id(one) in known:
                found.append(known[id(one)])
        return [one for one in found if one.holds] if found else found

    def _look(self, func: Any, args: Any, kwargs: Any, given: list[_Weight]) -> Any:
        """Call a function of some weights."""
        if func in _ATTENTION or func in LAYERS or func in CELLS:
            try:
                return self._tell(func, args, kwargs, given)
            except Exception as error:  # of no interest to the network, which may call in unknown ways
                pass_on_shortage(error)
                how = f"is in a layer that cannot be told in products: {first_line(error, typed=True)}"
                self._others |= {one.name: how for one in given}
        call = _read(func, args, kwargs, given[0].tensor)
        weight = None if call is None else next((one for one in given if one.tensor is call.weight), None)
        product = None if weight is None or call is None else _product(weight, call)
        if product is not None and call is not None and call.inputs is not call.weight:
            alone = call.weight.detach()
            args = [alone if one is call.weight else one for one in args]
            kwargs = {name: alone if one is call.weight else one for name, one in kwargs.items()}
            self._note(func, [one for one in given if one is not weight])
            return self._shown(product, call.inputs, func(*args, **kwargs))
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, given, result)
        return result

    def _shown(self, product: Product, inputs: Tensor, output: Tensor) -> Tensor:
        other = self._see(product, inputs, output)
        return output if other is None else other

    def _tell(self, func: Any, args: Any, kwargs: Any, given: Sequence[_Weight]) -> Any:
        """Compute a call of attention or of a recurrent layer in products."""
        recurrent, shown = func not in _ATTENTION, set[str]()

        def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, own: bool = True) -> Tensor:
            known = self._weights.get(id(weight))
            product = None if known is None else _product(known, _Call(inputs, weight))
            if product is None:
                return functional.linear(inputs, weight, bias)
            shown.add(product.name)
            output = functional.linear(inputs, weight.detach(), bias)
            return self._shown(replace(product, within=own, recurrent=recurrent), inputs, output)

        if func in LAYERS:
            _, order = self._orders.get(id(args[1]), (None, None))
            result: Any = run_layers(linear, LAYERS[func], order, *args, **kwargs)
        else:
            result = run_cell(linear, CELLS[func], *args, **kwargs) if recurrent else attend(linear, *args, **kwargs)
        self._note(func, [one for one in given if one.name not in shown])
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, given: list[_Weight], result: Any) -> None:
        """Keep another view of a weight in mind, and what else is done with it."""
        if len(given) == 1 and args and args[0] is given[0].tensor and isinstance(result, Tensor):
            turned = _lies(func, args, kwargs, given[0], result)
            if turned is not None and (result.requires_grad or not self._with_gradients):
                self._weights[id(result)] = _Weight(given[0].name, result, turned, _version(result))
                return
        if result is None or any(isinstance(one, Tensor) and one.requires_grad for one in _flat((result,))):
            self._note(func, given)

    def _note(self, func: Any, others: Sequence[_Weight]) -> None:
        """Keep in mind what weights were given to, if it should turn out to matter."""
        called = resolve_name(func) or getattr(func, "__name__", str(func))
        for one in others:
            self._others.setdefault(one.name, f"goes to {called}, which is no product that rows are made of")

    def _note_order(self, func: Any, args: Any, result: Any) -> None:
        """Keep the order in which samples are packed, which functions of recurrent layers are not told."""
        if func in _TAKING:
            self._taken = (result, *args[1:]) if len(args) == 3 else None
        elif self._taken is not None and args[0] is self._taken[0]:
            _, axis, order = self._taken
            back = order.argsort()
            if axis == (0 if args[2] else 1) and torch.equal(
                order[back], torch.arange(len(order), device=order.device)
            ):
                self._orders[id(result[1])] = result[1], (order, back)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """Yield what lists and tuples hold, but for those of numbers."""
    for value in values:
        if not isinstance(value, list | tuple):
            yield value
        elif value and not isinstance(value[0], int | float):
            yield from _flat(value)


def _lies(func: Any, args: Any, kwargs: Any, weight: _Weight, result: Tensor) -> bool | None:
    """Say whether what a function made of a weight lies the other way round than the parameter; None: it is another."""
    if func in _TURNS and weight.tensor.ndim == 2 and not kwargs:
        return weight.turned != _TURNS[func](*args[1:])
    if func not in _SAME or result.numel() != weight.tensor.numel() or not result.is_floating_point():
        return None
    return weight.turned if result.shape == weight.tensor.shape or not weight.turned else None


def _product(weight: _Weight, call: _Call) -> Product | None:
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


def _read(func: Any, args: Any, kwargs: Any, weight: Tensor) -> _Call | None:
    """Return the product with a weight that a call is; None if it is none."""
    reader = _PRODUCTS.get(func)
    try:
        call = None if reader is None else reader(*args, **kwargs)
    except (TypeError, ValueError):  # other arguments than are known
        return None
    if call is None or not isinstance(call.inputs, Tensor):
        return None
    if reader is _matmul and call.inputs is weight and call.weight.ndim > 2:
        return _Call(call.weight, weight, left=True)
    return call


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
_ATTENTION = {functional.multi_head_attention_forward}
_TAKING = {torch.index_select, Tensor.index_select}
_PACKING = {torch._C._VariableFunctions._pack_padded_sequence}

_TURNS: dict[Any, Callable[..., bool]] = {  # of two dimensions: whether they change places
    **dict.fromkeys((torch.t, Tensor.t, _attribute("T"), _attribute("mT")), lambda: True),
    **dict.fromkeys(
        (torch.transpose, Tensor.transpose, Tensor.swapaxes, Tensor.swapdims), lambda one, other: one % 2 != other % 2
    ),
    **dict.fromkeys((torch.permute, Tensor.permute), lambda *order: next(iter(_flat(order))) % 2 == 1),
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
