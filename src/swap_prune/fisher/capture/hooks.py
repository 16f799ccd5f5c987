"""Gradients of single samples from one forward and one backward pass of a whole chunk of them.

In the forward pass the inputs of every product with a selected weight are kept
(:mod:`swap_prune.fisher.capture.watch`). The backward pass goes to the products' outputs and no further: autograd
forms no weight gradient, which it would sum over the samples. The gradient at an output and the input make those of the
single samples (:mod:`swap_prune.fisher.capture.layers`), while the pass is under way.

This holds if the weights are used in products alone, and if the loss of one sample does not depend on the others. The
latter cannot be seen from outside, so :func:`check_against` compares some samples with backward passes of their own.
Before recurrent layers networks like to sort samples by their lengths: a second backward pass, with another weight on
each loss, shows whether the items of such a layer are those of the samples in the same places.

Place in the pipeline: a back end of capture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.checks import first_line
from swap_prune.fisher.capture.bound import Bound, functional_call
from swap_prune.fisher.capture.joined import JoinedCalls, Sink
from swap_prune.fisher.capture.layers import Layer, Linear, UnsupportedLayerError, items_of, put_weight_gradients
from swap_prune.fisher.capture.products import Product
from swap_prune.fisher.capture.watch import Watch
from swap_prune.losses import LossFn, check_losses
from swap_prune.process_memory import pass_on_shortage
from swap_prune.samples.batches import batch_size, map_tensors, slice_batch
from swap_prune.selection import Selection

__all__ = ["OutputGradients", "check_against", "without_gradient"]

_VANISHED = 1e-30  # a gradient that may have lost its digits


class OutputGradients:
    """Runs a network forwards and backwards and hands over what its selected weights were multiplied with.

    The network's parameters and buffers are stood in for by copies without gradient for the time of a pass.
    """

    def __init__(self, model: nn.Module, selection: Selection, loss_fn: LossFn) -> None:
        self._places = selection.slices()
        self._loss_fn = loss_fn
        self._bound = Bound(model, self._forth_and_back)
        tensors = (*self._bound.named_parameters(), *self._bound.named_buffers())
        self._state = {name: without_gradient(tensor) for name, tensor in tensors}
        self._weights = {name: self._state[f"model.{name}"].requires_grad_() for name in selection.names}
        self._starts: list[Tensor] = []  # where the backward pass ends
        self._calls: JoinedCalls | None = None  # of the pass under way
        self._recording = False
        self._levels: Tensor | None = None  # of the losses, (n,), in a backward pass that compares the order of items
        self._in_order: list[Tensor] = []  # for each of their calls, whether it was the same
        self._compared: set[torch.dtype] = set()  # of products in the pass under way whose items' order is compared
        self._axes: dict[str, int] | None = None  # the dimension of each layer's inputs that is that of the samples
        self._shared: dict[str, set[torch.Size]] = {}  # inputs, of products where all samples share these
        self._shapes: dict[str, list[torch.Size]] = {}  # of the inputs of each layer's calls in the pass under way
        self._asked: dict[str, list[torch.Size]] = {}  # what weights were multiplied with in the pass under way
        self._counts: dict[str, set[tuple[int, int]]] = {}  # items and dimensions that each layer's calls had in it
        self._items: dict[str, set[tuple[float, int]]] = {}  # the same for each sample, where they were last told apart
        self.changed = False  # whether they were others than before, in the last pass whose samples are told apart

    @property
    def flattened(self) -> bool:
        """Whether a layer sees several items of a sample side by side, which cannot be told from those of others."""
        return any(share != 1 for items in self._items.values() for share, _ in items)

    def run(self, batch: Any, sink: Sink, size: int | None = None) -> Tensor:
        """Run a batch through the network.

        Args:
            batch: Samples that ``loss_fn`` takes.
            sink: Called during the backward pass with the calls of each selected layer that the losses depend on, one
                by one or several of a Linear layer together.
            size: How many samples there are, where those of a layer's inputs are to be told apart: a layer must then
                see as many items of each as of single samples. None: they are summed.

        Returns:
            The losses, (n,).

        Raises:
            UnsupportedLayerError: If something else is done with a selected weight than products, the losses do not
                depend on any, an input was changed in place, or the items that a layer sees of a sample vary.
            ValueError: If a loss is not finite or not per sample.
        """
        if self._axes is None and size is not None and size > 1:
            self._find_axes(batch)
        try:
            losses = self._run(batch, JoinedCalls(sink, size or 1))
        except Exception as error:
            if not self._shared:
                raise
            pass_on_shortage(error)  # else of the repeated outputs, perhaps, which are no matter of the network's
            raise UnsupportedLayerError(
                f"samples share the inputs of a layer: {first_line(error, typed=True)}"
            ) from error
        if size is not None:
            self._check_items(batch, size)
        return losses

    def fill_rows(self, batch: Any, rows: Tensor, *, in_batches: bool = False) -> Tensor:
        """Write the gradients of a batch to the first rows of G, (n or more, p), and return the losses, (n,).

        Args:
            batch: Samples that ``loss_fn`` takes.
            rows: Where the gradients go.
            in_batches: Whether the samples make one row together, the gradient of the sum of their losses.

        Raises:
            UnsupportedLayerError: As for :meth:`run`, or if a layer's inputs do not have the samples in front.
            ValueError: As for :meth:`run`.
        """
        count = None if in_batches else batch_size(batch)
        size = count or 1
        written: set[str] = set()

        def put(name: str, layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
            put_weight_gradients(layer, inputs, gradient, rows[:size, self._places[name]], add=name in written)
            written.add(name)

        losses = self.run(batch, put, count)
        if len(losses) != size and not in_batches:
            raise UnsupportedLayerError(f"{len(losses)} losses for {size} samples")
        for name, place in self._places.items():
            if name not in written:
                rows[:size, place] = 0
        return losses

    def _run(self, batch: Any, calls: JoinedCalls) -> Tensor:
        """Do both passes, and return the losses."""
        self._calls, self._recording, self._counts, self._shapes, self._compared = calls, True, {}, {}, set()
        self._asked = {}
        try:
            losses: Tensor = functional_call(self._bound, self._state, (map_tensors(without_gradient, batch),))
            calls.finish()
        finally:
            self._calls, self._recording, self._starts = None, False, []
            self._levels, self._in_order = None, []
        return losses

    def _find_axes(self, batch: Any) -> None:
        """Find for each parameter which dimension of its layers' inputs grows with the samples.

        It is not the first where tokens come before samples, as in ``nn.TransformerEncoder`` unless told otherwise.
        None does where all samples share the inputs, as positions.
        """
        seen = []
        for count in (1, 2):
            self._run(slice_batch(batch, 0, count), JoinedCalls(None, 1))
            seen.append((self._shapes, self._asked))
        (one, alone), (two, beside) = seen
        self._axes = {name: _grown(one[name], two[name]) for name in one.keys() & two.keys()}
        self._shared = {name: set(shapes) for name, shapes in alone.items() if shapes == beside.get(name)}

    def _check_items(self, batch: Any, size: int) -> None:
        """Compare the items that layers saw of each sample with those of single samples, where they are new.

        Where their number depends on the data, as of tokens without padding or of those that a router sends to an
        expert, a batch of them may be as many as a multiple of the samples and lie otherwise.
        """
        items = self._items_of(size)
        self.changed = items != self._items
        if not self.changed:
            return
        for place in sorted({0, size // 2, size - 1}):
            self._run(slice_batch(batch, place, place + 1), JoinedCalls(None, 1))
            alone = self._items_of(1)
            if alone != items:
                name = min(name for name in items.keys() | alone.keys() if items.get(name) != alone.get(name))
                raise UnsupportedLayerError(
                    f"the layer of {name!r} does not see as many items of each sample in a batch as alone: samples "
                    "cannot be told apart where they share an input, or where the number of items depends on the data"
                )
        self._items = items

    def _items_of(self, size: int) -> dict[str, set[tuple[float, int]]]:
        """Return the items of a sample that each layer saw in the last pass."""
        return {name: {(count / size, ndim) for count, ndim in counts} for name, counts in self._counts.items()}

    def _forth_and_back(self, model: nn.Module, batch: Any) -> Tensor:
        """Do both passes while the stand-ins are in place: a checkpointed block runs forwards once more in between.

        It does so under the same watch: autograd stays on this thread here, on a GPU too.
        """
        with torch.enable_grad(), Watch(self._weights, self._see) as watch:
            losses = check_losses(self._loss_fn(model, batch), None)
            if not losses.requires_grad:
                raise UnsupportedLayerError("the losses depend on none of the selected weights")
            self._recording = False
            with torch.autograd.grad_mode.set_multithreading_enabled(False):
                watch.refuse_others(self._back(losses))
        return losses.detach()

    def _back(self, losses: Tensor) -> Sequence[Tensor | None]:
        """Do the backward pass, and the one that compares the order of items.

        Returns:
            The gradients of the weights, past all products.
        """
        assert self._calls is not None
        starts, ones = tuple(self._starts), torch.ones_like(losses)
        compares = bool(self._compared) and 1 < len(losses) == self._calls.size
        found = _run_backwards(losses, ones, (*starts, *self._weights.values()), again=compares)
        if compares:
            self._levels = ones.ldexp(_exponents(losses, self._compared))
            _run_backwards(losses, self._levels, starts)
            if self._in_order and not bool(torch.stack(self._in_order).all()):
                raise UnsupportedLayerError("the network puts samples in another order before a recurrent layer")
        return found[len(starts) :]

    def _see(self, product: Product, inputs: Tensor, output: Tensor) -> Tensor | None:
        """Keep the inputs of a product, and have the gradient of its output sent on when it is known."""
        if not torch.is_grad_enabled():
            return None
        replaced = None
        assert self._calls is not None
        if self._recording:
            self._asked.setdefault(product.name, []).append(inputs.shape)
        shared = isinstance(product.layer, Linear) and inputs.shape in self._shared.get(product.name, ())
        if shared:
            inputs, output = (_for_each(one, self._calls.size) for one in (inputs, output))
        if output._is_view():  # what changes it in place afterwards would go past it
            output = replaced = output.clone()
        if not output.requires_grad:  # nothing before it does: the backward pass ends here
            start = output.detach().requires_grad_()
            self._starts.append(start)
            output = replaced = start.clone()  # what works in place cannot do so on the start itself
        if self._recording:  # else a checkpointed block, computed again
            compared = product.recurrent or shared
            self._compared |= {output.dtype} if compared else set()
            receive = _unwatched(self._receiver(product, inputs, compared=compared))
            output.register_hook(receive)  # type: ignore[no-untyped-call]
        return replaced

    def _receiver(self, seen: Product, inputs: Tensor, *, compared: bool) -> Callable[[Tensor], None]:
        inputs = inputs.detach()
        version, calls = inputs._version, self._calls
        assert calls is not None
        calls.expect(seen.name, seen.layer)
        sizes: list[Tensor] = []  # of the gradient of each item

        def receive(gradient: Tensor) -> None:
            if self._levels is not None:
                if sizes and len(sizes[0]) == len(self._levels):  # else several of a sample, which are counted
                    self._in_order.append(_is_in_order(sizes[0], _sizes_of(gradient), self._levels))
                return
            if inputs._version != version:
                raise UnsupportedLayerError(f"what {seen.name!r} was multiplied with was changed in place")
            went, came = seen.sides(inputs, gradient)
            self._shapes.setdefault(seen.name, []).append(went.shape)
            if self._axes and isinstance(seen.layer, Linear) and (axis := self._axes.get(seen.name, 0)):
                went, came = went.movedim(axis, 0), came.movedim(axis, 0)
            self._counts.setdefault(seen.name, set()).add((items_of(seen.layer, went), went.ndim))
            with torch.no_grad():
                if compared and calls.size > 1:
                    sizes.append(_sizes_of(gradient))
                calls.add(seen.name, seen.layer, went, came)

        return receive


def _for_each(shared: Tensor, size: int) -> Tensor:
    """Return what all samples share for each of them, (size, ...): gradients then come back for each."""
    one = shared.ndim > 0 and shared.shape[0] == 1
    return (shared if one else shared.unsqueeze(0)).expand(size, *shared.shape[one:])


def _unwatched(receive: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a function that does its work past the watch, which would slow it down."""

    def receive_unwatched(gradient: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            receive(gradient)

    return receive_unwatched


def _run_backwards(
    losses: Tensor, weights: Tensor, ends: tuple[Tensor, ...], *, again: bool = False
) -> Sequence[Tensor | None]:
    """Run a backward pass from weighted losses and return the gradients where it ends; ``again``: not the last one.

    ``torch.autograd.grad`` is a function that a watch sees, and what is called within one of these is not watched.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    gradients: Sequence[Tensor | None] = engine.run_backward(
        (losses,), (weights,), again, False, ends, allow_unreachable=True, accumulate_grad=False
    )
    return gradients


def _sizes_of(gradient: Tensor) -> Tensor:
    """Return the norm of each item's gradient at the output of a recurrent layer's product, (items,)."""
    sizes: Tensor = torch.linalg.vector_norm(gradient.detach().flatten(1).double(), dim=1)
    return sizes


def _exponents(losses: Tensor, through: Collection[torch.dtype]) -> Tensor:
    """Return powers of two for losses, (n,), whose gradients go through some types of numbers.

    One in 64 has the same, one in 8 where numbers do not reach so far.
    """
    levels = 8 if torch.float16 in {losses.dtype, *through} else 64
    return torch.arange(len(losses), device=losses.device) % levels - levels // 2


def _is_in_order(sizes: Tensor, weighted: Tensor, weights: Tensor) -> Tensor:
    """Say, (), whether items are those of the samples in the same places: their gradients have these losses' weights.

    Weights are powers of two, which change no digit of a gradient.
    """
    expected = weights.double() * sizes
    return ((weighted - expected).abs() <= 0.01 * expected + _VANISHED).all()


def _grown(one: list[torch.Size], two: list[torch.Size]) -> int:
    """Return the dimension that is twice as large for two samples as for one, in every call; the first, if none is."""
    axes = range(min(map(len, (*one, *two))) - 1)  # the last is that of the features
    return next(
        (axis for axis in axes if all(more[axis] == 2 * own[axis] for own, more in zip(one, two, strict=False))),
        0,
    )


def check_against(
    found: tuple[Tensor, Tensor], singles: tuple[Tensor, Tensor], selection: Selection, precision: torch.dtype
) -> None:
    """Check rows of G, parameter by parameter, and losses against those of backward passes of their own.

    Args:
        found: Rows from the outputs of layers, (m, p), and their losses, (m,).
        singles: The same from one backward pass a sample.
        selection: The places of the parameters.
        precision: The dtype of the network. Half of its digits have to agree.

    Raises:
        UnsupportedLayerError: If they differ by more than rounding.
    """
    eps = torch.finfo(precision).eps
    (rows, losses), (expected, wanted) = found, singles
    if not torch.allclose(losses, wanted, rtol=eps**0.5, atol=eps**0.5):
        raise UnsupportedLayerError("the losses are not those of single samples: loss_fn mixes the samples of a batch")
    whole = torch.linalg.vector_norm(expected, dim=1)
    for name, place in selection.slices().items():
        error = torch.linalg.vector_norm(rows[:, place] - expected[:, place], dim=1)
        size = torch.linalg.vector_norm(expected[:, place], dim=1)
        if not bool((error <= eps**0.5 * size + 10 * eps * whole).all()):
            raise UnsupportedLayerError(
                f"the gradients of {name!r} are not those of single samples: its weight is used outside its layer, "
                "or loss_fn mixes the samples of a batch"
            )


def without_gradient(tensor: Tensor) -> Tensor:
    """Detach a tensor; one of inference mode, which autograd refuses to keep, is copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
