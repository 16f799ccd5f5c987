"""Pruning with every storage of G: the same answer within rounding, exact counts, the same bits for the same seed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from swap_prune import METHODS, prune
from swap_prune.experiments.demo import embedded_data, embedded_network
from swap_prune.pipeline import plan
from tests.test_pipeline import small_data, small_network

# share of the kept set that must agree with float32; measured on the embedded network, rounded down
AGREES = {"float32": 1.0, "mapped": 0.999, "float16": 0.999, "bfloat16": 0.99}


def masks(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() != 0 for p in model.parameters() if p.ndim >= 2])


@pytest.mark.parametrize("storage", AGREES)
def test_the_kept_set_is_that_of_float32(storage: str, tmp_path: Path) -> None:
    models = []
    for kind in ("float32", storage):
        model = embedded_network()
        report = prune(
            model, embedded_data()[0], 0.9, "lr", samples=200, storage=kind, scratch=tmp_path, progress=False
        )
        assert report.kept == math.floor(report.total * (1 - 0.9)) == int(masks(model).sum())
        assert report.settings["storage"]["used"] == kind
        models.append(masks(model))
    share = int((models[0] & models[1]).sum()) / int(models[0].sum())
    print(storage, f"{share:.5f}")
    assert share >= AGREES[storage]
    assert list(tmp_path.iterdir()) == [], "the file is deleted"


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.needs_gradients])
@pytest.mark.parametrize("storage", ["float16", "bfloat16", "mapped"])
def test_every_method_is_exact_and_repeats_its_bits(storage: str, method: str, tmp_path: Path) -> None:
    first, second = small_network(), small_network()
    for model in (first, second):
        report = prune(
            model, small_data(), 0.7, method, samples=30, stages=2, storage=storage, scratch=tmp_path, progress=False
        )
    assert report.kept == math.floor(report.total * (1 - 0.7)) == int(masks(first).sum())
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_smaller_budget_leads_to_another_storage_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.forecast.BLOCK_BYTES", 2**20)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3000), nn.ReLU(), nn.Linear(3000, 3))
    data = small_data(220)
    needs = {f.name: f.need for f in plan(model, data, 0.5, "lr", samples=176).forecasts}
    dense = min(needs["float32"], needs["float32 (no copies)"])
    assert needs["float16"] < dense
    budget = (needs["float16"] + dense) // 2
    report = prune(model, data, 0.5, "lr", samples=176, memory=budget, progress=False)
    assert report.settings["storage"] == {"asked": "auto", "used": "float16", "lean": True}
    assert report.kept == math.floor(report.total / 2)
    assert any("storage float16 (float32: " in note and "memory allows" in note for note in report.notes)


def test_noise_on_gradients_is_refused_and_noise_on_data_is_not() -> None:
    with pytest.raises(ValueError, match="noise on gradients"):
        prune(small_network(), small_data(), 0.5, "lr", samples=30, storage="float16", noise="gradient:std=1")
    report = prune(
        small_network(), small_data(), 0.5, "lr", samples=30, storage="float16", noise="input", progress=False
    )
    assert report.settings["storage"] == {"asked": "float16", "used": "float16", "lean": True}


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (net(batch[0]).sum(1) * 0).sqrt()  # its gradient is not a number

    with pytest.raises(ValueError, match="gradient is not finite"):
        prune(small_network(), small_data(), 0.5, "lr", loss_fn=loss_fn, samples=20, storage="mapped", scratch=tmp_path,
              recalibrate_batchnorm=False)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_plan_leaves_the_model_and_the_random_state() -> None:
    model = small_network()
    state, before = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    taken = plan(model, small_data(), 0.9, samples=50)
    assert taken.to_dict()["storage"] == "float32" and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert plan(model, small_data(), 0.9, "magnitude").forecasts == ()
