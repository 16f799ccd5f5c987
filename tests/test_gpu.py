"""On a CUDA device: what is computed there is what a CPU computes, the same bits each time, in the GPU's own memory.

Run by ``pytest -m gpu``.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune import METHODS, FineTune, PruningReport, SelfDistillation, plan, prune
from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.zoo import build_model
from swap_prune.fisher.backends.half import HalfFactor, _operations, cut_and_weigh, split_in_pieces
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.capture.sketch import sketch_curvature
from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.fisher.storage import Storage
from swap_prune.losses import cross_entropy
from swap_prune.network.modes import exact_kernels
from swap_prune.process_memory import held_memory, memory_limit, peak_memory, reset_peak_memory
from swap_prune.regression.iht import solve_sparse
from swap_prune.regression.metric import diagonal_metric
from swap_prune.regression.objective import WeightedRidge
from swap_prune.regression.swap import swap_weights
from swap_prune.regression.top_k import top_k
from swap_prune.selection import select_parameters
from tests.cases import generator, normal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
STORAGES = ("float32", "bfloat16", "float16", "mapped", "low-rank", "matrix-free")
NOISES = (
    "gradient:std=4,fraction=0.25",
    "input:kind=gaussian,severity=3",
    "input:kind=blur,severity=3",
    "input:kind=occlusion,severity=3",
    "labels:fraction=0.25",
    "analog:programming=0.05,read=0.05,stuck_off=0.01",
    "adversarial:attack=pgd",
    "poison:fraction=0.1,strength=100",
)


def data(count: int = 160, seed: int = 0) -> TensorDataset:
    """Images whose class is the quarter that is bright."""
    state = generator(seed)
    images, labels = torch.randn(count, 3, 16, 16, generator=state), torch.randint(4, (count,), generator=state)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 8 * (label // 2), 8 * (label % 2)
        image[:, top : top + 8, left : left + 8] += 1.0
    return TensorDataset(images, labels)


def network() -> nn.Module:
    """A trained network with convolutions, BatchNorm and a Linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=4, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 4),
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    images, labels = data(512, seed=1).tensors
    for _ in range(8):
        for x, y in zip(images.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return network()


def pruned(trained: nn.Module, **options: Any) -> tuple[nn.Module, PruningReport]:
    model = copy.deepcopy(trained)
    settings: dict[str, Any] = {"sparsity": 0.8, "samples": 96, "device": CUDA} | options
    return model, prune(model, data(), progress=False, **settings)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters() if p.ndim >= 2])


def check(trained: nn.Module, *, agree: float = 0.97, **options: Any) -> PruningReport:
    """Prune on the GPU, twice, and on the CPU."""
    model, report = pruned(trained, **options)
    again, _ = pruned(trained, **options)
    assert next(model.parameters()).device.type == "cuda" and report.settings["device"].startswith("cuda")
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), f"{name}: not the same bits"
    other, expected = pruned(trained, **options | {"device": "cpu"})
    assert (report.kept, report.total) == (expected.kept, expected.total)
    assert int((flat(model) == 0).sum()) == report.total - report.kept
    same = float(((flat(model) == 0) == (flat(other) == 0)).float().mean())
    test = data(400, seed=2)
    here, there = evaluate(model, test).accuracy, evaluate(other, test).accuracy
    assert same >= agree and abs(here - there) <= 3, (same, here, there, chosen(report), chosen(expected))
    return report


def chosen(report: PruningReport) -> list[dict[str, Any]]:
    """What held-out samples chose in each stage: rounding alone may lead to another choice, and to another mask."""
    names = ("metric", "damping", "floor", "swaps", "first_order")
    return [{name: stage.evidence.get(name) for name in names} for stage in report.stages]


@pytest.mark.parametrize("method", METHODS)
def test_methods(trained: nn.Module, method: str) -> None:
    check(trained, method=method, stages=2)


@pytest.mark.parametrize("storage", STORAGES)
def test_storages(trained: nn.Module, storage: str) -> None:
    check(trained, method="lr", storage=storage)


@pytest.mark.parametrize("noise", NOISES)
def test_noises(trained: nn.Module, noise: str) -> None:
    check(trained, method="lr", noise=noise, agree=0.9)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lr", "recalibrate_batchnorm": False},
        {"method": "ewr", "loss_fn": lambda model, batch: cross_entropy(model, batch)},
        {"method": "magnitude", "finetune": FineTune(epochs=1)},
        {"method": "lr", "pattern": "2:4", "sparsity": 0.5, "ignore": ["0"], "stages": 2},
        {"method": "sparsegpt", "pattern": "1:4", "sparsity": 0.8, "ignore": ["0"]},
    ],
    ids=["as it is", "empirical", "fine-tuned", "2:4", "1:4"],
)
def test_options(trained: nn.Module, options: dict[str, Any]) -> None:
    check(trained, **options)


def test_stages_are_found(trained: nn.Module) -> None:
    """How many, is a choice that rounding may turn: on a CPU, weights moved by 1e-6 leave masks that agree for 94 %."""
    check(trained, method="lr", stages="auto", min_keep=0.05, agree=0.9)


def test_kept_rows_are_found_again(trained: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "lr", "scratch": tmp_path, "keep_rows": True}
    model, report = pruned(trained, **options)
    again, other = pruned(trained, **options)
    assert "rows_reused" not in report.stages[0].evidence and other.stages[0].evidence["rows_reused"]
    assert torch.equal(flat(model), flat(again))


def test_a_transformer_with_a_distillation_loss() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.Sequential(nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).cuda()
    tokens = torch.randint(50, (64, 12), generator=generator(), device="cpu").cuda()
    loss = SelfDistillation(embed=lambda model, tokens: model(tokens).mean(1))
    batches = loss.label(model, tokens.split(16))
    again = copy.deepcopy(model)
    for network in (model, again):
        report = prune(network, batches, 0.5, "lr", loss_fn=loss, samples=48, progress=False)
        assert report.kept == report.total // 2
    assert all(map(torch.equal, model.parameters(), again.parameters())), "not the same bits"


def test_memory_is_that_of_the_gpu(trained: nn.Module) -> None:
    held, limit = held_memory(CUDA), memory_limit(None, 1, CUDA)
    assert limit is not None and held < limit <= torch.cuda.get_device_properties(CUDA).total_memory
    ballast = torch.zeros(50_000_000, device=CUDA)
    assert held_memory(CUDA) - held == ballast.nbytes
    with pytest.raises(ValueError, match=r"memory allows 0\.001 GB"):
        prune(copy.deepcopy(trained), data(), 0.8, "lr", device=CUDA, memory="1MB", progress=False)


@pytest.mark.parametrize("storage", STORAGES)
def test_memory_stays_below_its_forecast(storage: str) -> None:
    """Two million weights, so that what is held by the run is far more than what is added for libraries."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 1500), nn.ReLU(), nn.Linear(1500, 500), nn.Linear(500, 4))
    options: dict[str, Any] = {"samples": 128, "storage": storage, "device": CUDA}
    forecast = plan(model, data(), 0.8, "lr", **options).require()
    reset_peak_memory(CUDA)
    prune(model, data(), 0.8, "lr", progress=False, **options)
    assert peak_memory(CUDA) <= forecast.need
    assert forecast.need <= 6 * peak_memory(CUDA)


def test_kernels_compute_in_full_float32() -> None:
    a, b = normal(64, 64, 3, 3).float().cuda(), normal(8, 64, 16, 16).float().cuda()
    expected = nn.functional.conv2d(b.double(), a.double())
    with exact_kernels(CUDA):
        off = (nn.functional.conv2d(b, a) - expected).norm() / expected.norm()
    assert off < 2e-6


@pytest.mark.parametrize("in_batches", [False, True])
def test_rows(trained: nn.Module, in_batches: bool) -> None:
    """Per-sample rows of each back end and rows of mini-batches, on both devices."""
    selection = select_parameters(trained)
    images, labels = data(48).tensors
    smooth = nn.Sequential(*[nn.SiLU() if isinstance(layer, nn.ReLU) else layer for layer in copy.deepcopy(trained)])
    here, there = copy.deepcopy(smooth).to(CUDA), smooth  # an activation near a kink may fall on either side of it
    with exact_kernels(CUDA):
        if in_batches:
            found, expected = (
                sketch_curvature(model, selection, [batch], cross_entropy, generator(3), in_batches=True).factor
                for model, batch in ((here, (images.cuda(), labels.cuda())), (there, (images, labels)))
            )
            every = torch.arange(selection.total)
            compare(found.columns(every.cuda()), expected.columns(every))
            return
        expected = capture_gradients(there, selection, [(images, labels)], cross_entropy).factor
        for backend in ("hooks", "vmap", "loop"):
            found = capture_gradients(
                here, selection, [(images.cuda(), labels.cuda())], cross_entropy, backend=backend
            ).factor
            compare(found.matrix, expected.matrix)
        for kind in ("bfloat16", "float16"):
            half = capture_gradients(
                here, selection, [(images.cuda(), labels.cuda())], cross_entropy, storage=Storage(kind)
            ).factor
            compare(half.columns(torch.arange(selection.total, device=CUDA)), expected.matrix, 2.0**-7)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.mix = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.steps(x)[0]).mean(1))


def test_rows_of_recurrent_layers_and_attention() -> None:
    torch.manual_seed(0)
    model = Sequences()
    selection = select_parameters(model, ("LSTM", "MultiheadAttention", "Linear"))
    batch = torch.randn(24, 10, 8, generator=generator(1)), torch.arange(24) % 3
    with exact_kernels(CUDA):
        expected = capture_gradients(model, selection, [batch], cross_entropy)
        there = copy.deepcopy(model).to(CUDA)
        found = capture_gradients(there, selection, [(batch[0].cuda(), batch[1].cuda())], cross_entropy)
    assert found.backend == expected.backend == "hooks"
    compare(found.factor.matrix, expected.factor.matrix)


def test_weights_that_cudnn_moves_are_given_back() -> None:
    """It puts those of a recurrent layer into one piece of memory, whenever they are not."""
    torch.manual_seed(0)
    model, data = Sequences().to(CUDA), TensorDataset(torch.randn(120, 10, 8), torch.arange(120) % 3)
    before = copy.deepcopy(model.state_dict())
    settings: dict[str, Any] = {"samples": 48, "targets": ("LSTM", "Linear"), "progress": False}
    calls = 0

    def failing(network: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += bool((network.steps.weight_hh_l0 == 0).any())
        if calls > 20:
            raise RuntimeError("late")
        return cross_entropy(network, batch)

    with pytest.raises(ValueError, match="late"):
        prune(model, data, 0.8, "lr", stages=3, loss_fn=failing, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = prune(model, data, 0.8, "lr", stages="auto", **settings)
    kept = sum(int(model.get_parameter(name).count_nonzero()) for name in report.layers)
    assert kept == report.kept


def test_rows_of_words() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 6), nn.Flatten(), nn.Linear(60, 3))
    selection = select_parameters(model, ("Embedding", "Linear"))
    batch = torch.randint(50, (24, 10), generator=generator(1)), torch.arange(24) % 3
    with exact_kernels(CUDA):
        expected = capture_gradients(model, selection, [batch], cross_entropy)
        there, batches = copy.deepcopy(model).to(CUDA), [(batch[0].cuda(), batch[1].cuda())]
        found, again = (capture_gradients(there, selection, batches, cross_entropy) for _ in range(2))
    assert found.backend == "hooks" and torch.equal(found.factor.matrix, again.factor.matrix)
    compare(found.factor.matrix, expected.factor.matrix)


def compare(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    off = (found.cpu().double() - expected.double()).norm() / expected.double().norm()
    assert off <= tolerance, f"relative error {float(off):.2e}"


@pytest.mark.parametrize(("n", "p"), [(1, 5), (7, 20), (64, 3 * 8192), (100, 300_001)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision(n: int, p: int, dtype: torch.dtype) -> None:
    """Vectors are multiplied as float32: nothing is lost beyond what the storage has lost."""
    G = (normal(n, p) * torch.logspace(-3, 2, n).unsqueeze(1)).float()
    there = HalfFactor.of(G, dtype)
    here = HalfFactor(there.stored.to(CUDA), there.scale.to(CUDA))
    exact = DenseFactor(there.columns(torch.arange(p)).double())
    w, v = normal(p, seed=1) * torch.logspace(-3, 3, p), normal(n, seed=2)
    scale = normal(p, seed=3) * 1e3 * (torch.arange(p) % 7 == 1)
    compare(here.matvec(w.float().cuda()), exact.matvec(w), 3e-6)
    compare(here.rmatvec(v.float().cuda()), exact.rmatvec(v), 3e-6)
    compare(here.gram(scale.float().cuda()), exact.gram(scale), 2e-5)
    compare(here.diagonal(), exact.diagonal(), 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "p", "m"), [(1, 64, 64), (2, 9, 0), (3, 9, 1), (7, 1000, 257), (130, 5000, 3008)])
def test_kernels_do_what_torch_does(n: int, p: int, m: int, dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("swap_prune.fisher.backends.kernels", reason="needs Triton", exc_type=ImportError)
    stored, weights = normal(n, p).to(CUDA, dtype), normal(m, seed=1).float().cuda()
    index = torch.randperm(p, generator=generator())[:m].sort().values.cuda()
    (part, found), (same, expected) = (cut(stored, index, weights) for cut in (kernels.cut_and_weigh, cut_and_weigh))
    assert torch.equal(part, same) and torch.equal(part, kernels.cut(stored, index))
    mixed = index[torch.randperm(m, generator=generator(2)).cuda()]
    assert torch.equal(kernels.cut(stored, mixed), stored[:, mixed])
    (first, lost_of_first, others, lost_of_others), torchs = halves(found), halves(expected)
    assert torch.equal(first, torchs[0]) and torch.equal(others, torchs[2]), "rounded alike"
    product = part.double() * weights.double()
    sums = torch.cat([first.double() - lost_of_first.double(), others.double() - lost_of_others.double()])
    limits = torch.finfo(dtype)
    allowed = limits.eps**2 / 2 * product.abs() + limits.smallest_normal * limits.eps
    assert bool(((sums - product).abs() <= 1.01 * allowed).all())
    pieces, alike = stored.new_empty(2, 4, m).unbind()
    kernels.split_in_pieces(weights, pieces)
    split_in_pieces(weights, alike)
    assert torch.equal(pieces, alike)


def halves(both: torch.Tensor) -> list[torch.Tensor]:
    """What is written of the first half of the rows, and of the others: what is rounded, and what that loses, each."""
    n = len(both) // 2
    return list(both.split([n // 2, n // 2, n - n // 2, n - n // 2]))


def test_kernels_are_used() -> None:
    """A probe that no compiler passes once left everything to torch's operations, in silence."""
    kernels = pytest.importorskip("swap_prune.fisher.backends.kernels", reason="needs Triton", exc_type=ImportError)
    for dtype in (torch.bfloat16, torch.float16):
        assert _operations(CUDA, dtype) == (kernels.cut, kernels.cut_and_weigh, kernels.split_in_pieces)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_a_solve(storage: str) -> None:
    """The same support, but for near ties, and the same objective."""
    G = normal(200, 20_000).float() * torch.logspace(-2, 1, 20_000)[torch.randperm(20_000, generator=generator())]
    w = normal(20_000, seed=1).float()
    values, supports = [], []
    for device in ("cpu", "cuda"):
        dtype = getattr(torch, storage)
        factor: FisherFactor = DenseFactor(G.to(device))
        if storage != "float32":
            half = HalfFactor.of(G, dtype)
            factor = HalfFactor(half.stored.to(device), half.scale.to(device))
        metric = diagonal_metric(factor.diagonal(), 1.0)
        problem = WeightedRidge(factor, factor.matvec(w.to(device)), w.to(device), 0.025, metric)
        fit = swap_weights(problem, solve_sparse(problem, 2000))
        values.append(fit.value)
        supports.append(set(fit.support.tolist()))
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    assert len(supports[0] & supports[1]) > 0.98 * 2000


@pytest.mark.parametrize("count", [10, 1_000_000])
def test_the_largest_with_ties(count: int) -> None:
    scores = torch.randint(50, (count,), generator=generator()).float()
    assert torch.equal(top_k(scores.cuda(), count // 3).cpu(), top_k(scores, count // 3))


def test_zoo_networks_go_through() -> None:
    for name, size in (("resnet20", 32), ("mobilenetv1", 64)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, _ = build_model(name)
        images = torch.randn(80, 3, size, size, generator=generator())
        labels = torch.randint(10, (80,), generator=generator())
        report = prune(model, TensorDataset(images, labels), 0.5, samples=64, device=CUDA, progress=False)
        assert report.kept == report.total // 2


def test_command_line(tmp_path: Path) -> None:
    def call(*arguments: str) -> dict[str, Any]:
        run = [sys.executable, "-m", *arguments, "--device", "cuda", "--json"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    named = ("--model", "tests.tiny:network", "--data", "tests.tiny:data")
    single = call("swap_prune", "prune", *named, "--sparsity", "0.5", "--method", "lr", "--out", str(tmp_path / "a"))
    launcher = ("torch.distributed.run", "--nproc-per-node", "1", "-m", "swap_prune", "prune", *named)
    shared = call(*launcher, "--sparsity", "0.5", "--method", "lr", "--out", str(tmp_path / "b"))
    assert shared["kept"] == single["kept"]
    assert json.loads((tmp_path / "b" / "report.json").read_text())["settings"]["storage"]["used"] == "sharded"
    measured = call("swap_prune", "eval", *named, "--pruned", str(tmp_path / "a"))
    assert measured["sparsity"] == single["sparsity"]
