"""How images lie in memory: channel after channel, as they come, or pixel after pixel ("channels last").

Convolutions on CPUs work on the second up to three times as fast, and hand it on from layer to layer. The figures are
the same but for rounding. So a network gets its images that way for the time of a run, if it takes them: one that calls
``view`` where ``reshape`` is needed does not. Whatever is outside the network, such as a loss, sees no difference.

Place in the pipeline: around all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swap_prune.network.modes import eval_mode, no_autocast
from swap_prune.randomness import global_states_kept
from swap_prune.samples.batches import map_tensors

__all__ = ["images_laid_out", "takes_channels_last"]

_CHANNEL_BLOCK = 16  # of oneDNN's 1 x 1 convolutions on AVX-512; 8 on AVX2
_SHARED_DIGITS = 3e-3  # relative: what losses in both layouts may differ by


def takes_channels_last(
    model: nn.Module, function: Callable[[nn.Module, Any], Tensor], sample: Any, backwards: bool = True
) -> bool:
    """Whether a network that convolves images on the CPU works on channels last to the same effect.

    Args:
        model: The network. A copy of it is tried.
        function: What it is asked: its losses, or its outputs.
        sample: A batch of one sample on its device; None: there is none to try, and the answer is no.
        backwards: Whether gradients will be asked for.
    """
    images: list[Tensor] = []
    map_tensors(lambda t: images.append(t) if _is_image(t) else None, sample)
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if not (images and convolves) or any(image.device.type != "cpu" for image in images):
        return False
    if backwards and any(map(_overruns, model.modules())):
        return False
    two = map_tensors(lambda t: t.repeat(2, *[1] * (t.ndim - 1)) if t.ndim else t.clone(), sample)
    try:
        with torch.inference_mode(False), eval_mode(model):
            usual, other = (_answer(copy.deepcopy(model), function, two, laid, backwards) for laid in (False, True))
    except Exception:  # it may refuse in many ways, or have no room for a copy; bad data are told where they are used
        return False
    return torch.allclose(usual, other, rtol=_SHARED_DIGITS, atol=_SHARED_DIGITS)


@contextmanager
def images_laid_out(model: nn.Module, laid: bool = True) -> Iterator[None]:
    """Run a block in which a network sees its images channels last, and its outputs come out as they would else.

    Args:
        model: The network; it has two hooks more for the time of the block.
        laid: False: do nothing.
    """
    if not laid:
        yield
        return

    def before(_module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        arranged = tuple(_arranged(part, torch.channels_last) for part in arguments)
        return arranged, {name: _arranged(part, torch.channels_last) for name, part in named.items()}

    def after(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        return _arranged(output, torch.contiguous_format)

    hooks: list[RemovableHandle] = []
    try:
        hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(model.register_forward_hook(after))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _overruns(module: nn.Module) -> bool:
    """Whether the gradient of a layer's weight writes past its memory on channels last (oneDNN, issue 6035)."""
    if not isinstance(module, nn.Conv2d):
        return False
    strided = set(module.kernel_size) == {1} and max(module.stride) > 1
    return strided and module.in_channels // module.groups < _CHANNEL_BLOCK


def _arranged(value: Any, layout: torch.memory_format) -> Any:
    """Return what a network takes or gives with its images in a layout; what is in containers of others is left."""
    if type(value) in (tuple, list):
        return type(value)(_arranged(part, layout) for part in value)
    if type(value) is dict:
        return {key: _arranged(part, layout) for key, part in value.items()}
    if not (isinstance(value, Tensor) and _is_image(value)):
        return value
    try:
        return value.contiguous(memory_format=layout)
    except RuntimeError:  # vmap knows no layouts
        return value


def _is_image(tensor: Tensor) -> bool:
    """Whether a tensor may be images (n, channels, height, width), in a precision that has fast convolutions."""
    return tensor.ndim == 4 and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _answer(
    model: nn.Module, function: Callable[[nn.Module, Any], Tensor], batch: Any, laid: bool, backwards: bool
) -> Tensor:
    """Run a batch through a copy of the network.

    Raises:
        RuntimeError: If the function calls another network, or a part of this one: its images would not be laid out.
    """
    called: list[bool] = []
    model.register_forward_pre_hook(lambda *_: called.append(True))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with (
        torch.set_grad_enabled(backwards),
        no_autocast(torch.device("cpu")),
        global_states_kept(),
        images_laid_out(model, laid),
    ):
        values = function(model, map_tensors(torch.clone, batch))
        if backwards and weights:
            torch.autograd.grad(values.sum(), weights, allow_unused=True)
    if not called:
        raise RuntimeError("the network was not called")
    return values.detach()
