"""Where to compute: a device by its name, tried before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from swap_prune.checks import first_line

__all__ = ["check_module", "check_network", "check_values", "moved", "usable_device"]


def usable_device(name: str | torch.device) -> torch.device:
    """Return a device that can be used.

    Raises:
        ValueError: If it cannot.
    """
    try:
        device = torch.empty(1, device=torch.device(name)).device  # "cuda" is "cuda:0" from here on
    except (NotImplementedError, ImportError) as error:  # which list all that PyTorch could have
        raise ValueError(f"device {str(name)!r} cannot be used: this PyTorch has no code for it; use cpu") from error
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ValueError(f"device {str(name)!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: it holds no values; use cpu or cuda")
    return device


@contextmanager
def moved(model: nn.Module | None, device: torch.device | None) -> Iterator[None]:
    """Run a block with a model on a device, where it stays; if the block does not end well it goes back.

    Args:
        model: The model, or None.
        device: The device; None leaves it where it is.
    """
    first = None if model is None or device is None else next(model.parameters(), None)
    if model is None or first is None:
        yield
        return
    own = first.device
    try:
        model.to(device)
        yield
    except BaseException:
        model.to(own)
        raise


def check_module(model: nn.Module) -> None:
    """Refuse what is no module.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got a {type(model).__name__}")


def check_network(model: nn.Module) -> None:
    """Refuse what is no network, or one whose tensors have no shape yet.

    Raises:
        ValueError: If it is.
    """
    check_module(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"parameter {name!r} is not initialised: run the model once on a batch first")


def check_values(model: nn.Module, name: str = "model") -> None:
    """Refuse a model whose parameters or buffers hold no values; it is called by a name in the message.

    Raises:
        ValueError: If one lies on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"the {name} lies on the meta device, which holds no values: load its weights first, none of them offloaded"
        )
