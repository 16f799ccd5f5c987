"""Pruning with every storage of G: the same answer within rounding, exact counts, the same bits for the same seed."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune import EWR, LR, METHODS, plan, prune
from swap_prune.experiments.demo import embedded_data, embedded_network
from swap_prune.experiments.zoo import build_model
from tests.cases import ONE, but_long
from tests.test_pipeline import small_data, small_network

# share of the kept set that must agree with float32; measured on the embedded network, rounded down
AGREES = {"float32": 1.0, "mapped": 0.999, "float16": 0.999, "bfloat16": 0.99, "matrix-free": 0.999, "low-rank": 0.999}
PRODUCTS = ("matrix-free", "low-rank")


def masks(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() != 0 for p in model.parameters() if p.ndim >= 2])


def doubled(n: int) -> TensorDataset:
    inputs, labels = small_data(n).tensors
    return TensorDataset(inputs.double(), labels)


@pytest.mark.parametrize("storage", but_long(AGREES, short=["low-rank"]))
def test_the_kept_set_is_that_of_float32(storage: str, tmp_path: Path) -> None:
    """In one metric: which of two that end alike is chosen, rounding can decide."""
    models, method = [], LR(fisher="empirical", metric="diagonal", damping=30.0)
    for kind in ("float32", storage):
        model = embedded_network()
        report = prune(
            model, embedded_data()[0], 0.9, method, samples=200, storage=kind, scratch=tmp_path, progress=False
        )
        assert report.kept == math.floor(report.total * (1 - 0.9)) == int(masks(model).sum())
        assert report.settings["storage"]["used"] == kind
        models.append(masks(model))
    share = int((models[0] & models[1]).sum()) / int(models[0].sum())
    print(storage, f"{share:.5f}")
    assert share >= AGREES[storage]
    assert list(tmp_path.iterdir()) == [], "the file is deleted"


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.needs_gradients])
@pytest.mark.parametrize(
    "storage", but_long(["float16", "bfloat16", "mapped", *PRODUCTS], short=["float16", "low-rank"])
)
def test_every_method_is_exact_and_repeats_its_bits(storage: str, method: str, tmp_path: Path) -> None:
    first, second = small_network(), small_network()
    for model in (first, second):
        report = prune(
            model, small_data(), 0.7, method, samples=30, stages=2, storage=storage, scratch=tmp_path, progress=False
        )
    assert report.kept == math.floor(report.total * (1 - 0.7)) == int(masks(first).sum())
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fisher", ["gauss-newton", "empirical"])
@pytest.mark.parametrize("recalibrated", but_long([True, False]))
@pytest.mark.parametrize("method", but_long([LR, EWR]))
def test_products_of_the_network_choose_the_same_weights(method: type, fisher: str, recalibrated: bool) -> None:
    """Every kind of row, in double precision: the whole of the solver sees the same G."""
    kept, weights = [], []
    for storage in ("float32", "matrix-free"):
        model = small_network().double()
        report = prune(
            model, doubled(60), 0.7, method(fisher=fisher), samples=40, stages=2, storage=storage, progress=False,
            recalibrate_batchnorm=recalibrated, defence=None,
        )  # fmt: skip
        kept.append(masks(model))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*kept)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    passes = report.stages[-1].evidence["passes"]
    assert passes["way"] == "forward" and min(passes["along"], passes["back"], passes["rows"]) >= 1


@pytest.mark.long
def test_the_solver_that_iterates_chooses_the_same_weights_but_does_not_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for most in (400, 0):
        monkeypatch.setattr("swap_prune.fisher.capture.matrix_free._MOST_PASSES", most)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 3))
        method = replace(ONE, swaps=0, first_order=0.0)
        report = prune(model, small_data(200), 0.9, method, samples=60, storage="matrix-free", progress=False)
        assert report.kept == math.floor(report.total * (1 - 0.9)) == int(masks(model).sum())
        kept.append(masks(model))
    assert report.stages[0].evidence["passes"]["along"] > 100
    assert int((kept[0] & kept[1]).sum()) >= 0.999 * int(kept[0].sum())


def test_noise_on_weights_acts_where_gradients_are_taken() -> None:
    kept = []
    for storage, noise in (("float32", "analog"), ("matrix-free", "analog"), ("matrix-free", None)):
        model = small_network().double()
        prune(model, doubled(60), 0.7, LR(first_order=0.0, ridge=0.1, damping=1.0), samples=40, storage=storage,
              noise=noise, defence=None, progress=False)  # fmt: skip
        kept.append(masks(model))
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])


@pytest.mark.parametrize("recalibrated", but_long([True, False]))
def test_a_pruned_convolution_of_low_rank_is_near_that_of_all_ranks(recalibrated: bool) -> None:
    """By the same settings: which held-out samples favour may differ, where several are as good."""
    kept, method = [], ONE
    for storage in ("float32", "low-rank"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.Flatten(), nn.Linear(384, 3)
        )
        report = prune(model, small_data(200), 0.5, method, samples=160, storage=storage, progress=False,
                       recalibrate_batchnorm=recalibrated)  # fmt: skip
        assert report.kept == math.floor(report.total / 2) == int(masks(model).sum())
        kept.append(masks(model))
    assert int((kept[0] & kept[1]).sum()) >= 0.98 * int(kept[0].sum())


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 5))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.weight.tanh()[words]


def test_low_rank_needs_weights_that_are_used_in_products() -> None:
    model = nn.Sequential(Table(), nn.Flatten(), nn.Linear(20, 3))
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(9, (30, 4), generator=generator), torch.randint(3, (30,), generator=generator)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"rows of low rank.*'0.weight' goes to torch.Tensor.tanh.*'matrix-free'"):
        prune(model, [batch], 0.5, "lr", targets=("Table",), samples=20, storage="low-rank")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    report = prune(model, [batch], 0.5, "lr", targets=("Table",), samples=20, storage="matrix-free", progress=False)
    assert report.kept == math.floor(report.total / 2)


def test_where_nothing_else_has_room_the_network_is_asked_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("swap_prune.fisher.backends.blocked.BLOCK_BYTES", 2**20)
    monkeypatch.setattr("swap_prune.fisher.storage._LEAN_CHUNK_BYTES", 2**20)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3000), nn.ReLU(), nn.Linear(3000, 3))
    data = small_data(220)
    taken = plan(model, data, 0.5, "obd", samples=176, memory="64GB")
    needs = {f.name: f.need for f in taken.forecasts}
    assert taken.chosen is taken.forecasts[0]
    assert "only where it is asked for" in taken.forecasts[-1].obstacle
    budget = (needs["matrix-free"] + 9 * needs["float16"]) // 10
    assert needs["low-rank"] < budget, "it would fit"
    report = prune(model, data, 0.5, "obd", samples=176, memory=budget, scratch=tmp_path / "nowhere", progress=False)
    assert report.settings["storage"] == {
        "asked": "auto",
        "used": "matrix-free",
        "lean": True,
        "at_once": 64,
        "roomy": False,
        "spilled": "nothing",
        "compares_rows": True,
    }
    assert any("storage matrix-free (float32: " in note and "mapped: " in note for note in report.notes)


@pytest.mark.long
def test_a_smaller_budget_leads_to_another_storage_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.fisher.backends.blocked.BLOCK_BYTES", 2**20)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3000), nn.ReLU(), nn.Linear(3000, 3))
    data = small_data(220)
    needs = {f.name: f.need for f in plan(model, data, 0.5, ONE, samples=176, memory="1MB").forecasts}  # the least
    dense = min(needs["float32"], needs["float32 (no copies)"])
    assert needs["float16"] < dense
    budget = (needs["float16"] + dense) // 2
    report = prune(model, data, 0.5, ONE, samples=176, memory=budget, progress=False)
    storage = report.settings["storage"]
    assert (storage["asked"], storage["used"], storage["lean"]) == ("auto", "float16", True)
    assert storage["at_once"] < 64 or storage["spilled"] != "nothing", "64 at once in memory would need more"
    assert report.kept == math.floor(report.total / 2)
    assert any("storage float16 (float32: " in note and "memory allows" in note for note in report.notes)


def test_noise_on_gradients_is_refused_and_noise_on_data_is_not() -> None:
    for storage in ("float16", *PRODUCTS):
        with pytest.raises(ValueError, match="noise on gradients"):
            prune(small_network(), small_data(), 0.5, "lr", samples=30, storage=storage, noise="gradient:std=1")
    report = prune(
        small_network(), small_data(), 0.5, "lr", samples=30, storage="float16", noise="input", progress=False
    )
    assert report.settings["storage"] == {
        "asked": "float16",
        "used": "float16",
        "lean": True,
        "at_once": 64,
        "roomy": False,
        "spilled": "nothing",
        "compares_rows": True,
    }


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def loss_fn(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (net(batch[0]).sum(1) * 0).sqrt()  # its gradient is not a number

    with pytest.raises(ValueError, match="gradient is not finite"):
        prune(small_network(), small_data(), 0.5, "lr", loss_fn=loss_fn, samples=20, storage="mapped", scratch=tmp_path,
              recalibrate_batchnorm=False)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_of_the_run_that_would_follow() -> None:
    model = small_network()
    assert plan(model, small_data(), 0.9, samples=50, keep_rows=True).require().storage.kind == "mapped"
    with pytest.raises(ValueError, match="got None, and method 'lr' reads it"):
        plan(model, None, 0.9, "lr")
    with pytest.raises(ValueError, match="memory"):
        prune(model, small_data(), 0.9, "magnitude", memory="lots")


def test_a_plan_leaves_the_model_and_the_random_state() -> None:
    model = small_network()
    state, before = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    taken = plan(model, small_data(), 0.9, samples=50)
    assert taken.to_dict()["storage"] == "float32" and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert plan(model, small_data(), 0.9, "magnitude").forecasts == ()


@pytest.mark.parametrize("storage", but_long(["float32", "low-rank", "matrix-free"], short=2))
@pytest.mark.parametrize(
    ("sparsity", "most"),
    but_long([(0.1, 16), (0.9, 32)]),  # 0.9: rows of samples come in larger chunks
)
def test_no_more_samples_than_planned_run_at_once(
    storage: str, sparsity: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swap_prune.memory.planning._SPARING", ((16, "nothing"),))
    seen: dict[bool, int] = {False: 0, True: 0}

    class Watched(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen[torch.is_grad_enabled()] = max(seen[torch.is_grad_enabled()], len(x))
            return super().forward(x)

    model = Watched(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    report = prune(model, small_data(300), sparsity, "lr", samples=150, storage=storage, progress=False)
    assert report.settings["storage"]["at_once"] == 16
    assert 2 <= seen[True] <= most + 1 and seen[False] <= 33  # one sample left over joins the batch before it


@pytest.mark.long
def test_rows_are_of_sixteen_samples_however_few_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return super().forward(x)

    outcomes = []
    for spilled in ("nothing", "activations"):
        torch.manual_seed(0)
        model = Watched(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
        monkeypatch.setattr("swap_prune.memory.planning._SPARING", ((8, spilled),))
        report = prune(model, small_data(300), 0.5, "lr", samples=160, progress=False)
        assert report.settings["storage"]["at_once"] == 8 and max(sizes) == 16
        outcomes.append(report.stages[0].evidence["candidates"][0]["held_out_loss"])
        sizes.clear()
    assert outcomes[0] == pytest.approx(outcomes[1], rel=0.2), "the same rows; judged on batches of 16 and 8"


@pytest.mark.parametrize("method", ["lr", "obd"])
def test_a_network_that_draws_random_numbers_has_no_one_g(method: str) -> None:
    """Its rows can be held, but not made anew for each product."""

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.inner(x), 0.5, training=True)

    model = Random()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="'matrix-free' needs a network that gives the same values each time"):
        prune(model, small_data(), 0.5, method, samples=40, storage="matrix-free", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert prune(model, small_data(), 0.5, method, samples=40, storage="float32", progress=False).kept > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lr", "magnitude"])
def test_resnet50_goes_through(method: str) -> None:
    """25.5 million weights and 54 layers with a BatchNorm each; random weights and images."""
    torch.manual_seed(0)
    model, _ = build_model("resnet50")
    data = TensorDataset(torch.randn(24, 3, 64, 64), torch.randint(1000, (24,)))
    report = prune(model, data, 0.9, method, samples=16, memory="8GB", progress=False)
    assert report.total == 25_502_912 and report.kept == math.floor(report.total * (1 - 0.9))
    assert int(masks(model).sum()) == report.kept
    assert bool(model.eval()(torch.randn(2, 3, 64, 64)).isfinite().all())


def test_plan_takes_the_arguments_of_prune() -> None:
    def options(function: Any) -> dict[str, Any]:
        return {name: one.default for name, one in inspect.signature(function).parameters.items()}

    assert options(plan) == options(prune)
    data = small_data()
    chosen = {"sparsity": 0.5, "method": "lr", "samples": 20, "recalibration_data": data, "progress": False}
    forecast = plan(small_network(), data, **chosen, checkpoint="nowhere")
    assert forecast.chosen is not None and not Path("nowhere").exists()


def test_what_is_frozen_counts_as_what_is_trained():
    """Slopes of frozen weights are taken as well, and hold what lies between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4))
    data = TensorDataset(torch.randn(20, 3, 48, 48), torch.randint(4, (20,)))
    model(data[:2][0])
    needs = []
    for trained in (True, True, False):  # what the first one loads is held by the others
        model.requires_grad_(trained)
        needs.append(plan(model, data, 0.5, "obd", samples=16, memory="16GB").chosen.need)
        assert [p.requires_grad for p in model.parameters()] == [trained] * 6
    assert needs[2] == pytest.approx(needs[1], rel=0.05)
