"""Tensors that are not numbers of their own: expanded ones, views of the same memory, what others are computed from."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["check_apart", "computed_tensors", "is_expanded", "unexpanded"]


def check_apart(chosen: Mapping[str, nn.Parameter], others: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are views of the same memory as another: a zero in one would be a zero in the other.

    Args:
        chosen: The parameters that will change.
        others: Other parameters and buffers, that will not.

    Raises:
        ValueError: If one overlaps with another, or with itself.
    """
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in (*chosen.items(), *others.items()):
        address = _address(tensor)
        if address:
            groups.setdefault(address, []).append((name, tensor.detach()))
    for name, parameter in chosen.items():
        if is_expanded(parameter.detach()):
            raise ValueError(
                f"parameter {name!r} was expanded, and holds a number in several places at once: make it "
                f"torch.nn.Parameter(value.clone()), or leave it out by ignore=[{name!r}]"
            )
    order = {name: number for number, name in enumerate(chosen)}
    for group in groups.values():
        if pair := next(_overlapping(group, chosen), None):
            name, other_name = sorted(pair, key=lambda name: order.get(name, len(order)))
            raise ValueError(
                f"{name!r} and {other_name!r} share memory: tie parameters by assigning the parameter itself, make "
                f"one of them a clone, or leave {name!r} out by ignore=[{name!r}]"
            )


def _overlapping(group: Sequence[tuple[str, Tensor]], chosen: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of views of one storage that have an element in common, one of them among those chosen."""
    before: list[tuple[str, Tensor]] = []
    for name, view in sorted(group, key=lambda named: named[1].storage_offset()):
        before = [(other, one) for other, one in before if _end(one) > view.storage_offset()]
        for other, one in before:
            if (name in chosen or other in chosen) and _overlap(one, view):
                yield other, name
        before.append((name, view))


def _end(view: Tensor) -> int:
    """Return the place in its storage behind a view's last element."""
    reach = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    return int(view.storage_offset() + reach + 1)


def _address(tensor: Tensor) -> int:
    """Return where a tensor's storage lies; 0 where it has none that can be told."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper around others
        return 0


def is_expanded(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers in several places at once."""
    return tensor.layout is torch.strided and any(
        step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def unexpanded(tensor: Tensor) -> Tensor:
    """Return a view of a tensor that holds each of its numbers once, so that they can be written."""
    if tensor.layout != torch.strided:
        return tensor.detach()
    for dimension, stride in enumerate(tensor.stride()):
        tensor = tensor.narrow(dimension, 0, 1) if stride == 0 and tensor.shape[dimension] > 1 else tensor
    return tensor.detach()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two views of one storage have an element in common."""
    starts, ends = [view.storage_offset() for view in (one, other)], [_end(view) for view in (one, other)]
    if starts[0] >= ends[1] or starts[1] >= ends[0]:
        return False
    seen = torch.zeros(max(ends) - min(starts), dtype=torch.bool, device="cpu")
    seen.as_strided(one.shape, one.stride(), starts[0] - min(starts)).fill_(True)
    return bool(seen.as_strided(other.shape, other.stride(), starts[1] - min(starts)).any())


def computed_tensors(module: nn.Module) -> dict[str, tuple[list[nn.Parameter], str]]:
    """Return the tensors of a module that are computed: what from, and how to end that."""
    found = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):  # the old way
            parts = [p for own, p in module.named_parameters(recurse=False) if own.startswith(f"{hook.name}_")]
            kind = "weight" if isinstance(hook, WeightNorm) else "spectral"
            found[hook.name] = (parts, f"torch.nn.utils.remove_{kind}_norm(module)")
        if isinstance(hook, BasePruningMethod):
            tensor = hook._tensor_name
            source = getattr(module, f"{tensor}_orig")
            found[tensor] = ([source], f"torch.nn.utils.prune.remove(module, {tensor!r})")
    if parametrize.is_parametrized(module):
        for tensor, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r})"
            found[tensor] = (list(chain.parameters()), remedy)
    return found
