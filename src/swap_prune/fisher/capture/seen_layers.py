"""Which layers' inputs and output gradients make the gradients of the selected weights.

Those of a Linear or Conv layer do as they are. A transposed convolution, and the ``Conv1D`` of transformers, whose
weight is (inputs, outputs), are a convolution and a Linear layer whose inputs and output gradients change places. So is
an embedding, a Linear layer of words that are ones among zeros; its head may be tied to it. Recurrent layers and
attention compute several products in one call: while a pass is watched, their ``forward`` is one that does the same by
Linear layers that stand in for their weights.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from swap_prune.checks import some_of
from swap_prune.fisher.capture import recurrent
from swap_prune.fisher.capture.attention import attention_forward, slow_path
from swap_prune.fisher.capture.layers import UnsupportedLayerError, is_supported
from swap_prune.network.calls import is_turned
from swap_prune.selection import Selection

__all__ = ["SeenLayer", "SeenLayers", "plain_layers", "seen_layers"]

_TRANSPOSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ConvTranspose1d: nn.Conv1d,
    nn.ConvTranspose2d: nn.Conv2d,
    nn.ConvTranspose3d: nn.Conv3d,
}


Sides = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # what a call was given and what came back -> (inputs, gradient)

_SEVERAL: dict[type[nn.Module], Callable[[Any, Mapping[str, nn.Module]], Callable[..., Any]]] = {
    **dict.fromkeys(recurrent.LAYERS, recurrent.layer_forward),
    **dict.fromkeys(recurrent.CELLS, recurrent.cell_forward),
    nn.MultiheadAttention: attention_forward,
}


@dataclass(frozen=True)
class SeenLayer:
    """How the calls of a layer make the gradient of a parameter.

    Attributes:
        name: The parameter.
        layer: A Linear or Conv layer with a weight of the parameter's shape.
        sides: Its inputs and the gradient at its output, from what a call was given and what came back to its output.
    """

    name: str
    layer: nn.Module
    sides: Sides = lambda given, back: (given, back)


@dataclass(frozen=True)
class SeenLayers:
    """The layers of the selected weights.

    Attributes:
        calls: By the module whose calls are watched.
        forwards: What modules compute with that call others while they are watched.
    """

    calls: Mapping[nn.Module, SeenLayer]
    forwards: Mapping[nn.Module, Callable[..., Any]]

    @property
    def by_name(self) -> dict[str, nn.Module]:
        """A Linear or Conv layer for each parameter."""
        return {seen.name: seen.layer for seen in self.calls.values()}

    @contextmanager
    def watched(self, hook: Callable[..., Any]) -> Iterator[None]:
        """Run a block with a forward hook, ``(module, arguments, named, output)``, on each module that is watched."""
        with slow_path(), ExitStack() as undo:
            for module, forward in self.forwards.items():
                undo.callback(delattr, module, "forward")
                module.forward = forward
            for module in self.calls:
                undo.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            yield


class _StandIn(nn.Linear):
    """A Linear layer whose weight and bias are those of another module, read when it runs."""

    _of: tuple[nn.Module, str, str | None]

    def __init__(self, owner: nn.Module, weight: str, bias: str | None) -> None:
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
        return None if name is None else getattr(owner, name)


def seen_layers(model: nn.Module, selection: Selection) -> SeenLayers:
    """Find the layers of the selected weights.

    Args:
        model: The network.
        selection: The selected parameters; one that several layers share has several.

    Raises:
        UnsupportedLayerError: If a selected parameter is none that the calls of layers make the gradient of.
    """
    names = _selected(model, selection)
    calls: dict[nn.Module, SeenLayer] = {}
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    others: dict[str, str] = {}
    for module in model.modules():
        stand_ins, forward = _told_apart(module)
        for own, name in _own_names(module, names):
            if own in stand_ins:
                calls[stand_ins[own]] = SeenLayer(name, stand_ins[own])
            elif own == "weight" and (found := _as_layer(module, name)) is not None:
                calls[module] = found
            else:
                others[name] = _told(name, own, module)
        if forward is not None and any(id(parameter) in names for parameter in module.parameters()):
            forwards[module] = forward
    _check_none(others, "Linear, Conv, recurrent or attention layer")
    return SeenLayers(calls, forwards)


def plain_layers(model: nn.Module, selection: Selection) -> SeenLayers:
    """Find the layers of the selected weights where these are of Linear and Conv layers alone.

    Raises:
        UnsupportedLayerError: If a selected parameter is anything else.
    """
    names = _selected(model, selection)
    found = {(module, own): name for module in model.modules() for own, name in _own_names(module, names)}
    _check_none(
        {
            name: _told(name, own, module)
            for (module, own), name in found.items()
            if own != "weight" or not is_supported(module)
        },
        "Linear or Conv layer",
    )
    return seen_layers(model, selection)


def _selected(model: nn.Module, selection: Selection) -> dict[int, str]:
    """Return the name of each selected parameter by its identity."""
    parameters = dict(model.named_parameters())
    return {id(parameters[name]): name for name in selection.names}


def _own_names(module: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Yield the selected parameters that a module itself holds: their names in it, and in the model."""
    for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if id(parameter) in names:
            yield own, names[id(parameter)]


def _told(name: str, own: str, module: nn.Module) -> str:
    return f"{name!r} is {own!r} of a {type(module).__module__}.{type(module).__name__}"


def _check_none(others: Mapping[str, str], wanted: str) -> None:
    """Refuse parameters of other layers than are wanted."""
    if others:
        first, *more = others
        raise UnsupportedLayerError(
            f"{others[first]}, not the weight of a {wanted} that computes as torch's own"
            + (f", and no more {'is' if len(more) == 1 else 'are'} {some_of(map(repr, more))}" if more else ""),
            tuple(others),
        )


def _as_layer(module: nn.Module, name: str) -> SeenLayer | None:
    """Return the Linear or Conv layer that a module is, be it with inputs and output gradients swapped."""
    if is_supported(module):
        return SeenLayer(name, module)
    if is_turned(module):
        return SeenLayer(name, _StandIn(module, "weight", None), _swapped)
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward and not (module.scale_grad_by_freq or module.max_norm)
        return SeenLayer(name, _StandIn(module, "weight", None), _looked_up(module)) if plain else None
    for kind, convolution in _TRANSPOSED.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            assert isinstance(module, _ConvTransposeNd)
            layer = _convolution(module, convolution)
            return None if layer is None else SeenLayer(name, layer, _swapped)
    return None


def _swapped(given: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    return back, given


def _looked_up(module: nn.Embedding) -> Sides:
    """Return the sides of a Linear layer with the weight of an embedding, (words, width)."""

    def sides(given: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        words = back.new_zeros(*given.shape, module.num_embeddings).scatter_(-1, given.long().unsqueeze(-1), 1)
        if module.padding_idx is not None:
            words[..., module.padding_idx] = 0  # torch gives it no gradient
        return back, words

    return sides


def _convolution(module: _ConvTransposeNd, kind: type[nn.Module]) -> nn.Module | None:
    """Return the convolution whose gradient with respect to its inputs a transposed one computes."""
    if any(more >= step for more, step in zip(module.output_padding, module.stride, strict=True)):
        return None  # the convolution would have more places than the inputs
    return kind(
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


def _told_apart(module: nn.Module) -> tuple[dict[str, nn.Module], Callable[..., Any] | None]:
    """Return Linear layers for the weights of a module that computes several products, and the ``forward`` by them."""
    if "forward" in vars(module):  # not its class's own
        return {}, None
    for kind, make in _SEVERAL.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            linears: dict[str, nn.Module] = {
                name: _StandIn(module, name, _bias_of(module, name)) for name in _products(module)
            }
            return linears, make(module, linears)
    return {}, None


def _products(module: nn.Module) -> list[str]:
    """Return the weights of the products of a recurrent layer or of attention, output layers apart."""
    own = dict(module.named_parameters(recurse=False))
    return [name for name, parameter in own.items() if parameter.ndim == 2]


def _bias_of(module: nn.Module, weight: str) -> str | None:
    """Return the name of the bias that goes with a weight."""
    name = weight.replace("weight", "bias")
    return name if getattr(module, name, None) is not None else None
