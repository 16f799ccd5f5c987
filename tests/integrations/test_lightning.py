"""The Lightning callback, on a loop that behaves like Lightning's, and on Lightning itself where it is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

NAME = "swap_prune.integrations.lightning"
GENERATOR = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(32, 6, generator=GENERATOR), torch.randn(32, 4, generator=GENERATOR))


def pruned() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    layer.weight.data[layer.weight.abs() < layer.weight.abs().median()] = 0
    return layer


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The callback's module, made anew with a package lightning that has nothing but the base class."""
    package = ModuleType("lightning.pytorch")
    package.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def fit(model: nn.Module, callback: Any, *, steps: int = 4, fail: bool = False) -> torch.optim.Optimizer:
    """Train as Lightning's automatic optimisation does: the closure runs inside the optimiser's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    trainer = SimpleNamespace(optimizers=[optimizer])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(DATA.tensors[0]) - DATA.tensors[1]).square().mean()
        loss.backward()
        return loss

    callback.on_train_start(trainer, model)
    for _ in range(steps):
        optimizer.step(closure)
    if fail:
        callback.on_exception(trainer, model, RuntimeError())
    else:
        callback.on_train_end(trainer, model)
    optimizer.step(closure)  # a step of somebody else's
    return optimizer


@pytest.mark.parametrize("fail", [False, True])
def test_masks_hold_from_the_first_step_to_the_last(module: ModuleType, fail: bool) -> None:
    model = pruned()
    mask = model.weight != 0
    before = model.weight.detach().clone()
    checks = 0

    def check(*_: Any) -> None:
        nonlocal checks
        checks += 1
        if checks <= 4:
            assert not model.weight[~mask].any()

    hook = register_optimizer_step_post_hook(check)  # after the callback's
    try:
        fit(model, module.KeepMasks(), fail=fail)
    finally:
        hook.remove()
    assert checks == 5 and not torch.equal(model.weight[mask], before[mask])
    assert model.weight[~mask].all(), "the last step was not watched over"


def test_masks_and_places_can_be_named(module: ModuleType) -> None:
    model = nn.Sequential(pruned(), nn.Linear(4, 4))
    fit(model, module.KeepMasks({"1.weight": torch.eye(4).bool()}), steps=2)
    with pytest.raises(ValueError, match="no mask to keep"):
        fit(model, module.KeepMasks(targets=["0"], ignore=()))


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lightning>=2.1'"):
        importlib.import_module(NAME)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_lightning_itself(optimizer: str) -> None:
    pytorch = pytest.importorskip("lightning.pytorch")
    from swap_prune.integrations.lightning import KeepMasks

    class Module(pytorch.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = pruned()
            self.watched = 0

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            assert not self.layer.weight[~mask].any()
            self.watched += 1
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if optimizer == "lbfgs":
                return torch.optim.LBFGS(self.parameters(), lr=0.5)
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    model = Module()
    mask = model.layer.weight.detach() != 0
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pytorch.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, enable_model_summary=False, callbacks=[KeepMasks()], **quiet
    )
    before = model.layer.weight.detach().clone()
    trainer.fit(model, DataLoader(DATA, batch_size=8))
    assert model.watched >= 12 and torch.equal(model.layer.weight != 0, mask)
    assert not torch.equal(model.layer.weight, before)
