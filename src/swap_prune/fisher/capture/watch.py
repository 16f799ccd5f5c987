"""Which calls of torch's functions make the gradients of the selected weights.

A watch stands between the network and torch while a pass runs, and sees each function that is called with one of the
weights, whoever calls it: a module of torch, a subclass of it, or code that takes ``layer.weight`` from elsewhere. It
shows the products among these calls (:mod:`~swap_prune.fisher.capture.products`). Attention and recurrent layers
compute several in one call, and are told in them (:mod:`~swap_prune.fisher.capture.attention`,
:mod:`~swap_prune.fisher.capture.recurrent`).

Products are computed with weights that are detached. So whatever gradient reaches a weight by itself is of something
else that was done with it, seen or not, and none of it is known: such weights are refused
(:meth:`Watch.refuse_others`).

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from swap_prune.checks import first_line
from swap_prune.fisher.capture.attention import attend
from swap_prune.fisher.capture.layers import UnsupportedLayerError
from swap_prune.fisher.capture.products import Product, Weight, flat, in_another_form, read_product
from swap_prune.fisher.capture.recurrent import CELLS, LAYERS, Order, run_cell, run_layers
from swap_prune.process_memory import pass_on_shortage

__all__ = ["See", "Watch", "check_products"]

See = Callable[[Product, Tensor, Tensor], Tensor | None]  # (product, inputs, output) -> another output

_ATTENTION = {functional.multi_head_attention_forward}
_TAKING = {torch.index_select, Tensor.index_select}
_PACKING = {torch._C._VariableFunctions._pack_padded_sequence}


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
        self._weights = {id(tensor): Weight(name, tensor) for name, tensor in weights.items()}
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

    def _among(self, arguments: tuple[Any, ...]) -> list[Weight]:
        """Return the weights among arguments."""
        known, found = self._weights, []
        for one in arguments:
            if one.__class__ is list or one.__class__ is tuple:
                found += [known[id(inner)] for inner in flat(one) if id(inner) in known]
            elif id(one) in known:
                found.append(known[id(one)])
        return [one for one in found if one.holds] if found else found

    def _look(self, func: Any, args: Any, kwargs: Any, given: list[Weight]) -> Any:
        """Call a function of some weights."""
        if func in _ATTENTION or func in LAYERS or func in CELLS:
            try:
                return self._tell(func, args, kwargs, given)
            except Exception as error:  # of no interest to the network, which may call in unknown ways
                pass_on_shortage(error)
                how = f"is in a layer that cannot be told in products: {first_line(error, typed=True)}"
                self._others |= {one.name: how for one in given}
        if (read := read_product(func, args, kwargs, given)) is not None:
            own, alone = read.weight.tensor, read.weight.tensor.detach()
            args = [alone if one is own else one for one in args]
            kwargs = {name: alone if one is own else one for name, one in kwargs.items()}
            self._note(func, [one for one in given if one is not read.weight])  # such as a bias
            return self._shown(read.product, read.inputs, func(*args, **kwargs))
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, given, result)
        return result

    def _shown(self, product: Product, inputs: Tensor, output: Tensor) -> Tensor:
        other = self._see(product, inputs, output)
        return output if other is None else other

    def _tell(self, func: Any, args: Any, kwargs: Any, given: Sequence[Weight]) -> Any:
        """Compute a call of attention or of a recurrent layer in products."""
        recurrent, shown = func not in _ATTENTION, set[str]()

        def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, own: bool = True) -> Tensor:
            known = self._weights.get(id(weight))
            read = None if known is None else read_product(functional.linear, (inputs, weight), {}, [known])
            if read is None:
                return functional.linear(inputs, weight, bias)
            shown.add(read.product.name)
            output = functional.linear(inputs, weight.detach(), bias)
            return self._shown(replace(read.product, within=own, recurrent=recurrent), inputs, output)

        if func in LAYERS:
            _, order = self._orders.get(id(args[1]), (None, None))
            result: Any = run_layers(linear, LAYERS[func], order, *args, **kwargs)
        else:
            result = run_cell(linear, CELLS[func], *args, **kwargs) if recurrent else attend(linear, *args, **kwargs)
        self._note(func, [one for one in given if one.name not in shown])
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, given: list[Weight], result: Any) -> None:
        """Keep another view of a weight in mind, and what else is done with it."""
        other = in_another_form(func, args, kwargs, given[0], result) if len(given) == 1 else None
        if other is not None and (result.requires_grad or not self._with_gradients):
            self._weights[id(result)] = other
            return
        if result is None or any(isinstance(one, Tensor) and one.requires_grad for one in flat((result,))):
            self._note(func, given)

    def _note(self, func: Any, others: Sequence[Weight]) -> None:
        """Keep in mind what weights were given to, if it should turn out to matter."""
        for one in others:
            called = resolve_name(func) or getattr(func, "__name__", str(func))
            self._others.setdefault(one.name, f"goes to {called}, which is no product that rows are made of")

    def _note_order(self, func: Any, args: Any, result: Any) -> None:
        """Keep the order in which samples are packed, which functions of recurrent layers are not told."""
        if func in _TAKING:
            self._taken = (result, *args[1:]) if len(args) == 3 else None
        elif self._taken is not None and args[0] is self._taken[0]:
            _, axis, order = self._taken
            back = order.argsort()
            whole = torch.equal(order[back], torch.arange(len(order), device=order.device))
            if whole and axis == (0 if args[2] else 1):
                self._orders[id(result[1])] = result[1], (order, back)
