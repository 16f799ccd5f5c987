"""Finished stages on disk: a run that was interrupted goes on where it was, and ends in the same bytes.

A directory holds ``run.json``, which says what run it is of, and a file for each number of stages that was tried, such
as ``15-stages.safetensors``: the network after the last stage that was finished, what the stages so far did, and where
every random state and every stream of samples was then. It is replaced as a whole, once a stage.

Place in the pipeline: around the stages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from swap_prune.artifact import tensors_sha256
from swap_prune.checks import user_path
from swap_prune.distributed import Team
from swap_prune.files import delete_abandoned, replaced_name, replacing, write_tensors
from swap_prune.fisher.storage import Storage, StorageKind
from swap_prune.network.aliasing import unexpanded
from swap_prune.randomness import GlobalStates, global_states, set_global_states
from swap_prune.report import StageReport
from swap_prune.samples.spill import Spilled

__all__ = [
    "SAMPLES_OPEN",
    "Checkpoint",
    "NetworkState",
    "RandomStates",
    "Remembering",
    "has_stages",
    "kept_samples",
    "kept_storage",
]

SAMPLES_OPEN = "samples_open"  # whether a run was asked to find the number of samples
_ITS_OWN = {"seed", "weights", "versions"}  # entries of run.json, by which it is told from a file of the same name
_RUN, _STAGES, _DIGEST, _SUFFIX = "run.json", "stages", "sha256", "-stages.safetensors"


class Remembering(Protocol):
    """A part of a run that changes from stage to stage."""

    def remembered(self) -> dict[str, Tensor]:
        """Return what it is now."""

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Become what it was."""


class NetworkState:
    """A network's parameters and buffers, with those that no ``state_dict`` has.

    Raises:
        ValueError: If it holds what a file cannot.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        for name, tensor in self._tensors().items():
            if tensor.layout is not torch.strided or not _can_be_stored(tensor.dtype):
                kind = f"{tensor.layout}, {tensor.dtype}".replace("torch.", "")
                raise ValueError(f"a checkpoint cannot keep {name!r} ({kind}): leave checkpoint out")

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def remembered(self) -> dict[str, Tensor]:
        """Return them by name."""
        return {name: unexpanded(tensor) for name, tensor in self._tensors().items()}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Write them to the network."""
        own = self._tensors()
        if not own.keys() <= state.keys():
            raise KeyError(next(iter(own.keys() - state.keys())))
        with torch.no_grad():
            for name, values in state.items():
                if name not in own:
                    self._fill(name, values)
                elif (place := unexpanded(own[name])).shape == values.shape:
                    place.copy_(values)
                else:  # a buffer that grows
                    own[name].data = values.to(own[name])

    def _fill(self, name: str, values: Tensor) -> None:
        """Give a buffer that is None so far its values."""
        path, _, own = name.rpartition(".")
        module = self._model.get_submodule(path)
        if own not in module._buffers:
            raise KeyError(name)
        module._buffers[own] = values.to(next(self._model.parameters()).device)


class RandomStates:
    """Random states that all stages of a run draw from.

    Args:
        noise: That of noise models.
        device: Where is computed; the global random states there and on the CPU are a part of it.
    """

    def __init__(self, noise: torch.Generator, device: torch.device) -> None:
        self._noise, self._device = noise, device

    def remembered(self) -> dict[str, Tensor]:
        """Return them."""
        states = {"noise": self._noise.get_state()} | global_states().tensors()
        return states | ({"gpu": torch.cuda.get_rng_state(self._device)} if self._device.type == "cuda" else {})

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Set them."""
        self._noise.set_state(state["noise"])
        set_global_states(GlobalStates.of_tensors(state))
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["gpu"], self._device)


class Checkpoint:
    """The directory of a run.

    Args:
        directory: Where it is; made if it is not there.
        run: What makes the run this one and no other, as JSON has it.
        team: The processes that do the run together, of which the first writes; None: this one alone.

    Attributes:
        seconds: What the stages took that were found there, in seconds.

    Raises:
        ValueError: If the directory is another run's, holds something else, or cannot be used.
    """

    def __init__(self, directory: str | Path, run: Mapping[str, Any], team: Team | None = None) -> None:
        self._directory = user_path(directory).absolute()
        self._writes = team is None or team.rank == 0
        self._parts: Mapping[str, Remembering] = {}
        self.seconds = 0.0
        wanted = json.loads(json.dumps(run))
        if self._writes:
            self._make(wanted)
        if team is not None:
            team.wait()
        self._compare(wanted)
        if self._writes:
            delete_abandoned(self._directory)

    def of(self, **parts: Remembering) -> Checkpoint:
        """Say what is kept, by names."""
        self._parts = parts
        return self

    def resume(self, course: str) -> list[StageReport]:
        """Bring all parts to where the last finished stage left them, and return what the stages so far did.

        Args:
            course: What the stages are called: how many there are in all, and the schedule where it is another.

        Raises:
            ValueError: If the file is damaged, or the data are others.
        """
        path = self._path(course)
        if not path.exists():
            return []
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                # copied, since a product may round otherwise where its factors lie at odd addresses, as in the file
                state = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
            if about[_DIGEST] != _digest(state, about[_STAGES]):
                raise KeyError(_DIGEST)
            records = [StageReport.model_validate(record) for record in json.loads(about[_STAGES])]
            for part, remembering in self._parts.items():
                prefix = f"{part}."
                remembering.recall({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        except (SafetensorError, ValidationError, KeyError, TypeError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or was altered: remove {self._directory}, and begin again") from error
        self.seconds += sum(record.seconds for record in records)
        return records

    def keep(self, records: Sequence[StageReport], course: str) -> None:
        """Replace what is kept by what all parts are now.

        Args:
            records: What the stages so far did.
            course: What the stages are called: how many there are in all, and the schedule where it is another.

        Raises:
            ValueError: If it cannot be written.
        """
        if not self._writes:
            return
        state = {
            f"{part}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for part, remembering in self._parts.items()
            for name, tensor in remembering.remembered().items()
        }
        path = self._path(course)
        try:
            text = json.dumps([record.model_dump() for record in records])
            with replacing(path, durable=True) as scratch:
                write_tensors(state, scratch, {_STAGES: text, _DIGEST: _digest(state, text)})
        except (OSError, SafetensorError, TypeError) as error:
            raise ValueError(f"checkpoint {path} cannot be written: {error}") from error

    def _path(self, course: str) -> Path:
        return self._directory / f"{course}{_SUFFIX}"

    def _make(self, run: Mapping[str, Any]) -> None:
        """Make the directory, where it is not there; one without a finished stage is as good as new."""
        path = self._directory / _RUN
        if self._directory.exists() and not self._directory.is_dir():
            raise ValueError(f"checkpoint {self._directory} is not a directory: choose another")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if path.exists():
                if has_stages(self._directory) or not _read_run(self._directory).keys() >= _ITS_OWN:
                    return
            elif strange := [found.name for found in self._directory.iterdir() if replaced_name(found) != _RUN]:
                raise ValueError(
                    f"checkpoint directory {self._directory} holds other files ({strange[0]}): choose an empty one"
                )
            with replacing(path, durable=True) as scratch:
                scratch.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"checkpoint {self._directory} cannot be used: {error.strerror or error}") from error

    def _compare(self, run: Mapping[str, Any]) -> None:
        """Refuse another run."""
        differ = _differences(_read_run(self._directory), run)
        if differ:
            raise ValueError(
                f"checkpoint {self._directory} is of another run: {'; '.join(differ)}. Repeat that run's arguments on "
                "the dense network (under the same names), with as much memory, or choose another directory"
            )


class _Recorded(BaseModel):
    """What a run says of its storage, as ``recorded_storage`` has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    asked: str
    used: StorageKind
    lean: bool
    at_once: int = Field(ge=1)
    roomy: bool
    spilled: Spilled
    compares_rows: bool


def has_stages(directory: str | Path) -> bool:
    """Whether a checkpoint has a finished stage."""
    return any(user_path(directory).glob(f"*{_SUFFIX}"))


def kept_storage(directory: str | Path) -> Storage | None:
    """Return how the first stages of a run held G, where they can be gone on with."""
    if not has_stages(directory):
        return None
    try:
        recorded = _Recorded.model_validate(_read_run(user_path(directory))["storage"])
    except (KeyError, TypeError, ValueError):  # it is another's, as will be seen, or holds none
        return None
    return Storage(kind=recorded.used, scratch=Path(), **recorded.model_dump(exclude={"asked", "used"}))


def kept_samples(directory: str | Path) -> int | None:
    """Return how many samples a stage the first stages of a run took at the most, where the run had that left open."""
    if not has_stages(directory):
        return None
    try:
        run = _read_run(user_path(directory))
    except ValueError:  # as will be seen
        return None
    samples = run.get("samples")
    return samples if run.get(SAMPLES_OPEN) is True and type(samples) is int and samples > 0 else None


def _read_run(directory: Path) -> dict[str, Any]:
    """Return what run a directory is of.

    Raises:
        ValueError: If it does not say.
    """
    path = directory / _RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"checkpoint {directory} cannot be used: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise ValueError(f"{path} was altered: choose another directory") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} was altered: choose another directory")
    return found


def _differences(found: Mapping[str, Any], run: Mapping[str, Any], within: str = "") -> list[str]:
    """Say in what two runs differ; of tables of the same entries, in which of these."""
    differ = list[str]()
    for name in sorted(found.keys() | run.keys()):
        was, now = found.get(name), run.get(name)
        if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
            differ += _differences(was, now, f"{within}{name}.")
        elif was != now:
            differ.append(f"{within}{name} was {_shown(was)} and is {_shown(now)}")
    return differ


def _digest(state: Mapping[str, Tensor], stages: str) -> str:
    """Return a hash of all that a file keeps."""
    tensors = tensors_sha256({name: state[name] for name in sorted(state)})
    return hashlib.sha256(f"{tensors}\n{stages}".encode()).hexdigest()


def _can_be_stored(dtype: torch.dtype) -> bool:
    """Whether safetensors has a dtype."""
    try:
        save({"one": torch.empty(0, dtype=dtype, device="cpu")})
    except (KeyError, SafetensorError, RuntimeError):
        return False
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 160 else f"{text[:150]}..."
