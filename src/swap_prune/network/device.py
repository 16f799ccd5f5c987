"""Where to compute: a device by its name, tried before any work."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["check_values", "usable_device"]


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
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: it holds no values; use cpu or cuda")
    return device


def check_values(model: nn.Module) -> None:
    """Refuse a model whose parameters or buffers hold no values.

    Raises:
        ValueError: If one lies on the meta device.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model lies on the meta device, which holds no values: load its weights first")
