"""Plain files: a pruned model on disk, verified when it is read, and checkpoints read without running code.

An artifact is a directory of two files: ``weights.safetensors``, the whole state_dict under its original keys,
and ``report.json``, the pruning report with the SHA-256 of the weights. It is written under a temporary name
and renamed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from swap_prune.checks import first_line, some_of, user_path
from swap_prune.files import check_output_directory, write_directory
from swap_prune.network.device import check_network, check_values
from swap_prune.network.layout import unexpanded
from swap_prune.network.modes import check_no_inference
from swap_prune.network.names import renamed
from swap_prune.process_memory import pass_on_shortage
from swap_prune.report import LayerReport, PruningReport
from swap_prune.surgery.snapshot import restored_on_error

__all__ = [
    "check_dense",
    "count_layers",
    "load_pruned",
    "load_report",
    "load_weights",
    "read_weights",
    "save_artifact",
    "weights_sha256",
]

_WEIGHTS, _REPORT = "weights.safetensors", "report.json"


def save_artifact(model: nn.Module, report: PruningReport, directory: str | Path) -> Path:
    """Write a pruned model and its report; see :meth:`PruningReport.save`."""
    target = check_output_directory(directory)
    check_network(model)
    check_values(model)
    parameters = dict(model.named_parameters())
    missing = report.layers.keys() - parameters.keys()
    if missing:
        wrapped = renamed(report.layers, parameters).keys() <= parameters.keys()
        raise ValueError(
            f"the model lacks parameters that the report is of: {_some(sorted(missing))}"
            + "; save the network inside the wrapper (its module, or _orig_mod)" * wrapped
        )
    if count_layers(model, tuple(report.layers)) != report.layers:
        raise ValueError(
            "the model does not have the sparsity reported (it was changed after pruning); save right after pruning, "
            "prune again, or train under swap_prune.keep_masks"
        )
    check_dense(model, "which is not saved")
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    other = [name for name, layer in report.layers.items() if name not in state or _counted(state[name]) != layer]
    if other:
        raise ValueError(
            f"state_dict of {type(model).__name__}, which is what is saved, leaves out or changes the pruned weights "
            f"{_some(other)}: take off the hooks that do so"
        )
    try:
        data = safetensors.torch.save(state)
    except (KeyError, SafetensorError) as error:
        kinds = ", ".join(sorted({str(value.dtype) for value in state.values()}))
        raise ValueError(f"safetensors cannot hold the model's state_dict, of {kinds}: {error}") from error
    content = {**report.to_dict(), "weights_sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(content, indent=2) + "\n"
    return write_directory(target, {_WEIGHTS: data, _REPORT: text.encode()})  # the report makes it an artifact


def check_dense(model: nn.Module, trouble: str) -> None:
    """Check that a model's state_dict holds dense tensors and nothing else.

    Args:
        model: The model.
        trouble: What is wrong with more, as a clause of the message.

    Raises:
        ValueError: If it holds more.
    """
    odd = not_dense(model)
    if odd:
        raise ValueError(f"the model's state_dict holds more than dense tensors, {trouble}: {_some(odd)}")


def not_dense(model: nn.Module) -> list[str]:
    """Return the names of what is no dense tensor in a model's state_dict."""
    state = model.state_dict().items()
    return [name for name, value in state if not (isinstance(value, Tensor) and value.layout is torch.strided)]


def weights_sha256(model: nn.Module) -> str:
    """Return a hash of a model's tensors and their names; its state_dict must be dense."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_pruned(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load an artifact into a model of the same architecture, in place, and verify it.

    Args:
        model: A model whose state_dict has the artifact's keys and shapes; the prefix that DataParallel or
            ``torch.compile`` gives keys may be in one of them and not in the other.
        directory: What ``report.save`` wrote.

    Returns:
        The model.

    Raises:
        ValueError: If a file is missing, damaged or altered, keys or shapes do not match, or the weights do
            not have the zeros that the report states. The model is then as it was.
    """
    check_network(model)
    directory = user_path(directory)
    report, digest = _read_report(directory)
    path = directory / _WEIGHTS
    state = read_weights(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{path} does not match the hash in {_REPORT}: it was altered or damaged")
    for name, layer in report.layers.items():
        if name not in state:
            raise ValueError(f"{path} lacks the pruned parameter {name!r}")
        found = _counted(state[name])
        if found != layer:
            raise ValueError(
                f"{name!r} in {path} has {found.kept} of {found.total} weights, but the report says "
                f"{layer.kept} of {layer.total}"
            )
    own = model.state_dict()
    fitting = renamed(state, own.keys())
    for (name, tensor), there in zip(state.items(), fitting, strict=True):
        if name in report.layers and there in own:
            dtype = own[there].dtype
            if int(tensor.to(dtype).count_nonzero()) != report.layers[name].kept:
                raise ValueError(
                    f"{name!r} would lose weights, which {dtype} rounds to zero: load it into a model of {tensor.dtype}"
                )
    _load_state(model, fitting, path)
    return model


def load_report(directory: str | Path) -> PruningReport:
    """Read an artifact's report; ``save(directory, model)`` writes it with a model that has its zeros.

    Args:
        directory: What ``report.save`` wrote.

    Raises:
        ValueError: If it is missing or not a report.
    """
    return _read_report(user_path(directory))[0].bind(save_artifact)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint into a model, in place.

    Args:
        model: Its state_dict must have the file's keys and shapes. BatchNorm's ``num_batches_tracked`` may be
            missing, and what DataParallel and torch.compile write before every name is dropped.
        path: ``.safetensors``, or ``.pt``, ``.pth`` or ``.bin`` holding tensors only.

    Raises:
        ValueError: If the file is missing, damaged, would run code, or does not fit.
    """
    check_network(model)
    _load_state(model, renamed(read_weights(path), model.state_dict().keys()), Path(path))
    return model


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors without executing code.

    A training checkpoint that holds the weights under ``state_dict`` or ``model`` is unwrapped.

    Raises:
        ValueError: If the file is missing, damaged, or holds anything but tensors.
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
        pass_on_shortage(error)
        reason = first_line(error)
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
    return f"keys {some_of(list(map(str, state)))}; under 'state_dict' or 'model' it would be found"


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


def count_layers(model: nn.Module, names: tuple[str, ...]) -> dict[str, LayerReport]:
    """Count the non-zero weights of some parameters."""
    parameters = dict(model.named_parameters())
    return {name: _counted(parameters[name]) for name in names}


def _counted(weights: Tensor) -> LayerReport:
    return LayerReport(total=weights.numel(), kept=int(weights.count_nonzero()))


def _load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values() if isinstance(tensor, Tensor)):
        raise ValueError(
            "the model lies on the meta device, which holds no values: call model.to_empty(device='cpu') first"
        )
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    wrong = [name for name in state if name in own and state[name].shape != own[name].shape]
    imaginary = [n for n in state if n in own and state[n].is_complex() and not own[n].is_complex()]
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(unexpected)}"] * bool(unexpected)
        raise ValueError(f"the keys of {path} do not match {type(model).__name__}: it {' and '.join(parts)}")
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the shapes of {path} do not match {type(model).__name__}: {name!r} is {tuple(state[name].shape)} "
            f"in the file and {tuple(own[name].shape)} in the model ({len(wrong)} differ)"
        )
    trained = {name for name, _ in model.named_parameters()}
    whole = [n for n in state if n in trained and own[n].is_floating_point() and not _is_inexact(state[n])]
    if whole:
        raise ValueError(
            f"{whole[0]!r} is {_kind_of(state[whole[0]])} in {path}, and a real number in {type(model).__name__}: the "
            "weights were quantised, or are those of another network; save them as floating-point numbers"
        )
    if imaginary:
        raise ValueError(
            f"{imaginary[0]!r} is {_kind_of(state[imaginary[0]])} in {path}, and real in {type(model).__name__}: its "
            "imaginary part would be lost"
        )
    if not torch.is_inference_mode_enabled():
        check_no_inference(model)
    both = f"{type(model).__name__}, and {path}"
    _check_values_fit(own, state, path)
    writable = _without_expanded(own, state, both)
    with restored_on_error(model):
        try:
            model.load_state_dict(writable, strict=False)
        except Exception as error:  # of a tensor that nothing may be written to, or whatever a hook does
            pass_on_shortage(error)
            raise ValueError(f"{type(model).__name__} did not take {path}: {first_line(error, typed=True)}") from error


def _check_values_fit(own: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    """Check that what lies at one place has one value, and that all are numbers in the model's types.

    Raises:
        ValueError: If not.
    """
    at: dict[tuple[Any, ...], str] = {}
    for name, values in state.items():
        place = own[name]
        if not isinstance(place, Tensor) or place.layout is not torch.strided:
            continue
        written = values.to(place.dtype)
        if _rounds(values, written) and bool((values.double().isfinite() & ~written.double().isfinite()).any()):
            raise ValueError(
                f"{name!r} in {path} has numbers that {place.dtype} cannot hold: load it into a model of {values.dtype}"
            )
        if place.numel() == 0:
            continue
        first = at.setdefault((place.device, place.data_ptr(), place.shape, place.stride()), name)
        if first != name and not _are_equal(state[first].to(place.dtype), written):
            raise ValueError(
                f"{first!r} and {name!r} are one tensor in the model, and have other values in {path}: give them "
                "memory of their own, as in the network that was saved"
            )


def _rounds(values: Tensor, written: Tensor) -> bool:
    """Whether real numbers are written in another type of real numbers."""
    return values.is_floating_point() and written.is_floating_point() and values.dtype != written.dtype


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    first, second = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(first, second)


def _without_expanded(own: Mapping[str, Any], state: Mapping[str, Tensor], both: str) -> dict[str, Tensor]:
    """Leave out what would be written to a tensor that holds a number many times, where it has these values.

    Raises:
        ValueError: If it has others.
    """
    expanded = [n for n in state if isinstance(own[n], Tensor) and unexpanded(own[n]).shape != own[n].shape]
    for name in expanded:
        if not torch.equal(own[name].cpu(), state[name].to(own[name].dtype)):
            raise ValueError(
                f"{name!r} is an expanded tensor, which cannot be written to, in {both} holds other values: give it "
                "memory of its own by contiguous()"
            )
    return {name: tensor for name, tensor in state.items() if name not in expanded}


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_report(directory: Path) -> tuple[PruningReport, str]:
    path = directory / _REPORT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("weights_sha256")
        report = PruningReport.model_validate(content)
    except OSError as error:
        raise ValueError(f"{directory} is not a pruning artifact: cannot read {path}: {error.strerror}") from error
    except (ValidationError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a pruning report, or was altered") from error
    kept, total = (sum(getattr(layer, part) for layer in report.layers.values()) for part in ("kept", "total"))
    if (report.kept, report.total) != (kept, total) or report.sparsity != 1 - kept / max(total, 1):
        raise ValueError(
            f"{path} was altered: it states {report.kept} of {report.total} weights at sparsity {report.sparsity}, and "
            f"its layers have {kept} of {total}"
        )
    return report, str(digest)
