"""How images lie in memory: channel after channel, as they come, or pixel after pixel ("channels last").

Convolutions on CPUs work on the second up to three times as fast, and whatever follows keeps the layout of its input.
The figures are the same but for rounding. A network that cannot take it, as one that calls ``view`` where ``reshape``
is needed, gets images as they come.

Place in the pipeline: samples are laid out when they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.batches import map_tensors
from swap_prune.modes import eval_mode

__all__ = ["lay_out", "suited_layout"]

_HALF_OF_THE_DIGITS = 3e-3  # that losses in both layouts have to share


def suited_layout(model: nn.Module, function: Callable[[nn.Module, Any], Tensor], sample: Any) -> torch.memory_format:
    """Return the layout in which a network should be given its images.

    Args:
        model: The network; nothing of it changes.
        function: What it is asked: its losses, or its outputs.
        sample: A batch of one sample on its device, to try channels last with; None: there is none.

    Returns:
        ``torch.channels_last`` if the network convolves images on the CPU and does so, forwards and backwards, to the
        same effect; else ``torch.preserve_format``.
    """
    as_they_come = torch.preserve_format
    images: list[Tensor] = []
    map_tensors(lambda t: images.append(t) if _is_image(t) else None, sample)
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if not (images and convolves) or any(image.device.type != "cpu" for image in images):
        return as_they_come
    layouts = (torch.contiguous_format, torch.channels_last)
    try:
        usual, other = (_answer(model, function, lay_out(sample, layout)) for layout in layouts)
    except Exception:  # a network may refuse in many ways; what is wrong with the data is said where it is used
        return as_they_come
    alike = torch.allclose(usual, other, rtol=_HALF_OF_THE_DIGITS, atol=_HALF_OF_THE_DIGITS)
    return torch.channels_last if alike else as_they_come


def lay_out(batch: Any, layout: torch.memory_format) -> Any:
    """Return a batch with its images in a layout."""
    return map_tensors(lambda t: t.contiguous(memory_format=layout) if _is_image(t) else t, batch)


def _is_image(tensor: Tensor) -> bool:
    """Whether a tensor may be images (n, channels, height, width), in a precision that has fast convolutions."""
    return tensor.ndim == 4 and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _answer(model: nn.Module, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
    """Run a batch forwards and backwards in eval mode, whatever is set around."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        eval_mode(model),
    ):
        values = function(model, map_tensors(lambda t: t.clone() if t.is_inference() else t, batch))
        if weights:
            torch.autograd.grad(values.sum(), weights, allow_unused=True)
    return values.detach()
