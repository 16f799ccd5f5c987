"""Weights read from files without running code, and written into a model: all of them, or none.

Place in the pipeline: before it, where a network gets its weights; after it, where a pruned one is read again.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from swap_prune.checks import first_line, some_of, user_path
from swap_prune.network.aliasing import is_expanded
from swap_prune.network.device import check_network
from swap_prune.network.names import renamed
from swap_prune.process_memory import is_out_of_memory, pass_on_shortage
from swap_prune.surgery.snapshot import restored_on_error

__all__ = ["check_not_meta", "load_state", "load_weights", "read_weights"]

_Model = TypeVar("_Model", bound=nn.Module)


def load_weights(model: _Model, path: str | Path) -> _Model:
    """Load a checkpoint into a model, in place.

    Args:
        model: Its state_dict must have the file's keys and shapes. BatchNorm's ``num_batches_tracked`` may be
            missing, and what DataParallel and torch.compile write before every name is dropped.
        path: ``.safetensors``, or ``.pt``, ``.pth`` or ``.bin`` holding tensors only.

    Raises:
        ValueError: If the file is missing, damaged, would run code, or does not fit.
    """
    check_network(model)
    load_state(model, renamed(read_weights(path), model.state_dict().keys()), Path(path))
    return model


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors without executing code.

    A training checkpoint that holds the weights under ``state_dict`` or ``model`` is unwrapped.

    Raises:
        ValueError: If the file is missing, damaged, or holds anything but tensors.
        MemoryError: If there is no memory for what it says that it holds.
    """
    path = user_path(path)
    if not path.is_file():
        raise ValueError(f"weights file {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        elif path.suffix in (".pt", ".pth", ".bin"):
            with warnings.catch_warnings(action="ignore"):  # of pickle protocols; what matters is raised
                state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ValueError(
                f"weights file {path} must end in .safetensors, .pt, .pth or .bin, got {path.suffix or 'no suffix'!r}"
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights file {path} is damaged, or a pickle that holds more than tensors, and was not loaded, since that "
            "could run code; save its state_dict as .safetensors"
        ) from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file raises whatever it leads torch to
        reason = first_line(error)
        if is_out_of_memory(error):
            raise MemoryError(f"there was no memory for weights file {path}, or it is damaged: {reason}") from error
        raise ValueError(f"weights file {path} is damaged or not a checkpoint: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    _check_state(path, state)
    return dict(state)


def _check_state(path: Path, state: Any) -> None:
    """Refuse what is not a mapping of names to tensors that parameters can be copied from."""
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights file {path} must hold a state_dict of tensors, got {_contents(state)}")
    odd = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise ValueError(
            f"weights file {path} must hold dense tensors, and {odd[0]!r} is {_kind_of(state[odd[0]])}; save it "
            "as a dense float tensor"
        )
    if not all(isinstance(name, str) for name in state):
        raise ValueError(f"weights file {path} must hold a state_dict of tensors by name; its keys are no names")


def _contents(state: Any) -> str:
    """Say what a file holds in place of a state_dict."""
    if not isinstance(state, Mapping) or not state:
        return f"an empty {type(state).__name__}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
    return f"keys {some_of(map(str, state))}; under 'state_dict' or 'model' it would be found"


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can be copied to a parameter as it is."""
    dense = tensor.layout is torch.strided and not tensor.is_nested
    return dense and not (tensor.is_meta or tensor.is_quantized)


def _kind_of(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
    return f"{tensor.dtype}".removeprefix("torch.")


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors into a model, in place.

    Args:
        model: The model.
        state: Tensors by the names of its state_dict.
        path: The file that they are of, for messages.

    Raises:
        ValueError: If they do not fit. The model is then as it was.
    """
    own = model.state_dict()
    check_not_meta(own)
    _check_names_and_shapes(own, state, model, path)
    _check_kinds(own, state, model, path)
    _check_values_fit(own, state, path)
    writable = _without_expanded(own, state, f"{type(model).__name__}, and {path}")
    with restored_on_error(model) if _has_own_loading(model) else nullcontext():
        try:
            model.load_state_dict(writable, strict=False)
        except Exception as error:  # whatever a hook does
            pass_on_shortage(error)
            raise ValueError(f"{type(model).__name__} did not take {path}: {first_line(error, typed=True)}") from error


def check_not_meta(own: Mapping[str, Any]) -> None:
    """Check that tensors of a state_dict hold values.

    Raises:
        ValueError: If one lies on the meta device.
    """
    if any(tensor.is_meta for tensor in own.values() if isinstance(tensor, Tensor)):
        raise ValueError(
            "the model lies on the meta device, which holds no values: call model.to_empty(device='cpu'), and load its "
            "weights"
        )


def _check_names_and_shapes(own: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        parts = [f"lacks {some_of(map(repr, missing))}"] * bool(missing)
        parts += [f"has {some_of(map(repr, unexpected))}"] * bool(unexpected)
        raise ValueError(f"the keys of {path} do not match {type(model).__name__}: it {' and '.join(parts)}")
    wrong = [name for name in state if state[name].shape != own[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the shapes of {path} do not match {type(model).__name__}: {name!r} is {tuple(state[name].shape)} "
            f"in the file and {tuple(own[name].shape)} in the model ({len(wrong)} differ)"
        )


def _check_kinds(own: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Check that real numbers are given for real ones, and that the model's can be written to."""
    trained = {name for name, _ in model.named_parameters()}
    whole = [n for n in state if n in trained and own[n].is_floating_point() and not _is_inexact(state[n])]
    if whole:
        raise ValueError(
            f"{whole[0]!r} is {_kind_of(state[whole[0]])} in {path}, and a real number in {type(model).__name__}: the "
            "weights were quantised, or are those of another network; save them as floating-point numbers"
        )
    imaginary = [name for name in state if state[name].is_complex() and not own[name].is_complex()]
    if imaginary:
        raise ValueError(
            f"{imaginary[0]!r} is {_kind_of(state[imaginary[0]])} in {path}, and real in {type(model).__name__}: its "
            "imaginary part would be lost"
        )
    fixed = [n for n in state if isinstance(own[n], Tensor) and own[n].is_inference()]
    if fixed and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{fixed[0]!r} of {type(model).__name__} was made under torch.inference_mode, and cannot be written to: "
            "make the model outside, or load under it"
        )


def _check_values_fit(own: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    """Check that numbers stay finite in the model's types, and that tensors of two names are one in both.

    Raises:
        ValueError: If not.
    """
    at: dict[tuple[Any, ...], str] = {}
    for name, values in state.items():
        place = own[name]
        if not isinstance(place, Tensor) or place.layout is not torch.strided or place.is_quantized:
            continue
        if _overflows(values, place):
            raise ValueError(
                f"{name!r} in {path} has numbers that {place.dtype} cannot hold: load it into a model of {values.dtype}"
            )
        if place.numel() == 0 or place.data_ptr() == 0:  # as of subclasses that wrap other tensors
            continue
        first = at.setdefault((place.device, place.data_ptr(), place.shape, place.stride()), name)
        if first != name and not _are_equal(state[first], values):
            raise ValueError(
                f"{first!r} and {name!r} are one tensor in the model, and have other values in {path}: give them "
                "memory of their own, as in the network that was saved"
            )


def _overflows(values: Tensor, place: Tensor) -> bool:
    """Whether finite numbers become infinite where they are written, and are not infinite there already."""
    if not (values.is_floating_point() and place.is_floating_point()) or values.dtype == place.dtype:
        return False
    written = values.to(place.dtype)
    lost = written.isinf() if written.dtype.itemsize > 1 else torch.zeros_like(written, dtype=torch.bool)
    if not bool(lost.any()):
        return False
    return bool((values[lost].isfinite() & (place.detach().cpu()[lost] != written[lost])).any())


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, of which some may be none."""
    if first.is_floating_point() and second.is_floating_point():
        first, second = first.double(), second.double()
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _has_own_loading(model: nn.Module) -> bool:
    """Whether some module may fail to take what fits: it has hooks, or a way of its own to load."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not type(module)._load_from_state_dict.__module__.startswith("torch.")
        or "load_state_dict" in vars(type(module))
        for module in model.modules()
    )


def _without_expanded(own: Mapping[str, Any], state: Mapping[str, Tensor], both: str) -> dict[str, Tensor]:
    """Leave out what would be written to a tensor that holds a number many times, where it has these values.

    Raises:
        ValueError: If it has others.
    """
    expanded = [n for n in state if isinstance(own[n], Tensor) and is_expanded(own[n])]
    for name in expanded:
        if not torch.equal(own[name].cpu(), state[name].to(own[name].dtype)):
            raise ValueError(
                f"{name!r} is an expanded tensor, which cannot be written to, in {both} holds other values: give it "
                "memory of its own by contiguous()"
            )
    return {name: tensor for name, tensor in state.items() if name not in expanded}


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
