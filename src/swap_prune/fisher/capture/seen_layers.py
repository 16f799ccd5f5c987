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
from swap_prune.fisher.capture.layers import Lookup, UnsupportedLayerError, convolves_as_torch, is_supported
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
        recurrent: Whether it belongs to a recurrent layer, before which networks like to sort samples by their lengths.
    """

    name: str
    layer: nn.Module
    sides: Sides = lambda inputs, gradient: (inputs, gradient)
    recurrent: bool = False


@dataclass(frozen=True)
class SeenLayers:
    """The layers of the selected weights.

    Attributes:
        calls: By the module whose calls are watched.
        classes: By other modules, the class that they have meanwhile.
    """

    calls: Mapping[nn.Module, SeenLayer]
    classes: Mapping[nn.Module, type[nn.Module]]

    @property
    def within(self) -> bool:
        """Whether some calls are within a module that does more, which may be more on some data than on others."""
        return any(isinstance(module, _Inner) for module in self.calls)

    @property
    def by_name(self) -> dict[str, nn.Module]:
        """A Linear or Conv layer for each parameter."""
        return {seen.name: seen.layer for seen in self.calls.values()}

    @contextmanager
    def watched(self, hook: Callable[..., Any]) -> Iterator[None]:
        """Run a block with a forward hook, ``(module, arguments, named, output)``, on each module that is watched."""
        with slow_attention(), ExitStack() as undo:
            for module, replaced in self.classes.items():
                undo.callback(object.__setattr__, module, "__class__", type(module))
                object.__setattr__(module, "__class__", replaced)
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

    owner: nn.Module

    def __init__(self, owner: nn.Module, kind: type[nn.Module]) -> None:
        super().__init__()
        self.kind = kind
        object.__setattr__(self, "owner", owner)  # no child of it

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.kind.forward(self.owner, *arguments, **named)


class _Quiet:
    """Keeps a class that comes from it first from its other ancestors, which may keep account of theirs."""

    def __init_subclass__(cls, **_named: Any) -> None:
        pass


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
    classes: dict[nn.Module, type[nn.Module]] = {}
    others: dict[str, str] = {}
    for module in model.modules():
        stand_ins: dict[str, nn.Module] = {}
        kind = next((kind for kind in _FORWARDS if isinstance(module, kind)), None)
        if kind is not None and any(id(parameter) in names for parameter in module.parameters()):
            stand_ins = {weight: _StandIn(module, weight, _bias_of(weight)) for weight in _weights_of(module)}
            classes[module] = _class_with(module, kind, _refusing(_FORWARDS[kind](module, stand_ins)))
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = names.get(id(parameter))
            if name is None:
                continue
            if own in stand_ins and not plain:
                calls[stand_ins[own]] = SeenLayer(name, stand_ins[own], recurrent=kind is not nn.MultiheadAttention)
            elif own == "weight" and is_supported(module):
                calls[module] = SeenLayer(name, module)
            elif own == "weight" and not plain and (seen := _as_layer(module, name)):
                inner = _inner(module)
                calls[inner or module] = seen
                if inner is not None:
                    classes[module] = _class_with(module, inner.kind, inner)
            else:
                others[name] = f"{name!r} is {own!r} of a {type(module).__module__}.{type(module).__name__}"
    _check_none(others, plain=plain)
    return SeenLayers(calls, classes)


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
    if isinstance(module, nn.Linear) or convolves_as_torch(module):
        return SeenLayer(name, module)
    if is_turned(module):
        return SeenLayer(name, _StandIn(module), _swapped)
    if isinstance(module, nn.Embedding):
        is_plain = module.max_norm is None and not module.scale_grad_by_freq
        return SeenLayer(name, _LookupStandIn(module), _looked_up(module)) if is_plain else None
    if isinstance(module, _ConvTransposeNd):
        layer = _convolution(module)
        return None if layer is None else SeenLayer(name, layer, _swapped)
    return None


def _inner(module: nn.Module) -> _Inner | None:
    """Return what a module calls of a class of torch for its product, where its own class does more."""
    kind = next((kind for kind in _PRODUCTS if isinstance(module, kind)), type(module))
    return None if type(module).forward is kind.forward else _Inner(module, kind)


def _class_with(module: nn.Module, kind: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """Return a class like a module's own in which ``forward`` of one of torch's, that it comes from, is another.

    Raises:
        UnsupportedLayerError: If Python makes none.
    """

    def replacing(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if self is not module:  # a copy
            return kind.forward(self, *arguments, **named)
        return forward(*arguments, **named)

    own, replaced = type(module), type(kind.__name__, (kind,), {"forward": replacing})
    if own is kind:
        return replaced
    try:
        found: type[nn.Module] = types.new_class(own.__name__, (_Quiet, own, replaced))  # own, then replaced, then kind
        object.__setattr__(module, "__class__", found)
        object.__setattr__(module, "__class__", own)
    except Exception as error:  # whatever its metaclass raises, or another layout
        raise UnsupportedLayerError(f"{own.__name__} cannot be watched: {first_line(error, typed=True)}") from error
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
