"""Which layers' inputs and output gradients make the gradients of the selected weights.

Those of a Linear or Conv layer do as they are. A transposed convolution, and the ``Conv1D`` of transformers, whose
weight is (inputs, outputs), are a convolution and a Linear layer whose inputs and output gradients change places. So is
an embedding, a Linear layer of words that are ones among zeros; its head may be tied to it. Recurrent layers and
attention compute several products in one call: while a pass is watched, their ``forward`` is one that does the same by
Linear layers that stand in for their weights. A subclass may do more around what torch's own class computes: then that
is watched, and not the whole.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.hooks`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from swap_prune.checks import first_line, some_of
from swap_prune.fisher.capture import attention, recurrent
from swap_prune.fisher.capture.layers import Lookup, UnsupportedLayerError, is_supported
from swap_prune.network.calls import is_turned
from swap_prune.network.modes import slow_attention
from swap_prune.process_memory import pass_on_shortage
from swap_prune.selection import Selection

__all__ = ["SeenLayer", "SeenLayers", "seen_layers"]

_PRODUCTS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
_FORWARDS: dict[type[nn.Module], Callable[[Any, Mapping[str, nn.Module]], Callable[..., Any]]] = {
    **dict.fromkeys(recurrent.LAYERS, recurrent.layer_forward),
    **dict.fromkeys(recurrent.CELLS, recurrent.cell_forward),
    nn.MultiheadAttention: attention.attention_forward,
}

# (what a layer was called with, gradient at its output) -> (inputs, gradient at the output) of the layer that it is
Sides = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SeenLayer:
    """How the calls of a module make the gradient of a parameter.

    Attributes:
        name: The parameter.
        layer: A Linear or Conv layer with a weight of the parameter's shape.
        sides: The layer's inputs and output gradients, of those of the module.
    """

    name: str
    layer: nn.Module
    sides: Sides = lambda inputs, gradient: (inputs, gradient)


@dataclass(frozen=True)
class SeenLayers:
    """The layers of the selected weights.

    Attributes:
        calls: By the module whose calls are watched.
        forwards: By other modules, a class of torch, and what these compute in the place of its ``forward`` meanwhile.
    """

    calls: Mapping[nn.Module, SeenLayer]
    forwards: Mapping[nn.Module, tuple[type[nn.Module], Callable[..., Any]]]

    @property
    def by_name(self) -> dict[str, nn.Module]:
        """A Linear or Conv layer for each parameter."""
        return {seen.name: seen.layer for seen in self.calls.values()}

    @contextmanager
    def watched(self, hook: Callable[..., Any]) -> Iterator[None]:
        """Run a block with a forward hook, ``(module, arguments, named, output)``, on each module that is watched."""
        with slow_attention(), ExitStack() as undo:
            for module, (kind, forward) in self.forwards.items():
                undo.callback(setattr, module, "__class__", type(module))
                module.__class__ = _with_forward(type(module), kind, forward)
            for module in self.calls:
                undo.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            yield


class _StandIn(nn.Linear):
    """A Linear layer whose weight and bias are those of another module, read when it runs."""

    _of: tuple[nn.Module, str, str]

    def __init__(self, owner: nn.Module, weight: str = "weight", bias: str = "") -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = getattr(owner, weight).shape
        object.__setattr__(self, "_of", (owner, weight, bias))  # no child of it

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        owner, name, _ = self._of
        return getattr(owner, name)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        owner, _, name = self._of
        return getattr(owner, name, None)


class _LookupStandIn(Lookup, _StandIn):
    """An embedding."""


class _Inner(nn.Module):
    """What a class of torch computes of a module whose own class does more."""

    _of: tuple[nn.Module, type[nn.Module]]

    def __init__(self, owner: nn.Module, kind: type[nn.Module]) -> None:
        super().__init__()
        object.__setattr__(self, "_of", (owner, kind))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        owner, kind = self._of
        return kind.forward(owner, *arguments, **named)


def seen_layers(model: nn.Module, selection: Selection, *, plain: bool = False) -> SeenLayers:
    """Find the layers of the selected weights.

    Args:
        model: The network.
        selection: The selected parameters; one that several layers share has several.
        plain: Whether they may be Linear and Conv layers only.

    Raises:
        UnsupportedLayerError: If a selected parameter is none that the calls of such layers make the gradient of.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameters[name]): name for name in selection.names}
    calls: dict[nn.Module, SeenLayer] = {}
    forwards: dict[nn.Module, tuple[type[nn.Module], Callable[..., Any]]] = {}
    others: dict[str, str] = {}
    for module in model.modules():
        stand_ins: dict[str, nn.Module] = {}
        kind = next((kind for kind in _FORWARDS if isinstance(module, kind)), None)
        if kind is not None and any(id(parameter) in names for parameter in module.parameters()):
            stand_ins = {weight: _StandIn(module, weight, _bias_of(weight)) for weight in _weights_of(module)}
            forwards[module] = kind, _refusing(_FORWARDS[kind](module, stand_ins))
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names.get(id(parameter))
            if name is None:
                continue
            if own in stand_ins and not plain:
                calls[stand_ins[own]] = SeenLayer(name, stand_ins[own])
            elif own == "weight" and is_supported(module):
                calls[module] = SeenLayer(name, module)
            elif own == "weight" and not plain and (seen := _as_layer(module, name)):
                called = _called(module)
                calls[called] = seen
                if isinstance(called, _Inner):
                    forwards[module] = called._of[1], called
            else:
                others[name] = f"{name!r} is {own!r} of a {type(module).__module__}.{type(module).__name__}"
    _check_none(others, plain=plain)
    return SeenLayers(calls, forwards)


def _check_none(others: Mapping[str, str], *, plain: bool) -> None:
    """Refuse parameters of other layers."""
    if others:
        first, *more = others
        wanted = "Linear or Conv" if plain else "Linear, Conv, recurrent, attention or embedding"
        raise UnsupportedLayerError(
            f"{others[first]}, not the weight of a {wanted} layer that computes as torch's own"
            + (f", and no more {'is' if len(more) == 1 else 'are'} {some_of(map(repr, more))}" if more else ""),
            tuple(others),
        )


def _as_layer(module: nn.Module, name: str) -> SeenLayer | None:
    """Return the Linear or Conv layer that a module is, be it with inputs and output gradients swapped."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return SeenLayer(name, module)
    if is_turned(module):
        return SeenLayer(name, _StandIn(module), _swapped)
    if isinstance(module, nn.Embedding):
        return SeenLayer(name, _LookupStandIn(module), _looked_up(module)) if module.max_norm is None else None
    if isinstance(module, _ConvTransposeNd):
        layer = _convolution(module)
        return None if layer is None else SeenLayer(name, layer, _swapped)
    return None


def _called(module: nn.Module) -> nn.Module:
    """Return what is called for a product: a module itself, or what it calls of a class of torch."""
    kind = next((kind for kind in _PRODUCTS if isinstance(module, kind)), type(module))
    return module if type(module).forward is kind.forward else _Inner(module, kind)


def _with_forward(own: type[nn.Module], kind: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """Return a class like a module's own in which ``forward`` of one of torch's, that it comes from, is another."""
    replaced = type(kind.__name__, (kind,), {"forward": lambda _self, *args, **named: forward(*args, **named)})
    if own is kind:
        return replaced
    found: type[nn.Module] = types.new_class(own.__name__, (own, replaced))  # looks in own, then replaced, then kind
    return found


def _swapped(inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return gradient, inputs


def _looked_up(module: nn.Embedding) -> Sides:
    """Return the sides of a :class:`Lookup`."""

    def sides(words: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        words = words.long().unsqueeze(-1)
        if module.padding_idx is not None:  # torch gives it no gradient
            gradient = gradient.masked_fill(words == module.padding_idx, 0)
        return gradient, words

    return sides


def _convolution(module: _ConvTransposeNd) -> nn.Module | None:
    """Return the convolution whose gradient with respect to its inputs a transposed one computes."""
    if any(more >= step for more, step in zip(module.output_padding, module.stride, strict=True)):
        return None  # the convolution would have more places than the inputs
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(module.kernel_size) - 1]
    layer: nn.Module = kind(
        module.out_channels,
        module.in_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=False,
        device="meta",
    )
    return layer


def _weights_of(module: nn.Module) -> list[str]:
    """Return the names of the weights of a recurrent layer's or of attention's products, output layers apart."""
    if isinstance(module, nn.MultiheadAttention):
        return attention.weights_of(module)
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    return ["weight_ih", "weight_hh"]


def _bias_of(weight: str) -> str:
    """Return the name of the bias that goes with a weight, where there is one."""
    return weight.replace("weight", "bias")


def _refusing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``forward`` whose failure is no error of the network, which may be called in ways that are not known."""

    def attempt(*arguments: Any, **named: Any) -> Any:
        try:
            return forward(*arguments, **named)
        except UnsupportedLayerError:
            raise
        except Exception as error:
            pass_on_shortage(error)
            raise UnsupportedLayerError(f"a layer told in others failed: {first_line(error, typed=True)}") from error

    return attempt
