"""Which layers have gradients of rank 1, for each sample: Linear layers that see one vector a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.capture.bound import Bound
from swap_prune.fisher.defence.rank import CLEAN, energies
from swap_prune.losses import LossFn
from swap_prune.network.calls import layer_input
from swap_prune.network.modes import eval_mode
from swap_prune.process_memory import pass_on_shortage
from swap_prune.samples.batches import batch_size, in_own_containers, is_single, split_batches
from swap_prune.selection import Selection

__all__ = ["outer_product_layers"]

_APART = 8  # samples whose gradients are taken to look at


def outer_product_layers(model: nn.Module, selection: Selection, loss_fn: LossFn, batch: Any) -> tuple[str, ...]:
    """Return the selected weights of Linear layers that see one vector a sample, once, and are used nowhere else.

    Args:
        model: The network.
        selection: The selected weights.
        loss_fn: Used to run the network.
        batch: A batch to run it on.
    """
    weights = dict(model.named_parameters())
    names = {id(weights[name]): name for name in selection.names}
    users: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                users.setdefault(names[id(parameter)], []).append(module)
    single = {name: used[0] for name, used in users.items() if len(used) == 1 and _is_plain(used[0], weights[name])}
    calls: dict[str, list[bool]] = {name: [] for name in single}
    size = batch_size(batch)

    def watch(name: str) -> Any:
        def see(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            shape = layer_input(inputs, named).shape
            calls[name].append(len(shape) == 2 and shape[0] == size)  # more vectors than samples are tokens

        return see

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in single.items()]
    try:
        with eval_mode(model), torch.no_grad():
            loss_fn(model, in_own_containers(batch))
    finally:
        for handle in handles:
            handle.remove()
    return _without_other_uses(model, selection, loss_fn, batch, [n for n, seen in calls.items() if seen == [True]])


def _without_other_uses(
    model: nn.Module, selection: Selection, loss_fn: LossFn, batch: Any, names: Sequence[str]
) -> tuple[str, ...]:
    """Return the weights whose gradients of a few samples, each alone, have rank 1, or are others each time.

    A weight may be used outside its layer too, as in a penalty or a decoder that shares it. Its gradients are then of
    higher rank, and the same each time. Those that a user's own noise is in are not.
    """
    exact, weights = dict.fromkeys(names), selection.read(model)
    for sample in filter(is_single, split_batches([batch], 1)[:_APART] if exact else []):
        both = [_gradients_apart(model, selection, loss_fn, sample, weights) for _ in range(2)]  # the same each time?
        if not all(both):
            break  # a network that takes no sample alone
        for name in list(exact):
            one, other = (gradients[name] for gradients in both)
            if one is None or other is None or one.ndim != 2 or not torch.equal(one, other):
                continue
            energy, rest = energies(one.to(weights).unsqueeze(0)) if min(one.shape) > 1 else (0.0, 0.0)
            if rest > (CLEAN + torch.finfo(one.dtype).eps ** 2) * energy:  # entries are rounded
                del exact[name]
    return tuple(exact)


def _gradients_apart(
    model: nn.Module, selection: Selection, loss_fn: LossFn, sample: Any, weights: Tensor
) -> dict[str, Tensor | None]:
    """Return the gradients of one sample's loss, by name; none where it cannot be run alone."""
    try:
        with eval_mode(model), torch.enable_grad():
            losses, leaves = Bound(model, loss_fn).with_leaves(selection, sample, weights)
            found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    except Exception as error:  # rows may be those of mini-batches, which do not need that it can
        pass_on_shortage(error)
        return {}
    return dict(zip(selection.names, found, strict=True))


def _is_plain(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the very weight that a Linear layer multiplies with; hooks may make another from it."""
    plain = type(module) is nn.Linear and not module._forward_pre_hooks
    return plain and module.weight is parameter
