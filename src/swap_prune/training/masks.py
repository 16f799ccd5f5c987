"""Masks that hold while someone trains: pruned weights stay exactly zero through any optimiser.

With a mask m of zeros and ones, the optimiser is made to see ``f(m * w)``: the gradient is ``m * grad f``, and so is
whatever it remembers (momentum, second moments). After every step w becomes ``m * w``, since an optimiser may also move
weights whose gradient and memory are zero. Nothing builds up behind a mask.

Place in the pipeline: used by fine-tuning, and by anybody's own training loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from swap_prune.checks import some_of
from swap_prune.network.device import check_network, check_values
from swap_prune.network.names import renamed
from swap_prune.selection import DEFAULT_TARGETS, select_parameters, unnamed_zeros

__all__ = ["MaskKeeper", "keep_masks", "masks_of", "note_pruned", "pair_masks", "resolve_masks"]

_LIVE: WeakSet[MaskKeeper] = WeakSet()


def note_pruned(model: nn.Module, names: Iterable[str]) -> None:
    """Tell those who keep masks of a network that it was pruned again, or has the weights of a pruned one.

    Args:
        model: The network, as it is now.
        names: Of the parameters that have zeros.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pruned = {id(parameters[name]) for name in names if name in parameters}
    for keeper in list(_LIVE):
        keeper.note(pruned)


def masks_of(
    model: nn.Module, targets: Sequence[str] = DEFAULT_TARGETS, ignore: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Read the masks off a pruned network: what is zero counts as pruned.

    Args:
        model: The network.
        targets: What is looked at, as for ``prune``.
        ignore: What is not.

    Returns:
        Parameter name to its mask, boolean, of the parameter's shape: true where a weight is kept.

    Raises:
        ValueError: If a pattern matches nothing, nothing is left, or the network holds no values.
    """
    check_network(model)
    check_values(model)
    selection = select_parameters(model, targets, ignore)
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() != 0 for name in selection.names}


def keep_masks(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    masks: Mapping[str, Tensor] | None = None,
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    ignore: Sequence[str] = (),
) -> MaskKeeper:
    """Keep pruned weights exactly zero in a training loop, until the keeper is removed.

    Args:
        model: The pruned network.
        optimizer: Any optimiser of ``torch.optim`` or of its kind, or several of them. A wrapper that holds one as
            ``.optimizer`` counts as that one.
        masks: Parameter name to boolean mask of its shape, true where a weight is kept. By default what is zero now
            is pruned.
        targets: Without ``masks``: where zeros are looked for, as for ``prune``.
        ignore: The same, where they are not.

    Returns:
        The keeper: a context manager, and a handle with ``remove()``. Where ``prune`` or ``load_pruned`` takes more
        weights meanwhile, the next step ends in a ValueError: they would come back.

    Raises:
        ValueError: If a mask does not fit the network, there is no zero to keep, or no optimiser holds a weight that
            has a mask.
    """
    optimizers = [_unwrap(part) for part in (optimizer if isinstance(optimizer, Sequence) else [optimizer])]
    pairs = pair_masks(model, resolve_masks(model, masks, targets, ignore))
    held = {id(parameter) for part in optimizers for group in part.param_groups for parameter in group["params"]}
    if any(parameter.requires_grad for parameter, _ in pairs) and not any(id(one) in held for one, _ in pairs):
        raise ValueError(
            f"the optimizer holds none of the {len(pairs)} masked parameters of {type(model).__name__}: make it from "
            "model.parameters() of this model, or pass the model that it was made for"
        )
    return MaskKeeper(pairs, optimizers)


def resolve_masks(
    model: nn.Module, masks: Mapping[str, Tensor] | None, targets: Sequence[str], ignore: Sequence[str]
) -> Mapping[str, Tensor]:
    """Return the masks given, or those of the network's zeros, of which there must be one.

    Raises:
        ValueError: If there is no zero, or what is given is no mapping.
    """
    if masks is not None:
        if not isinstance(masks, Mapping):
            raise ValueError(
                f"masks must map names of parameters to boolean tensors, got a {type(masks).__name__}; leave it out to "
                "keep what is zero"
            )
        return masks
    found = masks_of(model, targets, ignore)
    parameters = dict(model.named_parameters())
    empty = [name for name, mask in found.items() if parameters[name].requires_grad and not bool(mask.any())]
    if empty:
        warnings.warn(
            f"zero throughout, and kept so, as what pruning has emptied: {some_of(empty)}; new layers that begin at "
            "zero, such as those of LoRA, are trained if ignore= names them",
            stacklevel=3,
        )
    if all(bool(mask.all()) for mask in found.values()):
        raise ValueError(
            f"no selected weight of {type(model).__name__} is zero, so there is no mask to keep: prune it first, or "
            "pass masks="
        )
    others = unnamed_zeros(model, found, ignore)
    if others:
        raise ValueError(
            f"{', '.join(others[:3])} hold zeros too, and targets does not name them, so that they would be lost: pass "
            "the targets= that the network was pruned with, or masks=, or leave them out by ignore="
        )
    return found


def pair_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each masked parameter with its mask; names may be those of a wrapped or compiled network.

    Raises:
        ValueError: If a mask has no parameter, or is not boolean and of its shape.
    """
    parameters = dict(model.named_parameters())
    masks = renamed(masks, parameters.keys()) if all(isinstance(name, str) for name in masks) else masks
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"masks names {name!r}, which is no parameter of {type(model).__name__}")
        shape = tuple(parameters[name].shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"the mask of {name!r} must be boolean of shape {shape}, got {got}")
    return [(parameters[name], mask) for name, mask in masks.items()]


def _unwrap(optimizer: Any) -> Optimizer:
    """Return the optimiser inside a wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    return optimizer


class MaskKeeper:
    """Hooks on optimisers that keep masks; :func:`keep_masks` makes it.

    Args:
        pairs: Parameters and their masks, true where a weight is kept.
        optimizers: The optimisers. What they remember of pruned weights is cleared.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Parameter, Tensor]], optimizers: Sequence[Optimizer]) -> None:
        self._pruned = [(parameter, ~mask.to(parameter.device)) for parameter, mask in pairs]
        self._hooks: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            self._clear_gradients()
            self._after_step(optimizer)
        self._is_old, self._steps = False, {id(optimizer) for optimizer in optimizers}
        for keeper in list(_LIVE):
            keeper.make_way(self._steps)
        _LIVE.add(self)
        for number, (parameter, _) in enumerate(self._pruned):
            if parameter.is_leaf and (parameter.is_floating_point() or parameter.is_complex()):
                trained, clear = parameter.requires_grad, partial(self._clear_gradient, number)
                parameter.requires_grad_(True)  # a frozen one takes no hook, and may be trained later
                try:
                    hook = parameter.register_post_accumulate_grad_hook(clear)  # type: ignore[no-untyped-call]
                    self._hooks.append(hook)
                finally:
                    parameter.requires_grad_(trained)

    def remove(self) -> None:
        """Take the hooks off; the weights stay as they are."""
        _LIVE.discard(self)
        for hook in self._hooks:
            hook.remove()

    def note(self, pruned: Container[int]) -> None:
        """Look whether weights that these masks keep are zero now in parameters that were pruned, by their ids."""
        self._is_old |= any(
            id(parameter) in pruned and bool(((parameter.detach() == 0) & ~gone).any())
            for parameter, gone in self._on_device()
        )

    def make_way(self, steps: Collection[int]) -> None:
        """Leave zeros to newer masks, which are kept at the steps of optimisers with these ids."""
        self._is_old &= not self._steps <= set(steps)

    def __enter__(self) -> MaskKeeper:
        """Return itself: the masks are kept already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        self.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Clear the gradients of pruned weights, also those that a closure is going to make.

        Raises:
            ValueError: If the network was pruned since.
        """
        if self._is_old:
            raise ValueError(
                "the network was pruned again, or a pruned one was loaded, since keep_masks was called, whose masks "
                "would let those weights come back: call remove() on what it returned, or end() of a callback, and "
                "then keep_masks anew"
            )
        self._clear_gradients()
        args = tuple(self._masked(part) if callable(part) and part is not optimizer else part for part in args)
        return args, {name: self._masked(part) if callable(part) else part for name, part in kwargs.items()}

    def _masked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            self._clear_weights()
            value = closure()
            self._clear_gradients()
            return value

        return evaluate

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Clear pruned weights, and what the optimiser remembers of them."""
        self._clear_weights()
        for parameter, pruned in self._on_device():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.layout == torch.strided and value.shape == pruned.shape != ():
                    value.masked_fill_(pruned.to(value.device), 0)

    def _clear_weights(self) -> None:
        with torch.no_grad():
            for parameter, pruned in self._on_device():
                parameter.masked_fill_(pruned, 0)

    def _clear_gradients(self) -> None:
        for number, (parameter, _) in enumerate(self._pruned):
            self._clear_gradient(number, parameter)

    def _clear_gradient(self, number: int, parameter: Tensor) -> None:
        """Clear a gradient as soon as it is there: who clips gradients by their norm does so before the step."""
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            parameter.grad.detach().masked_fill_(self._pruned[number][1].to(parameter.grad.device), 0)

    def _on_device(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters with what is pruned of them, wherever the network was moved."""
        self._pruned = [(parameter, pruned.to(parameter.device)) for parameter, pruned in self._pruned]
        return self._pruned
