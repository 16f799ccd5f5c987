"""Training and eval mode, and how kernels compute: set for a while and given back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "batch_statistics",
    "check_no_inference",
    "eval_mode",
    "exact_kernels",
    "is_frozen",
    "isolated",
    "no_autocast",
    "slow_attention",
    "training_mode",
    "uncompiled",
]


def check_no_inference(model: nn.Module) -> None:
    """Refuse a model whose tensors allow neither gradients nor changes.

    Raises:
        ValueError: If it was made under ``torch.inference_mode``.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model was made under torch.inference_mode, and cannot be changed: make it outside")


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block with the whole model in eval mode, then give each module its own mode back."""
    return _mode(model, training=False)


def training_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block in training mode, but for frozen BatchNorm, then give each module its own mode back."""
    return _mode(model, training=True)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    dropouts = [] if training else [(module, module.dropout) for module in modules if _is_on_cudnn(module)]
    undo = ExitStack()
    try:  # an interruption may come at any line
        model.train(training)
        for module in filter(is_frozen, modules):
            module.training = False
        for layer in [] if training else filter(_is_batchnorm, modules):
            undo.callback(layer.register_forward_hook(_straighten).remove)
        for recurrent, _ in dropouts:
            recurrent.training, recurrent.dropout = True, 0.0  # cuDNN goes back through them in training mode alone
        yield
    finally:
        undo.close()
        for recurrent, dropout in dropouts:
            recurrent.dropout = dropout
        for module, before in modes:
            if module.training != before:
                module.training = before


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)


def _straighten(_layer: nn.Module, _inputs: Any, output: Any) -> None:
    """Have the gradient of one sample come back to BatchNorm with strides of its own shape.

    With others, which one sample may have, torch goes back wrongly through BatchNorm in eval mode on a CPU (2.13).
    """
    if isinstance(output, Tensor) and output.requires_grad and output.device.type == "cpu" and output.shape[:1] == (1,):
        output.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]


def is_frozen(module: nn.Module) -> bool:
    """Whether a BatchNorm layer has statistics and does not track them: it works on those."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None and not module.track_running_stats


def _is_on_cudnn(module: nn.Module) -> TypeGuard[nn.RNNBase]:
    return isinstance(module, nn.RNNBase) and any(parameter.is_cuda for parameter in module.parameters())


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode, but with BatchNorm on each batch's own statistics; its running ones do not change.

    A layer that is frozen stays on those.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and not is_frozen(module)]
    tracking = [layer.track_running_stats for layer in layers]
    with eval_mode(model):
        try:
            for layer in layers:
                layer.training, layer.track_running_stats = True, False
            yield
        finally:
            for layer, tracked in zip(layers, tracking, strict=True):
                layer.track_running_stats = tracked


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Run a block as if the caller had set nothing: inference mode, autocast, TF32, a compiler, attention's fast path.

    Args:
        device: Where the block computes.
    """
    with torch.inference_mode(False), no_autocast(device), exact_kernels(device), slow_attention(), uncompiled():
        yield


@contextmanager
def slow_attention() -> Iterator[None]:
    """Run a block in which torch's transformer layers call the layers that they are made of, also in eval mode.

    Their fast path goes round these, or gives them nested tensors, where nothing can be seen by hooks.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def uncompiled() -> AbstractContextManager[Any]:
    """Run a block in which what ``torch.compile`` wraps runs as it was written.

    What was compiled before does not see hooks that come later. Where ``torch._dynamo`` was not imported nothing can be
    compiled, and the import, which takes longer than many a run, is spared. A network that asks for its first one in
    the block gets it.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Run a block without the caller's autocast; what runs in the block may have one of its own.

    A nested ``torch.autocast(enabled=False)`` would not do: torch keeps the weights that it has cast until the
    outermost one ends, and the network would go on with those of before.
    """
    enabled, depth = torch.is_autocast_enabled(device.type), torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_enabled(device.type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device.type, enabled)
        for _ in range(depth):
            torch.autocast_increment_nesting()


@contextmanager
def exact_kernels(device: torch.device) -> Iterator[None]:
    """Run a block in which CUDA computes in full float32, with cuDNN's kernels that give the same bits each time.

    Convolutions there round their inputs to TF32 by default, which leaves ten bits: gradients of single samples and of
    their batch then differ by more than a check can allow. What torch inherits from ``torch.backends.fp32_precision``
    is an own setting of convolutions and products afterwards.

    Args:
        device: Where the block computes; nothing is changed for one that is not CUDA's.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches: list[tuple[Any, str, Any]] = [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    switches += [(one, "allow_tf32", False) for one in (cudnn, matmul)]
    switches += [(matmul, "allow_fp16_accumulation", False)] if hasattr(matmul, "allow_fp16_accumulation") else []
    if hasattr(cudnn, "conv"):  # since torch 2.9: the newer switches go last, and both kinds have to agree
        switches += [(one, "fp32_precision", "ieee") for one in (cudnn.conv, cudnn.rnn, matmul)]
    before: list[tuple[Any, str, Any]] = []
    for one, name, _ in switches:
        with suppress(RuntimeError):  # torch does not read an older switch that the caller has overruled by a newer one
            before.append((one, name, getattr(one, name)))
    readable = {(id(one), name) for one, name, _ in before}
    try:
        for one, name, value in switches:
            if (id(one), name) in readable:
                setattr(one, name, value)
        yield
    finally:
        for one, name, value in before:
            setattr(one, name, value)
