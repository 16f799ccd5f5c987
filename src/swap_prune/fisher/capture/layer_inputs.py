"""What goes into each layer on the calibration samples: the statistics of layer-wise methods.

A Linear layer, or a convolution read as a matrix, maps inputs x (d,) to ``W x``. Removing weights changes its output
by ``(W - W') x``, whose mean square over the calibration inputs depends on them through ``mean(x x^T)`` alone. It is
gathered batch by batch, as the weights are used; no input is stored. A convolution has one x for each output position,
cut out as the kernel sees it (``unfold``), padding included.

Place in the pipeline: beside capture, for methods with ``needs_inputs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.checks import some_of
from swap_prune.fisher.capture.layers import Layer, Linear, Lookup, unfold_inputs
from swap_prune.fisher.capture.products import Product
from swap_prune.fisher.capture.watch import Watch
from swap_prune.losses import LossFn, check_calibration, run_loss
from swap_prune.network.modes import eval_mode
from swap_prune.selection import Selection
from swap_prune.surgery.weights import temporary_weights

__all__ = ["LayerInputs"]

_CHUNK_BYTES = 128 * 2**20  # unfolded inputs held at once

_Reduce = Callable[[Tensor], Tensor]  # inputs (groups, m, d) -> sum over m of a statistic


@dataclass(frozen=True)
class LayerInputs:
    """Statistics of the inputs of the selected layers.

    Each method runs the network once over the batches. Groups are those of a grouped convolution, 1 otherwise; d is the
    number of weights of one output, so that the weight of a layer is ``(groups, outputs / groups, d)``.

    Attributes:
        model: The network; nothing of it changes.
        selection: The parameters that statistics are wanted for.
        batches: Calibration batches on the model's device.
        loss_fn: Used to run the network on a batch.
        weights: Selected weights (p,) that the network runs with, those of the stage, with noise on them; None: its own
            as they are when it is asked.
    """

    model: nn.Module
    selection: Selection
    batches: Sequence[Any]
    loss_fn: LossFn
    weights: Tensor | None = None

    def mean_squares(self) -> dict[str, Tensor]:
        """Return ``mean(x_j^2)`` over samples and positions, (groups, d), by parameter name.

        Raises:
            ValueError: If a parameter is not the weight of Linear or Conv layers, or its layers did not run.
        """
        return self._gather(lambda x: x.square().sum(1))

    def moments(self) -> dict[str, Tensor]:
        """Return ``mean(x x^T)`` over samples and positions, (groups, d, d), by parameter name.

        Raises:
            ValueError: As for :meth:`mean_squares`.
        """
        return self._gather(lambda x: x.mT @ x)

    def _disturbed(self) -> AbstractContextManager[None]:
        """Run a block with the weights that inputs are asked of."""
        return nullcontext() if self.weights is None else temporary_weights(self.model, self.selection, self.weights)

    def _gather(self, reduce: _Reduce) -> dict[str, Tensor]:
        sums, others = {name: _Sum(reduce) for name in self.selection.names}, dict[str, str]()
        with eval_mode(self.model), torch.no_grad(), ExitStack() as disturbed:
            check_calibration(self.model, self.loss_fn, self.batches)
            disturbed.enter_context(self._disturbed())
            parameters = dict(self.model.named_parameters())

            def see(product: Product, inputs: Tensor, _output: Tensor) -> None:
                if other := _other(product, parameters[product.name], sums[product.name]):
                    others[product.name] = other
                else:
                    sums[product.name].add(product.layer, inputs.mT if product.left else inputs)

            for batch in self.batches:
                with Watch({name: parameters[name] for name in sums}, see):
                    run_loss(self.model, batch, self.loss_fn)
        if others:
            raise ValueError(
                f"layer-wise methods prune the weights of Linear and Conv layers: {'; '.join(others.values())}; leave "
                f"out what is not by ignore={list(others)}, or use a method that works on gradients"
            )
        if unseen := [name for name, total in sums.items() if total.count == 0]:
            raise ValueError(
                f"no inputs of {some_of(map(repr, unseen))} were seen: no Linear or Conv layer multiplies with "
                f"such a weight, or no sample reached it; leave them out with ignore={unseen}, or use a method that "
                "works on gradients"
            )
        for name, total in sums.items():
            if not bool(total.value.isfinite().all()):
                raise ValueError(
                    f"the inputs of {name!r} are not finite: check the calibration data and the weights before it"
                )
        return {name: total.value / total.count for name, total in sums.items()}


def _other(product: Product, parameter: Tensor, total: _Sum) -> str:
    """Say what else than the weight of a Linear or Conv layer a parameter is; nothing if it is none."""
    if isinstance(product.layer, Lookup):
        return f"{product.name!r} is an embedding"
    if product.recurrent:
        return f"{product.name!r} belongs to a recurrent layer"
    if product.within or product.turned:
        return f"{product.name!r} {'projects for attention' if product.within else 'multiplies the other way round'}"
    shape, groups = product.layer.shape, product.layer.groups
    if (shape[0], math.prod(shape[1:])) != (len(parameter), parameter[0].numel()) or total.groups not in (0, groups):
        return f"{product.name!r} multiplies in another shape"
    return ""


@dataclass
class _Sum:
    """A statistic of one parameter's inputs, added up over batches."""

    reduce: _Reduce
    value: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    count: int = 0
    groups: int = 0  # 0: none was added

    def add(self, layer: Layer, inputs: Tensor) -> None:
        """Add the inputs of one call."""
        self.groups = layer.groups
        for x in _as_rows(layer, inputs.detach()):
            self.value = self.value.to(x.device) + self.reduce(x)
            self.count += x.shape[1]


def _as_rows(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of a layer as (groups, m, d), in pieces and in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(layer, Linear):
        yield x.reshape(1, -1, x.shape[-1])
        return
    x = x.reshape(-1, *x.shape[-len(layer.kernel) - 1 :])  # a convolution takes unbatched inputs as well
    places = math.prod(layer.kernel)
    if len(x) == 0:  # none came to an expert
        yield x.new_zeros(layer.groups, 0, math.prod(layer.shape[1:]))
        return
    bytes_each = math.prod(x.shape[1:]) * places * x.element_size()
    for part in torch.split(x, max(1, _CHUNK_BYTES // bytes_each)):
        seen = unfold_inputs(layer, part)  # (items, groups, positions, d), with the channel last
        seen = seen.transpose(0, 1).flatten(1, 2)
        yield torch.unflatten(seen, 2, (places, -1)).mT.flatten(2)
