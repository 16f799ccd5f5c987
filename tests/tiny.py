"""A network and data small enough for experiments in tests, named as ``tests.tiny:network`` and ``tests.tiny:data``."""

from __future__ import annotations

import threading

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset, random_split

from swap_prune.experiments.config import Experiment


def network(normalised: bool = True) -> nn.Module:
    """Draws its weights from the global random state, as a careless factory does."""
    middle = [nn.BatchNorm1d(12)] if normalised else []
    return nn.Sequential(nn.Linear(6, 12), *middle, nn.ReLU(), nn.Linear(12, 3))


class _Noting(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def noting() -> nn.Module:
    """Keeps something in its state_dict that is no tensor."""
    return _Noting(6, 3)


def locked() -> nn.Module:
    """Holds what cannot be copied."""
    model = network()
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def valueless() -> nn.Module:
    """Lies on the meta device, as a factory leaves it that waits for a checkpoint."""
    with torch.device("meta"):
        return network()


class _Fixed(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[:, :3]


def fixed() -> nn.Module:
    """Has no parameters, and is always right."""
    return _Fixed()


def data() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(260, 6, generator=generator)
    labels = inputs[:, :3].argmax(1)
    return TensorDataset(inputs[:60], labels[:60]), TensorDataset(inputs[60:], labels[60:])


def batches() -> tuple[object, object]:
    """The same as iterators, which can be read once."""
    train, test = data()
    return iter([train[:30], train[30:]]), iter([test[:]])


def shuffled() -> tuple[object, object]:
    """The same, split and shuffled by the global random state."""
    train, test = random_split(ConcatDataset(data()), [60, 200])
    return DataLoader(train, batch_size=20, shuffle=True), test


def untestable() -> tuple[object, object]:
    """Data without test samples."""
    return data()[0], []


def experiment(**changes: object) -> Experiment:
    table: dict[str, object] = {
        "model": "tests.tiny:network",
        "data": "tests.tiny:data",
        "sparsities": [0.5, 0.8],
        "seeds": [0, 1],
        "samples": 40,
        "methods": [{"name": "magnitude"}, {"name": "lr", "settings": {"damping": 1.0, "first_order": 0.0}}],
    }
    return Experiment.model_validate(table | changes)
