"""The Trainer callback, on a loop that behaves like the Trainer's, and on the Trainer where it is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

NAME = "swap_prune.integrations.transformers"
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [{"x": torch.randn(6, generator=GENERATOR), "labels": torch.randn(4, generator=GENERATOR)} for _ in range(32)]


class Network(nn.Module):
    """Returns a loss, as a model of transformers does when it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)
        self.layer.weight.data[self.layer.weight.abs() < self.layer.weight.abs().median()] = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.layer(x)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The callback's module, made anew with a package transformers that has nothing but the base class."""
    package = ModuleType("transformers")
    package.TrainerCallback = type("TrainerCallback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def test_a_training_that_was_broken_off_leaves_nothing_behind_the_next_one(module: ModuleType) -> None:
    model, callback = Network(), module.KeepMasks()
    weight, mask = model.layer.weight, model.layer.weight.detach() != 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):  # the first is never told of its end
        callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    callback.on_train_end(None, None, None, model=model, optimizer=optimizer)
    batch = {name: torch.stack([row[name] for row in ROWS]) for name in ("x", "labels")}
    model(**batch)["loss"].backward()
    assert bool(weight.grad[~mask].any())


def test_masks_hold_while_the_trainer_trains(module: ModuleType) -> None:
    model, callback = Network(), module.KeepMasks()
    weight, mask = model.layer.weight, model.layer.weight.detach() != 0
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    wrapper = SimpleNamespace(optimizer=inner, step=inner.step)  # the Trainer's is a wrapper of Accelerate
    batch = {name: torch.stack([row[name] for row in ROWS]) for name in ("x", "labels")}
    everything = {"model": model, "optimizer": wrapper, "lr_scheduler": None, "train_dataloader": None}
    assert callback.on_train_begin(None, None, None, **everything) is None
    for last in (False, False, False, True):
        if last:
            assert callback.on_train_end(None, None, None, **everything) is None
        model(**batch)["loss"].backward()
        wrapper.step()
        assert bool(weight[~mask].any()) == last


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=r"pip install accelerate 'transformers>=4.46'"):
        importlib.import_module(NAME)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_itself(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from swap_prune.integrations.transformers import KeepMasks

    model = Network()
    mask, before = model.layer.weight.detach() != 0, model.layer.weight.detach().clone()

    class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        steps = 0

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            assert torch.equal(model.layer.weight != 0, mask)
            Watch.steps += 1

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=0.05,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, weight_decay=0.1,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=[KeepMasks(), Watch()]).train()
    assert Watch.steps == 12 and torch.equal(model.layer.weight != 0, mask)
    assert not torch.equal(model.layer.weight, before)
