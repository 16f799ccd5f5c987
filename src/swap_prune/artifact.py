"""Plain files: a pruned model on disk, verified when it is read.

An artifact is a directory of two files: ``weights.safetensors``, the whole state_dict under its original keys,
and ``report.json``, the pruning report with the SHA-256 of the weights. It is written under a temporary name
and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from swap_prune.checks import some_of, user_path
from swap_prune.files import check_output_directory, write_directory, write_tensors
from swap_prune.network.device import check_network
from swap_prune.network.names import renamed
from swap_prune.report import LayerReport, PruningReport
from swap_prune.training.masks import note_pruned
from swap_prune.weights_file import check_not_meta, load_state, read_weights

__all__ = [
    "check_dense",
    "count_layers",
    "load_pruned",
    "load_report",
    "save_artifact",
    "tensors_sha256",
    "weights_sha256",
]

_Model = TypeVar("_Model", bound=nn.Module)
_WEIGHTS, _REPORT = "weights.safetensors", "report.json"


def save_artifact(model: nn.Module, report: PruningReport, directory: str | Path) -> Path:
    """Write a pruned model and its report; see :meth:`PruningReport.save`."""
    target = check_output_directory(directory)
    check_network(model)
    check_not_meta(model.state_dict())
    missing = report.layers.keys() - dict(model.named_parameters()).keys()
    if missing:
        raise ValueError(
            f"the model lacks parameters that the report is of: {some_of(sorted(map(repr, missing)))}; save the "
            "network that was pruned, in the wrapper (DataParallel, torch.compile) that it had then, and in no other"
        )
    if count_layers(model, tuple(report.layers)) != report.layers:
        raise ValueError(
            "the model does not have the sparsity reported (it was changed after pruning); save right after pruning, "
            "prune again, or train under swap_prune.keep_masks"
        )
    check_dense(model, "which is not saved")
    state = _on_its_own(model.state_dict())
    other = [name for name, layer in report.layers.items() if name not in state or _counted(state[name]) != layer]
    if other:
        raise ValueError(
            f"state_dict of {type(model).__name__}, which is what is saved, leaves out or changes the pruned weights "
            f"{some_of(map(repr, other))}: take off the hooks that do so"
        )

    def write_report(path: Path) -> None:
        content = {**report.to_dict(), "weights_sha256": _sha256(path.with_name(_WEIGHTS))}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    files: dict[str, Callable[[Path], None]] = {_WEIGHTS: partial(_write_weights, state), _REPORT: write_report}
    return write_directory(target, files)  # the report makes it an artifact


def _on_its_own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU that share no memory with each other; of others it is their own, and not a copy."""
    seen, result = set[int](), {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        plain = type(tensor) is Tensor and not (tensor.is_conj() or tensor.is_neg())
        if plain and tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
        else:
            tensor = tensor.clone()
        result[name] = tensor
    return result


def _write_weights(state: dict[str, Tensor], path: Path) -> None:
    try:
        write_tensors(state, path)
    except (KeyError, SafetensorError) as error:
        kinds = ", ".join(sorted({str(value.dtype) for value in state.values()}))
        raise ValueError(f"safetensors cannot hold the model's state_dict, of {kinds}: {error}") from error


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
        raise ValueError(f"the model's state_dict holds more than dense tensors, {trouble}: {some_of(map(repr, odd))}")


def not_dense(model: nn.Module) -> list[str]:
    """Return the names of what is no dense tensor in a model's state_dict."""
    state = model.state_dict().items()
    return [name for name, value in state if not (isinstance(value, Tensor) and value.layout is torch.strided)]


def weights_sha256(model: nn.Module) -> str:
    """Return a hash of a model's tensors and their names; its state_dict must be dense."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors and their names."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_pruned(model: _Model, directory: str | Path) -> _Model:
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
    if _sha256(path) != digest:
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
    load_state(model, fitting, path)
    note_pruned(model, [there for name, there in zip(state, fitting, strict=True) if name in report.layers])
    return model


def load_report(directory: str | Path) -> PruningReport:
    """Read an artifact's report; ``save(directory, model)`` writes it with a model that has its zeros.

    Args:
        directory: What ``report.save`` wrote.

    Raises:
        ValueError: If it is missing or not a report.
    """
    return _read_report(user_path(directory))[0].bind(save_artifact)


def count_layers(model: nn.Module, names: tuple[str, ...]) -> dict[str, LayerReport]:
    """Count the non-zero weights of some parameters."""
    parameters = dict(model.named_parameters())
    return {name: _counted(parameters[name]) for name in names}


def _counted(weights: Tensor) -> LayerReport:
    return LayerReport(total=weights.numel(), kept=int(weights.count_nonzero()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if (report.kept, report.total) != (kept, total) or kept > total or report.sparsity != 1 - kept / max(total, 1):
        raise ValueError(
            f"{path} was altered: it states {report.kept} of {report.total} weights at sparsity {report.sparsity}, and "
            f"its layers have {kept} of {total}"
        )
    return report, str(digest)
