"""Training and eval mode, set for a while and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_statistics", "eval_mode", "slow_attention", "training_mode"]


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block with the whole model in eval mode, then give each module its own mode back."""
    return _mode(model, training=False)


def training_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block with the whole model in training mode, then give each module its own mode back."""
    return _mode(model, training=True)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode, but with BatchNorm on each batch's own statistics; its running ones do not change."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    with eval_mode(model):
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        try:
            yield
        finally:
            for layer, tracked in zip(layers, tracking, strict=True):
                layer.track_running_stats = tracked


@contextmanager
def slow_attention() -> Iterator[None]:
    """Run a block in which torch's transformer layers call the layers that they are made of, also in eval mode.

    Their fast path goes round these, or gives them nested tensors, where nothing can be seen by hooks.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
