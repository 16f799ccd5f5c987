"""The memory budget: what is read, what is forecast, what is taken, and whether the remedy fits."""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import swap_prune
from swap_prune import SquaredError, plan
from swap_prune import process_memory as process
from swap_prune.memory.planning import Workload, plan_memory
from swap_prune.process_memory import (
    held_memory,
    is_out_of_memory,
    memory_limit,
    parse_memory,
    peak_memory,
    reset_peak_memory,
    share_of_free_memory,
)
from swap_prune.request import check_request
from swap_prune.stages.workload import count_workload
from swap_prune.training.settings import FineTune

GB = 10**9
REST: dict[str, Any] = {
    "loss_fn": None,
    "targets": ("Linear",),
    "ignore": (),
    "schedule": "linear",
    "min_keep": 0.0,
    "pattern": None,
    "recalibrate_batchnorm": True,
    "finetune": None,
    "noise": None,
    "defence": None,
    "storage": "auto",
    "seed": 0,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5 gb", 1_500_000_000), (1024, 1024), ("2048", 2048), ("7B", 7)],
)
def test_amounts(text: str | int, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4QB", "0", "1e9", True, "4GB please"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="memory must be"):
        parse_memory(text)


def test_what_is_held_counts_and_the_default_lies_above_it() -> None:
    before = held_memory()
    ballast = torch.ones(2**25)
    assert held_memory() - before > 0.9 * 4 * len(ballast)
    limit = memory_limit(None)
    assert limit is not None and limit > held_memory() > 50 * 2**20, "torch alone is more"


def test_the_default_is_what_is_held_and_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.process_memory._free_memory", lambda device: 1000)
    monkeypatch.setattr("swap_prune.process_memory.held_memory", lambda device=None: 5000)
    assert memory_limit(None) == 5900 and memory_limit(None, 2) == 5450
    assert [share_of_free_memory(processes) for processes in (1, 2)] == [900, 450]


@pytest.mark.parametrize("storage", ["float32", "matrix-free"])
@pytest.mark.parametrize("calls", [*range(20), 25, 30, 40])
def test_without_memory_it_ends_with_what_to_do(calls: int, storage: str) -> None:
    """Wherever it runs out, in a loss as well: that is not a fault of the loss, and the network is as it was."""
    torch.manual_seed(0)
    model, left = nn.Linear(6, 3), calls
    before = model.weight.detach().clone()
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(8)]

    def loss(network: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            torch.empty(2**50)
        return nn.functional.cross_entropy(network(batch[0]), batch[1], reduction="none")

    with pytest.raises(MemoryError, match=r"not enough memory \(.*allocate memory.*\): say with memory= how much"):
        swap_prune.prune(model, data, 0.5, "lr", loss_fn=loss, stages=4, samples=40, storage=storage, progress=False)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shape '[3]' is invalid"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_says_that_there_was_no_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_data_that_find_no_memory_are_not_bad_data() -> None:
    class Large(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise MemoryError("of the data")

    data = Large(torch.randn(60, 6), torch.randint(3, (60,)))
    for loader in (data, DataLoader(data, batch_size=8), DataLoader(data, batch_size=8, num_workers=1)):
        with pytest.raises(MemoryError, match="there was not enough memory"):
            swap_prune.prune(nn.Linear(6, 3), loader, 0.5, "lr", samples=40, progress=False)


def load(n: int, p: int, method: str = "lr", keep: float = 0.1) -> Workload:
    return Workload(rows=n, samples=n, weights=p, kept=int(keep * p), method=method, held=300 * 2**20)


@pytest.mark.parametrize("storage", ["auto", "float32", "float16", "mapped", "matrix-free", "low-rank"])
@pytest.mark.parametrize(("p", "budget"), [(32_360, 2 * GB), (2_600_000, 4 * GB), (100, 2 * GB)])
def test_the_number_of_samples_that_is_offered_fits_and_few_more_do_not(p: int, budget: int, storage: str) -> None:
    refused = plan_memory(load(10**6, p), budget, storage)
    with pytest.raises(ValueError, match="use samples=") as caught:
        refused.require()
    fits = int(re.search(r"samples=(\d+)", str(caught.value))[1])
    plan_memory(load(fits, p), budget, storage).require()
    with pytest.raises(ValueError, match=r"memory allows|GB free"):
        plan_memory(load(int(fits / 0.9) + 2, p), budget, storage).require()


@pytest.mark.long
@pytest.mark.parametrize("method", ["lr", "ewr", "obd"])
def test_samples_that_are_offered_fit_when_they_are_asked_for(method: str) -> None:
    """Of fewer samples signs are drawn more often, and others are held out: rows are not in proportion."""
    model = nn.Sequential(nn.Linear(60, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 5))
    data = TensorDataset(torch.randn(2000, 60), torch.randint(5, (2000,)))

    def counted(samples: int) -> Workload:
        run = check_request(model, sparsity=0.9, method=method, stages=1, samples=samples, **REST | {"defence": "auto"})
        return count_workload(model, data, run, torch.device("cpu"))

    whole, offers = counted(1500), []
    for budget in range(whole.held + 10**7, whole.held + 10**9, 6 * 10**7):
        refused = plan_memory(whole, budget)
        if refused.chosen is None and (found := re.search(r"use samples=(\d+)", refused.why)):
            offers.append(int(found[1]))
            asked = replace(counted(offers[-1]), held=whole.held)  # not what other tests leave behind
            assert plan_memory(asked, budget).chosen is not None, (budget, offers[-1])
            assert ("which are few" in refused.why) == (offers[-1] < 100)
    assert len(offers) > 3 and min(offers) >= 16
    assert plan_memory(whole, whole.held // 2).why.endswith("are held already); give more than that")


def test_a_budget_is_shown_in_a_unit_that_people_read() -> None:
    work = replace(load(100, 10**6), held=0)
    assert "memory allows 300 bytes" in plan_memory(work, 300).why
    why = plan_memory(work, 3 * 10**6).why
    assert "memory allows 3 MB" in why and "give more memory" in why and "magnitude" in why


def test_double_precision_needs_twice_as_much() -> None:
    single = load(300, 2_600_000)
    assert plan_memory(single, 6 * GB, "float32").require().storage.kind == "float32"
    with pytest.raises(ValueError, match="needs about"):
        plan_memory(replace(single, itemsize=8), 6 * GB, "float32").require()


def test_less_memory_takes_the_next_storage_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine: where the disk is small, the file of 32 GB is passed over."""
    work = load(2000, 4_000_000, keep=0.5)
    disk = 100 * GB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    names = [plan_memory(work, budget * GB).require().name for budget in (100, 40, 20, 10)]
    assert names == ["float32", "float32 (no copies)", "float16", "mapped"]
    with pytest.raises(ValueError, match=r"do not fit: float32: .* mapped: "):
        plan_memory(work, 1 * GB).require()
    disk = 30 * GB
    taken = plan_memory(work, 10 * GB)
    assert taken.require().name == "matrix-free" and "its file needs 32.0 GB" in taken.why


def test_without_a_disk_nothing_is_held(tmp_path) -> None:
    work = replace(load(2000, 4_000_000, keep=0.5), row_numbers=40_000)
    taken = plan_memory(work, 10 * GB, scratch=tmp_path / "nowhere")
    assert taken.require().name == "matrix-free" and taken.require().disk == 0
    assert taken.why.count("memory allows") == 4 and "mapped: " in taken.why and "low-rank" not in taken.why


def group(folder: Path, limit: str, used: int, droppable: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used), f"anon 5\n{names[2]} {droppable}\n"), strict=True):
        (folder / ("memory.stat" if name == names[2] else name)).write_text(text)


def test_a_container_leaves_what_its_groups_leave(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    assert process._free_in_group(root, own) is None
    group(root / "outer" / "inner", "max", 9, 0, process._GROUP_2)
    assert process._free_in_group(root, own) is None
    group(root / "outer", str(10 * GB), 4 * GB, GB, process._GROUP_2)
    assert process._free_in_group(root, own) == 7 * GB, "pages of files can be dropped"
    group(root / "outer" / "inner", str(6 * GB), 5 * GB, 0, process._GROUP_2)
    assert process._free_in_group(root, own) == GB, "the tightest counts"
    own.write_text("0::/\n")
    assert process._free_in_group(root, own) is None, "not those of others"
    own.write_text("5:cpu,memory:/docker/x\n4:cpu:/\n1:name=systemd:/docker/x\n")
    group(root / "memory", str(2**63 - 4096), 9, 0, process._GROUP_1)
    group(root / "memory" / "docker" / "x", str(3 * GB), GB, 0, process._GROUP_1)
    assert process._free_in_group(root, own) == 2 * GB
    group(root / "memory" / "docker" / "x", str(3 * GB), 4 * GB, 0, process._GROUP_1)
    assert process._free_in_group(root, own) == 0
    own.write_bytes(b"\xff")
    assert process._free_in_group(root, own) is None


def test_what_the_machine_leaves_is_not_all_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a budget that a user gives cut down: it is then the user's word."""
    for group, own, expected in ((9 * GB, None, 9 * GB), (None, 8 * GB, 8 * GB), (None, None, 10 * GB)):
        with monkeypatch.context() as patch:
            patch.setattr(process, "_free_on_machine", lambda: 10 * GB)
            patch.setattr(process, "_free_in_group", lambda group=group: group)
            patch.setattr(process, "_free_to_process", lambda own=own: own)
            assert process._free_memory(None) == expected
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (held + GB // 2, most))
    assert GB // 4 < (process._free_memory(None) or 0) < 3 * GB // 4
    assert memory_limit("20GB") == 20 * GB


def test_an_approximation_is_taken_only_where_it_is_asked_for(tmp_path) -> None:
    work = replace(load(500, 20_000_000, keep=0.5), row_numbers=20_000)
    needs = {f.name: f.need for f in plan_memory(work, None).forecasts}
    assert needs["low-rank"] < needs["matrix-free"]
    budget = (needs["low-rank"] + needs["matrix-free"]) // 2
    auto = plan_memory(work, budget, scratch=tmp_path / "nowhere")
    assert auto.chosen is None and "or storage='low-rank', which fits" in auto.why
    assert plan_memory(work, budget, "low-rank").require().name == "low-rank"
    assert "low-rank" not in plan_memory(work, budget // 100, scratch=tmp_path / "nowhere").why
    unsuited = replace(work, unsuited="'a' is an embedding")
    with pytest.raises(ValueError, match=r"'a' is an embedding; use another storage"):
        plan_memory(unsuited, None, "low-rank").require()


def test_what_is_forecast_for_factors_and_for_nothing() -> None:
    """Factors grow with n times what a row takes; without G, memory grows with p, and not with n times p."""

    def need(n: int, p: int, storage: str) -> int:
        return plan_memory(replace(load(n, p), row_numbers=p // 50), None, storage).require().need

    p = 20_000_000
    more = (need(400, p, "low-rank") - need(200, p, "low-rank")) / (200 * (p // 50) * 4)
    assert 0.9 < more < 2.1, "once, or twice where its parts are put together"
    assert need(400, p, "matrix-free") - need(200, p, "matrix-free") < 0.01 * 200 * p * 4
    assert need(200, 2 * p, "matrix-free") < 2 * need(200, p, "matrix-free") < 200 * p * 4


def test_no_known_limit_takes_the_fastest() -> None:
    assert plan_memory(load(10**5, 10**7), None).require().name == "float32"


def test_noise_on_gradients_is_not_to_be_had_in_another_storage() -> None:
    noisy = replace(load(2000, 4_000_000), row_noise=True)
    with pytest.raises(ValueError, match="noise on gradients needs them in float32"):
        plan_memory(noisy, 100 * GB, "float16").require()
    assert plan_memory(noisy, 100 * GB).require().storage.kind == "float32"


def test_a_file_that_the_disk_has_no_room_for_is_not_planned(tmp_path) -> None:
    plan = plan_memory(load(10**5, 10**8), 10**13, "mapped", tmp_path)
    assert plan.chosen is None and "GB free" in plan.why
    assert "cannot be used" in plan_memory(load(10, 100), 10 * GB, "mapped", tmp_path / "nowhere").why


@pytest.mark.parametrize("storage", ["float64", "", "FLOAT32"])
def test_a_storage_that_does_not_exist_is_refused(storage: str) -> None:
    with pytest.raises(ValueError, match="storage must be one of"):
        plan_memory(load(10, 100), None, storage)


def test_more_memory_is_not_the_remedy_where_memory_is_not_short() -> None:
    load = Workload(rows=10, samples=10, weights=1000, kept=100, method="lr")
    plan = plan_memory(load, 10**12, "mapped", "/no/such/directory")
    with pytest.raises(ValueError, match="name another scratch") as caught:
        plan.require()
    assert "memory" not in str(caught.value) and "samples" not in str(caught.value)


def test_fewer_samples_run_at_once_where_that_makes_it_fit() -> None:
    """What ResNet50 keeps of an image, and 256 of them as sixteen rows of mini-batches."""
    work = Workload(
        rows=16, samples=256, weights=25_500_000, kept=2_550_000, method="lr", kept_bytes=88 * 10**6,
        largest_bytes=3_200_000, in_batches=True, held=500 * 2**20, row_numbers=1_300_000,
    )  # fmt: skip
    plans = {budget: plan_memory(work, budget * GB, "low-rank") for budget in (100, 8, 5)}
    assert [plan.require().storage.at_once for plan in plans.values()] == [64, 32, 16]
    assert all(plan.require().need <= budget * GB for budget, plan in plans.items())
    assert plan_memory(work, None, "low-rank").require().storage.at_once == 64
    refused = plan_memory(work, 3 * GB, "low-rank")
    assert refused.chosen is None and refused.forecasts[0].storage.at_once == 16


def test_a_gpu_with_room_takes_large_chunks_before_anything_is_spared() -> None:
    """ResNet50, a row an image: as many images as fit in 32 GB, else as in 4 GB, with 64 samples at once in both."""
    work = Workload(
        rows=256, samples=256, weights=25_500_000, kept=2_550_000, method="lr", kept_bytes=160 * 10**6,
        largest_bytes=3_200_000, held=500 * 2**20, device=torch.device("cuda"),
    )  # fmt: skip
    found = [plan_memory(work, budget * GB, "bfloat16").require() for budget in (200, 40, 24)]
    assert [(one.storage.roomy, one.storage.at_once) for one in found] == [(True, 64), (False, 64), (False, 32)]
    assert all(one.need <= budget * GB for one, budget in zip(found, (200, 40, 24), strict=True))
    assert not plan_memory(work, None, "matrix-free").require().storage.roomy, "it holds no rows"
    assert not plan_memory(replace(work, device=torch.device("cpu")), None, "bfloat16").require().storage.roomy


def test_slopes_under_noise_hold_the_gradients_of_all_mini_batches() -> None:
    work = Workload(rows=60, samples=960, weights=10**6, kept=10**5, method="lr", in_batches=True)
    quiet, noisy = (
        plan_memory(replace(work, row_noise=noise), None, "float32").require().phases for noise in (False, True)
    )
    assert noisy["trials"] - quiet["trials"] == (61 - 15) * 4 * 10**6


@pytest.mark.usefixtures("nothing_held")
def test_fine_tuning_is_a_phase_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3000, 2000), nn.ReLU(), nn.Linear(2000, 2))
    data = TensorDataset(torch.randn(100, 3000), torch.randint(2, (100,)))
    size, sample = 4 * (3000 * 2000 + 2000 + 4000 + 2), 4 * 3000 + 8

    def phases(**given: Any) -> dict[str, int]:
        return plan(model, data, 0.5, "lr", samples=50, **given).require().phases

    plain, sgd, adam, large = (
        phases(finetune=training)
        for training in (None, FineTune(), FineTune(optimizer="adamw"), FineTune(batch_size=1128))
    )
    assert "finetune" not in plain
    assert sgd["capture"] - plain["capture"] == 2 * size, "to restore and to learn from"
    beside = 2 * 4 * 3000 * 2000 + 2 * (3000 * 2000 + 4000)  # temporaries of the optimiser and masks
    assert 0 <= sgd["finetune"] - sgd["recalibrate"] - 2 * size - 128 * 2 * sample - beside < 10**7, "and what it keeps"
    assert adam["finetune"] - sgd["finetune"] == size
    assert large["finetune"] - sgd["finetune"] > 1000 * 2 * sample
    refused = plan(model, data, 0.5, "lr", samples=50, memory=plain["trials"], finetune=FineTune(batch_size=10**6))
    assert refused.chosen is None and re.search(r"lower its batch_size \(now 1000000\), or give more", refused.why)


def test_what_a_pass_holds_is_bounded_by_what_is_kept() -> None:
    """And by its largest tensor: where there are many small ones by eight of it, where it is most of all by four."""
    shallow = replace(load(300, 10_000), kept_bytes=10**6)

    def held(largest: int) -> int:
        return plan_memory(replace(shallow, largest_bytes=largest), None).require().phases["trials"]

    assert held(0) - held(10**4) == 64 * (2 * 10**6 - 1_080_000)
    assert held(10**5) - held(10**4) == 64 * (1_800_000 - 1_080_000)
    assert held(6 * 10**5) - held(0) == 64 * (3_400_000 - 2 * 10**6), "an image after a first convolution"


def test_peak_memory_is_that_since_the_reset() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("only Linux forgets a peak")
    block = mmap.mmap(-1, 160_000_000)  # what malloc gives may come from the heap, and stay there
    for _ in range(160):
        block.write(bytes(1_000_000))
    reset_peak_memory()
    high = peak_memory()
    block.close()
    reset_peak_memory()
    assert peak_memory() < high - 100_000_000


def test_samples_are_counted() -> None:
    """All that are fitted; those that BatchNorm is recalibrated with by a few batches of 128."""
    load = Workload(rows=60, samples=1000, weights=10_000, kept=1000, method="lr")
    without = plan_memory(load, None).require().phases
    counted = replace(load, sample_bytes=600_000, spare=200, recalibrated=10_000)
    phases = plan_memory(counted, None).require().phases
    assert {name: phases[name] - without[name] for name in phases} == {
        "capture": 1200 * 600_000,
        "defend": 1200 * 600_000,
        "solve": 1200 * 600_000,
        "trials": 1200 * 600_000 + (19 - 16) * 4 * 10_000,  # and slopes of all of them, a vector a batch
        "recalibrate": 512 * 600_000,
    }
    few = plan_memory(replace(counted, recalibrated=90), None).require().phases
    assert few["recalibrate"] - without["recalibrate"] == 90 * 600_000


@pytest.mark.parametrize(
    ("method", "stages", "samples", "fitted", "spare"),
    [
        ("lr", 1, 80, 80, 20),
        ("lr", 1, 40, 40, 40),
        ("lr", 1, 500, 80, 20),
        ("obd", 1, 500, 100, 0),
        ("lr", "auto", 30, 30, 50),
    ],
)
def test_samples_held_out_are_of_those_that_there_are(
    method: str, stages: Any, samples: int, fitted: int, spare: int
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    data = TensorDataset(torch.randn(100, 6), torch.randint(2, (100,)))
    run = check_request(model, sparsity=0.5, method=method, stages=stages, samples=samples, **REST)
    load = count_workload(model, data, run, torch.device("cpu"))
    assert (load.samples, load.spare + load.judged) == (fitted, spare)


@pytest.mark.parametrize(
    ("asked", "samples", "size"), [(16, 1024, 16), (1000, 1024, 80), (1000, 50, 50), (64, 1024, 64)]
)
def test_a_mini_batch_has_no_more_samples_than_are_fitted(asked: int, samples: int, size: int) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    data = TensorDataset(torch.randn(100, 6), torch.randint(2, (100,)))
    method = swap_prune.LR(mini_batch=asked)
    run = check_request(model, sparsity=0.5, method=method, stages=1, samples=samples, **REST)
    load = count_workload(model, data, run, torch.device("cpu"))
    assert load.mini_batch == size and load.rows == -(-min(samples, 80) // size)


def test_outputs_are_counted_where_they_are_held() -> None:
    """Signs of the sketch, one for each output, and the dense network's outputs, for those held out twice."""
    load = Workload(rows=60, samples=1000, weights=10_000, kept=1000, method="lr", spare=200)
    without, single, joined = (
        plan_memory(one, None).require().phases
        for one in (load, replace(load, output_bytes=10**6), replace(load, output_bytes=10**6, in_batches=True))
    )
    compared = 8 * 10**6  # a sample that runs forwards
    assert single["capture"] - without["capture"] == pytest.approx(1000 * 10**6 + 128 * compared, rel=0.05)
    slopes = 19 * 4 * 10_000  # of all batches: not there while outputs are compared
    assert single["trials"] - without["trials"] == 1400 * 10**6 + 128 * compared - slopes
    assert joined["capture"] <= without["capture"] + 16 * compared and single["solve"] == without["solve"]
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2000))
    data = TensorDataset(torch.randn(100, 6), torch.randint(2, (100,)))
    run = check_request(model, sparsity=0.5, method="lr", stages=1, samples=80, **REST)
    assert count_workload(model, data, run, torch.device("cpu")).output_bytes == 2000 * 4
    plain = check_request(
        model, sparsity=0.5, method="magnitude", stages=1, samples=80, **REST | {"loss_fn": lambda net, b: b}
    )
    assert count_workload(model, data, plain, torch.device("cpu")).output_bytes == 0, "a function knows of no outputs"


@pytest.mark.parametrize("loss", [None, SquaredError(), lambda net, batch: net(batch[0]).square().sum(1)])
def test_gradients_that_are_averaged_together_count_whatever_the_loss(loss: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    data = TensorDataset(torch.randn(100, 6), torch.randint(2, (100,)) if loss is None else torch.randn(100, 2))
    counted = [
        count_workload(
            model,
            data,
            check_request(model, sparsity=0.5, method="lr", stages=1, samples=80, **changed),
            torch.device("cpu"),
        )
        for changed in (REST | {"loss_fn": loss, "defence": defence} for defence in ("trimmed-mean", "labels"))
    ]
    assert [load.slopes_held for load in counted] == [True, False]
    assert [load.doubted for load in counted] == [False, loss is None]


@pytest.mark.usefixtures("nothing_held")
def test_a_run_knows_the_bytes_of_its_samples() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    data = TensorDataset(torch.randn(90, 3, 8, 8), torch.randint(2, (90,)))
    own = 3 * 8 * 8 * 4 + 8
    recalibrated, as_it_is = (
        plan(model, data, 0.5, "lr", samples=64, recalibrate_batchnorm=chosen).require().phases
        for chosen in (True, False)
    )
    assert 0 <= recalibrated["recalibrate"] - as_it_is["recalibrate"] - 90 * own < 10**5
