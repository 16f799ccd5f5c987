"""Which calls of torch's functions make the gradients of the selected weights.

A watch stands between the network and torch while a pass runs, and sees each function that is called with one of the
weights, whoever calls it: a module of torch, a subclass of it, or code that takes ``layer.weight`` from elsewhere. A
product with a weight, a convolution or a lookup is one whose inputs and output gradients make the gradient of the
weight (:mod:`swap_prune.fisher.capture.layers`). Where the weight lies the other way round, as in a transposed
convolution, in an embedding or in ``x @ weight``, inputs and output gradients change places. Attention and recurrent
layers compute several products in one call, and are told in them
(:mod:`~swap_prune.fisher.capture.attention`, :mod:`~swap_prune.fisher.capture.recurrent`).

What does not make a gradient of a weight passes: its shape, copies that are detached. Anything else that is done with
it is not known, and refused.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode, resolve_name

from swap_prune.checks import first_line
from swap_prune.fisher.capture.attention import attend
from swap_prune.fisher.capture.layers import Convolution, Layer, Linear, Lookup, UnsupportedLayerError
from swap_prune.fisher.capture.recurrent import CELLS, LAYERS, Order, run_cell, run_layers
from swap_prune.network.calls import layer_input
from swap_prune.process_memory import pass_on_shortage

__all__ = ["Product", "See", "watched"]


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


@contextmanager
def watched(model: nn.Module, weights: Mapping[str, Tensor], see: See) -> Iterator[None]:
    """Run a block in which products with some weights are shown.

    Args:
        model: The network that runs.
        weights: What its selected parameters are meanwhile, by name.
        see: Called with each product, what its weight was multiplied with and its output; may return another output.

    Raises:
        UnsupportedLayerError: Within the block, if something else is done with a weight where gradients are on.
    """
    watch = _Watch(weights, see)
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                undo.callback(module.register_forward_pre_hook(watch.note_order, with_kwargs=True).remove)
        undo.enter_context(watch)
        yield


@dataclass(frozen=True)
class _Weight:
    """A selected parameter, or a view or copy of it with all its values in order, or the other way round."""

    name: str
    tensor: Tensor  # held, so that no other gets its id
    turned: bool = False


@dataclass(frozen=True)
class _Call:
    """A product as its arguments tell it."""

    inputs: Tensor
    weight: Tensor
    kind: type[Linear] | Convolution = Linear
    turned: bool = False
    left: bool = False
    padding: int | None = None


class _Watch(TorchFunctionMode):
    """Sees what is done with some weights."""

    def __init__(self, weights: Mapping[str, Tensor], see: See) -> None:
        super().__init__()
        self._weights = {id(tensor): _Weight(name, tensor) for name, tensor in weights.items()}
        self._see = see
        self._with_gradients = torch.is_grad_enabled()  # of the watch: what has none does not matter then
        self._orders: dict[int, tuple[Tensor, Order]] = {}  # of packed samples, by their batch sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and look at it where a weight is among its arguments."""
        kwargs = kwargs or {}
        given = [self._weights[id(one)] for one in _flat((*args, *kwargs.values())) if id(one) in self._weights]
        if not given:
            return func(*args, **kwargs)
        if func in _ATTENTION or func in LAYERS or func in CELLS:
            return self._tell(func, args, kwargs, given)
        if (call := _read(func, args, kwargs, given[0].tensor)) is not None:
            others = [one for one in given if one.tensor is not call.weight]  # such as a bias
            product = _product(given[0], call) if not others else None
            if product is not None:
                return self._shown(product, call.inputs, func(*args, **kwargs))
            given = others or given
        result = func(*args, **kwargs)
        if torch.is_grad_enabled() or not self._with_gradients:
            self._follow(func, args, kwargs, given, result)
        return result

    def note_order(self, _module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Forward pre-hook of recurrent layers: keep the order of packed samples, which functions are not told."""
        packed = layer_input(arguments, named)
        if isinstance(packed, PackedSequence):
            self._orders[id(packed.batch_sizes)] = packed.batch_sizes, (packed.sorted_indices, packed.unsorted_indices)

    def _shown(self, product: Product, inputs: Tensor, output: Tensor) -> Tensor:
        other = self._see(product, inputs, output)
        return output if other is None else other

    def _tell(self, func: Any, args: Any, kwargs: Any, given: list[_Weight]) -> Any:
        """Compute a call of attention or of a recurrent layer in products.

        Raises:
            UnsupportedLayerError: If it fails: that is no error of the network, which may call in unknown ways. Or if
                some weight is in none of the products.
        """
        recurrent, shown = func not in _ATTENTION, set[str]()

        def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, own: bool = True) -> Tensor:
            output = functional.linear(inputs, weight, bias)
            known = self._weights.get(id(weight))
            product = None if known is None else _product(known, _Call(inputs, weight))
            if product is None:
                return output
            shown.add(product.name)
            return self._shown(replace(product, within=own, recurrent=recurrent), inputs, output)

        try:
            result: Any
            if func in LAYERS:
                _, order = self._orders.get(id(args[1]), (None, None))
                result = run_layers(linear, LAYERS[func], order, *args, **kwargs)
            elif func in CELLS:
                result = run_cell(linear, CELLS[func], *args, **kwargs)
            else:
                result = attend(linear, *args, **kwargs)
        except UnsupportedLayerError:
            raise
        except Exception as error:
            pass_on_shortage(error)
            raise UnsupportedLayerError(f"a layer told in others failed: {first_line(error, typed=True)}") from error
        if rest := [one.name for one in given if one.name not in shown]:
            self._refuse(rest, func)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, given: list[_Weight], result: Any) -> None:
        """Keep other views of a weight in mind, and refuse what may make a gradient in a way that is not known."""
        if func in _APART or _is_told(func, result):
            return
        weight, first = given[0], bool(args) and args[0] is given[0].tensor
        if func in _LIKE and not first:  # another tensor in the type or the shape of the weight
            return
        turned = weight.turned
        if len(given) == 1 and first and not kwargs and weight.tensor.ndim == 2 and func in _TURNS:
            turned = turned != _TURNS[func](*args[1:])
        elif not (first and func in _SAME and _has_all(result, weight)):
            self._refuse([one.name for one in given], func)
            return
        self._weights.setdefault(id(result), replace(weight, tensor=result, turned=turned))

    def _refuse(self, names: list[str], func: Any) -> None:
        """Refuse a function of some weights, where gradients are watched."""
        if self._with_gradients:
            called = resolve_name(func) or getattr(func, "__name__", str(func))
            message = f"{names[0]!r} goes to {called}, which is no product that rows are made of"
            raise UnsupportedLayerError(message, tuple(dict.fromkeys(names)))


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    """Yield arguments, and what lists and tuples among them hold, but for those of numbers."""
    for value in values:
        if not isinstance(value, list | tuple):
            yield value
        elif value and not isinstance(value[0], int | float):
            yield from _flat(tuple(value))


def _is_told(func: Any, result: Any) -> bool:
    """Whether a function only tells something of a weight, and neither computes with it nor changes it."""
    if result is None:  # of what changes its arguments, such as ``weight[0] = 1``
        return getattr(func, "__name__", "") == "__get__"
    return not any(
        isinstance(one, Tensor) and (one.is_floating_point() or one.is_complex()) for one in _flat((result,))
    )


def _has_all(result: Any, weight: _Weight) -> bool:
    """Whether what was made of a weight has all its values in their order."""
    if not isinstance(result, Tensor) or result.numel() != weight.tensor.numel():
        return False
    return result.shape == weight.tensor.shape or not weight.turned


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

_TURNS: dict[Any, Callable[..., bool]] = {  # of two dimensions: whether they change places
    **dict.fromkeys((torch.t, Tensor.t, _attribute("T"), _attribute("mT")), lambda: True),
    **dict.fromkeys((torch.transpose, Tensor.transpose, Tensor.swapaxes), lambda one, other: one % 2 != other % 2),
    **dict.fromkeys((torch.permute, Tensor.permute), lambda *order: next(iter(_flat(order))) % 2 == 1),
}
_SAME = {  # all values in their order, in another type, place or shape
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
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.contiguous,
    Tensor.clone,
    torch.clone,
}
_LIKE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
_APART = {  # what has no gradient
    Tensor.detach,
    torch.detach,
    _attribute("data"),
    Tensor.new_empty,
    Tensor.new_full,
    Tensor.new_ones,
    Tensor.new_tensor,
    Tensor.new_zeros,
    torch.empty_like,
    torch.full_like,
    torch.ones_like,
    torch.rand_like,
    torch.randn_like,
    torch.zeros_like,
}
