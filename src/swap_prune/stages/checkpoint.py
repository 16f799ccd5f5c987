"""Finished stages on disk: a run that was interrupted goes on where it was, and ends in the same bytes.

A directory holds ``run.json``, which says what run it is of, and a file for each number of stages that was tried, such
as ``15-stages.safetensors``: the network after the last stage that was finished, what the stages so far did, and where
every random state and every stream of samples was then. It is replaced as a whole, once a stage.

Place in the pipeline: around the stages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swap_prune.checks import user_path
from swap_prune.files import replacing
from swap_prune.report import StageReport
from swap_prune.surgery import unexpanded

__all__ = ["Checkpoint", "NetworkState", "RandomStates", "Remembering"]

_RUN, _STAGES = "run.json", "stages"


class Remembering(Protocol):
    """A part of a run that changes from stage to stage."""

    def remembered(self) -> dict[str, Tensor]:
        """Return what it is now."""

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Become what it was."""


class NetworkState:
    """A network's parameters and buffers, with those that no ``state_dict`` has."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def remembered(self) -> dict[str, Tensor]:
        """Return them by name."""
        return {name: unexpanded(tensor) for name, tensor in self._tensors().items()}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Write them to the network."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                place = unexpanded(tensor)
                if place.shape == state[name].shape:
                    place.copy_(state[name])
                else:  # a buffer that grows
                    tensor.data = state[name].to(tensor)


class RandomStates:
    """Random states that all stages of a run draw from.

    Args:
        noise: That of noise models.
        device: Where is computed; torch's own random states there and on the CPU are a part of it.
    """

    def __init__(self, noise: torch.Generator, device: torch.device) -> None:
        self._noise, self._device = noise, device

    def remembered(self) -> dict[str, Tensor]:
        """Return them."""
        states = {"noise": self._noise.get_state(), "torch": torch.get_rng_state()}
        return states | ({"gpu": torch.cuda.get_rng_state(self._device)} if self._device.type == "cuda" else {})

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Set them."""
        self._noise.set_state(state["noise"])
        torch.set_rng_state(state["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["gpu"], self._device)


class Checkpoint:
    """The directory of a run.

    Args:
        directory: Where it is; made if it is not there.
        run: What makes the run this one and no other, as JSON has it.
        writes: Whether this process writes; of several that run together only one does.

    Attributes:
        seconds: What the stages took that were found there, in seconds.

    Raises:
        ValueError: If the directory is another run's, holds something else, or cannot be used.
    """

    def __init__(self, directory: str | Path, run: Mapping[str, Any], *, writes: bool = True) -> None:
        self._directory = user_path(directory).absolute()
        self._writes = writes
        self.seconds = 0.0
        if writes:
            self._open(run)
        self._parts: Mapping[str, Remembering] = {}

    def of(self, **parts: Remembering) -> Checkpoint:
        """Say what is kept, by names; none of it may hold another one's tensors."""
        self._parts = parts
        return self

    def resume(self, stages: int) -> list[StageReport]:
        """Bring all parts to where the last finished stage left them, and return what the stages so far did.

        Args:
            stages: How many stages there are in all.

        Raises:
            ValueError: If the file is damaged, or the data are others.
        """
        path = self._path(stages)
        if not path.exists():
            return []
        try:
            with safe_open(path, framework="pt") as file:
                records = [StageReport.model_validate(record) for record in json.loads(file.metadata()[_STAGES])]
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            for part, remembering in self._parts.items():
                prefix = f"{part}."
                remembering.recall({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        except (SafetensorError, ValidationError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or was altered: remove {self._directory}, and begin again") from error
        self.seconds += sum(record.seconds for record in records)
        return records

    def keep(self, records: Sequence[StageReport], stages: int) -> None:
        """Replace what is kept by what all parts are now.

        Args:
            records: What the stages so far did.
            stages: How many stages there are in all.

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
        text = json.dumps([record.model_dump(mode="json") for record in records])
        path = self._path(stages)
        try:
            with replacing(path) as scratch:
                save_file(state, scratch, metadata={_STAGES: text})
                with scratch.open("rb") as file:
                    os.fsync(file.fileno())  # its name may reach the disk before it does
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint {path} cannot be written: {error}") from error

    def _path(self, stages: int) -> Path:
        return self._directory / f"{stages}-stages.safetensors"

    def _open(self, run: Mapping[str, Any]) -> None:
        """Make the directory, or see whether it is this run's."""
        path, wanted = self._directory / _RUN, json.loads(json.dumps(run))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for torn in self._directory.glob(".*.safetensors"):  # of a process that was killed while it wrote
                torn.unlink()
            if not path.exists():
                if any(self._directory.iterdir()):
                    raise ValueError(
                        f"checkpoint {self._directory} is not empty, and no run's: choose another directory"
                    )
                with replacing(path) as scratch:
                    scratch.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
                return
            found = json.loads(path.read_text(encoding="utf-8"))
            differ = _differences(found, wanted)
        except OSError as error:
            raise ValueError(f"checkpoint {self._directory} cannot be used: {error.strerror or error}") from error
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{path} was altered: choose another directory") from error
        if differ:
            raise ValueError(
                f"checkpoint {self._directory} is of another run: {'; '.join(differ)}. Repeat that run's arguments, or "
                "choose another directory"
            )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what differs of two runs, in words."""
    names = sorted(found.keys() | wanted.keys())
    return [
        f"{name} was {_shown(found.get(name))} and is {_shown(wanted.get(name))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:70]}..."
