"""G shared out to processes: the products of a dense G, the same bits for every number of processes, and failures.

One set of four processes goes through what takes long: as a group of four, as groups of two and of one, and groups in
which one of two processes is waited for. Two processes go through the rest, in which one of them fails or differs.
What they found is on disk, and looked at by the tests.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swap_prune import FineTune, distributed, pipeline, plan, prune
from swap_prune.distributed import PARTS, Team, local_count, own_device, team_of
from swap_prune.fisher.backends.sharded import ShardedFactor, owned_columns
from swap_prune.fisher.capture import rows as capture
from swap_prune.fisher.factor import DenseFactor
from swap_prune.fisher.storage import Storage
from swap_prune.losses import cross_entropy
from swap_prune.network.aliasing import unexpanded
from swap_prune.stages.runner import StageRunner
from tests.test_pipeline import small_data, small_network

SIZES = (1, 2, 4)
PATIENCE = 4.0  # seconds, for another process
SOON = ("error", "samples", "seed", "memory", "disk", "plan", "room", "early", "end", "losses", "alone", "itself")
SOON += ("loss",)  # the last, for it ends one of the processes
LATE = ("wrapped", "kept", "absent", "silence")
RUNS: dict[str, dict[str, Any]] = {
    "lr": {"method": "lr", "stages": 2},
    "ewr": {"method": "ewr", "sparsity": 0.9, "finetune": FineTune(epochs=1)},
    "empirical": {"method": "ewr", "loss_fn": lambda net, batch: cross_entropy(net, batch)},
    "obd": {"method": "obd", "sparsity": 0.5},
    "cbs": {"method": "cbs"},
    "woodfisher": {"method": "woodfisher"},
    "chita": {"method": "chita"},
}


class Opaque:
    """A batch that only its loss can take apart, among others that are cut to samples."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.parts = inputs, labels

    @staticmethod
    def losses(net: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(net, batch.parts if isinstance(batch, Opaque) else batch)


def in_group(name: str, rank: int, size: int, folder: Path, work: Callable[[], Any]) -> Any:
    """Do some work in a process group of its own."""
    limit = timedelta(seconds=1.5 * PATIENCE if name == "absent" else 300)
    dist.init_process_group("gloo", f"file://{folder / name}", limit, rank=rank, world_size=size)
    dist.barrier()  # who leaves before the others have come takes the file away
    try:
        return work()
    finally:
        dist.destroy_process_group()


def products(p: int) -> dict[str, torch.Tensor]:
    """Ask a shared G all that a solver may ask, and compare with a dense one."""
    generator = torch.Generator().manual_seed(p)
    matrix = torch.randn(11, p, generator=generator)
    w, v = torch.randn(p, generator=generator), torch.randn(11, generator=generator)
    index = torch.randperm(p, generator=generator)[: max(1, p // 2)]
    few, scale = torch.tensor([7, 0, 0, 3]), torch.randn(p, generator=generator).relu()
    with team_of(torch.device("cpu")) as team:
        blocks = tuple(DenseFactor(matrix[:, a:b].contiguous(), 3) for a, b in owned_columns(p, team))
        shared = ShardedFactor(blocks, (11, p), team, 3, matrix[:0, 0])
        found = {}
        for name, factor in (("dense", DenseFactor(matrix)), ("shared", shared)):
            part = factor.rows(few)
            found[name] = {
                "matvec": factor.matvec(w),
                "rmatvec": factor.rmatvec(v),
                "diagonal": factor.diagonal(),
                "columns": factor.columns(index),
                "gram": factor.gram(scale),
                "leading": factor.row_span(1, 4),
                "rows": part.matvec(w),
                "gram of rows": part.gram(scale),
            }
        for name, expected in found["dense"].items():
            torch.testing.assert_close(found["shared"][name], expected, rtol=1e-5, atol=1e-5)
        return found["shared"]


def resumed(folder: Path) -> dict[str, Any]:
    """Prune as the run "lr" does, interrupted after its first stage."""
    own = StageRunner.run

    def first_only(runner: StageRunner, *arguments: Any, **options: Any) -> Any:
        if arguments[2] == 2:
            raise RuntimeError("interrupted")
        return own(runner, *arguments, **options)

    arguments: dict[str, Any] = {"sparsity": 0.7, "samples": 40, "progress": False, "checkpoint": folder, **RUNS["lr"]}
    StageRunner.run = first_only  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="interrupted"):
            prune(small_network(), small_data(), **arguments)
    finally:
        StageRunner.run = own  # type: ignore[method-assign]
    model = small_network()
    prune(model, small_data(), **arguments)
    return {key: value.clone() for key, value in model.state_dict().items()}


def pruned(folder: Path) -> dict[str, Any]:
    """Prune with several methods; one of them goes on from a checkpoint in a folder."""
    found: dict[str, Any] = {f"products {p}": products(p) for p in (3, 64, 333)}
    for name, settings in RUNS.items():
        model = small_network()
        if name == "obd":
            model.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
        arguments = {"sparsity": 0.7, "samples": 40, "progress": False, **settings}
        report = prune(model, small_data(), **arguments)
        assert report.settings["storage"] == {
            "asked": "auto",
            "used": "sharded",
            "lean": True,
            "at_once": 64,
            "roomy": False,
            "spilled": "nothing",
            "compares_rows": True,
        }
        found[name] = {key: value.clone() for key, value in model.state_dict().items()}
    found["resumed"] = resumed(folder)
    model = small_network()
    inputs, labels = small_data().tensors
    parts = [(inputs[:20], labels[:20]), Opaque(inputs[20:30], labels[20:30]), (inputs[30:40], labels[30:40])]
    prune(model, parts, 0.7, "obd", loss_fn=Opaque.losses, samples=40, progress=False)
    found["opaque"] = {key: value.clone() for key, value in model.state_dict().items()}
    forecast = plan(small_network(), small_data(), samples=40).require()
    return {**found, "kind": forecast.storage.kind}


def refused(case: str, rank: int) -> tuple[str, str, float]:
    """Let the process of rank 1 fail in some way; return what this one says, and after how many seconds."""
    model, started, calls = small_network(), time.perf_counter(), []

    def loss_fn(net: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(None)
        if rank == 1 and len(calls) > 4 and case == "error":
            raise ValueError("out of luck")
        if rank == 1 and len(calls) > 4 and case == "loss":
            os._exit(0)
        if rank == 1 and len(calls) > 4 and case == "memory":
            torch.empty(2**50)
        if rank == 1 and len(calls) > 4 and case == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if rank == 1 and len(calls) == 5 and case == "silence":
            time.sleep(3 * PATIENCE)
        unit = {"losses": 1 + rank, "itself": 1e-15 * (1 + rank)}.get(case, 1)  # rounding, on two machines
        return cross_entropy(net, batch) * unit

    data = small_data(seed=rank if case == "samples" else 1)
    {"alone": calls_before}.get(case, lambda _: None)(rank)
    if case == "absent" and rank == 1:  # it speaks over the group for itself, which none may take for an answer
        with suppress(RuntimeError):
            dist.barrier()
        return "", "nothing", 0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settle, look = pipeline.settle_storage, pipeline.no_number
    if rank == 1:
        pipeline.settle_storage = {"plan": less_memory, "room": no_room}.get(case, settle)
        pipeline.no_number = full_disk if case == "end" else look
    sparsity = 2.0 if case == "early" and rank == 1 else 0.7
    kept = tempfile.mkdtemp() if case == "kept" and rank == 1 else None
    wrapped = DistributedDataParallel(model) if case == "wrapped" else model
    seed = rank if case == "seed" else 0
    options = {"samples": 30, "loss_fn": loss_fn, "seed": seed, "checkpoint": kept, "progress": False}
    try:
        with warnings.catch_warnings(record=True) as said:
            prune(wrapped, data, sparsity, "lr", **options)
    except (ValueError, OSError, MemoryError) as error:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        words = [*(str(one.message) for one in said), str(error)]
        return type(error).__name__, " | ".join(words), time.perf_counter() - started
    finally:
        pipeline.settle_storage, pipeline.no_number = settle, look
    return "", "nothing", time.perf_counter() - started


def calls_before(rank: int) -> None:
    """Make calls that processes do not share, or that are refused to both: they are no meeting of a later call."""
    options: dict[str, Any] = {"samples": 30, "progress": False}
    with suppress(ValueError):
        prune(small_network(), small_data(), 2.0 if rank == 1 else 0.5, "magnitude", **options)
    if rank == 0:
        prune(small_network(), small_data(), 0.5, "lr", storage="float32", **options)
    with pytest.raises(ValueError, match="sparsity must lie in"):
        prune(small_network(), small_data(), 2.0 if rank == 0 else 0.5, "lr", **options)


def full_disk(model: nn.Module, *_: Any) -> list[str]:
    """Fail on a network that was pruned, at the end of a run."""
    if any(bool((parameter == 0).any()) for parameter in model.parameters() if parameter.ndim > 1):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return []


def less_memory(_model: Any, _data: Any, request: Any, *_: Any) -> Any:
    return request, Storage("sharded", lean=True, at_once=32), []


def no_room(*_: Any) -> Any:
    raise ValueError("G cannot be held")


def work(rank: int, folder: Path, sizes: tuple[int, ...], cases: tuple[str, ...]) -> None:
    """What each of the processes does: prune in groups of these sizes, and go through these cases in groups of two."""
    torch.set_num_threads(1)
    capture._MAX_CHUNK = 7  # several chunks, which ranks take in turns
    for size in sizes:
        if rank < size:
            found = in_group(f"group{size}", rank, size, folder, lambda size=size: pruned(folder / f"run-{size}"))
            torch.save(found, folder / f"pruned-{size}-{rank}.pt")
    for case in cases:
        if case in ("absent", "silence"):
            os.environ["SWAP_PRUNE_TIMEOUT"] = str(PATIENCE)
        if rank < 2:
            said = in_group(case, rank, 2, folder, lambda case=case: refused(case, rank))
            torch.save(said, folder / f"{case}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (path, SIZES, LATE), nprocs=4)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(work, (path, (), SOON), nprocs=2)
    return path


def bits(value: Any) -> Any:
    """Return nested tensors as bytes, to compare."""
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


@pytest.mark.long
def test_every_number_of_processes_gives_the_same_bits_on_every_rank(folder: Path) -> None:
    first = torch.load(folder / "pruned-1-0.pt")
    assert first["kind"] == "sharded" and set(RUNS) < set(first)
    for size in SIZES:
        for rank in range(size):
            found = torch.load(folder / f"pruned-{size}-{rank}.pt")
            assert bits(found) == bits(first) and bits(found["resumed"]) == bits(found["lr"]), (size, rank)


@pytest.mark.long
@pytest.mark.parametrize("name", ["lr", "empirical", "obd"])
def test_the_mask_is_that_of_one_process_without_a_group(name: str, folder: Path) -> None:
    model = small_network()
    prune(model, small_data(), **{"sparsity": 0.7, "samples": 40, "storage": "float16", **RUNS[name]})
    shared = torch.load(folder / "pruned-1-0.pt")[name]
    same = [((a == 0) == (shared[key] == 0)).float().mean() for key, a in model.state_dict().items() if a.ndim > 1]
    assert min(same) > 0.9


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("error", "ValueError", "out of luck"),
        ("memory", "MemoryError", "there was not enough memory .*: say with memory= how much there is"),
        ("disk", "OSError", "No space left on device"),
        ("end", "OSError", "No space left on device"),
    ],
)
def test_what_fails_on_one_process_ends_the_other(case: str, kind: str, words: str, pair: Path) -> None:
    """In the middle, and at the last moment: neither is left pruned."""
    own, text, _ = torch.load(pair / f"{case}-1.pt")
    assert own == kind and re.search(words, text)
    own, text, seconds = torch.load(pair / f"{case}-0.pt")
    assert own == "ConnectionError" and "process 0 of 2 lost the others" in text and seconds < 30


@pytest.mark.parametrize(("case", "words"), [("room", "G cannot be held"), ("early", "sparsity must lie in [0, 1)")])
def test_a_run_that_one_process_refuses_is_refused_by_the_other_at_once(case: str, words: str, pair: Path) -> None:
    kind, own, _ = torch.load(pair / f"{case}-1.pt")
    assert kind == "ValueError" and words in own
    kind, text, seconds = torch.load(pair / f"{case}-0.pt")
    assert (kind, text) == ("ValueError", f"process 1 of 2: {own}") and seconds < 10


@pytest.mark.parametrize("case", ["alone", "itself"])
def test_what_is_no_difference_keeps_no_process_from_its_run(case: str, pair: Path) -> None:
    """Calls that are not shared, or are refused by both, and losses that are rounding."""
    for rank in (0, 1):
        kind, text, _ = torch.load(pair / f"{case}-{rank}.pt")
        assert (kind, text) == ("", "nothing")


@pytest.mark.long
def test_a_process_that_prunes_alone_in_a_group_hears_whom_it_waits_for(folder: Path) -> None:
    kind, text, seconds = torch.load(folder / "absent-0.pt")
    assert kind == "ConnectionError" and PATIENCE < seconds < 10 * PATIENCE
    warning, error = text.split(" | ")
    assert "process 0 of 2 waits for process 1 to call prune as well" in warning and "storage by name" in warning
    assert error.startswith(warning) and error.endswith(f"it gave up after {1.5 * PATIENCE:.0f} s")


@pytest.mark.long
def test_what_would_make_processes_wait_for_each_other_is_refused_by_all(folder: Path) -> None:
    words = {"wrapped": "pass model.module, the network in it", "kept": "must have the same settings, but process 1"}
    for case, expected in words.items():
        for rank in range(2):
            kind, text, seconds = torch.load(folder / f"{case}-{rank}.pt")
            assert kind == "ValueError" and expected in text and seconds < 10


@pytest.mark.long
def test_a_process_that_says_nothing_is_not_waited_for_for_ever(folder: Path) -> None:
    kind, text, seconds = torch.load(folder / "silence-0.pt")
    assert kind == "ConnectionError" and f"did not answer for {PATIENCE:.0f} s" in text
    assert PATIENCE <= seconds < 30
    assert torch.load(folder / "silence-1.pt")[0] == "ConnectionError", "it comes back, and is alone"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_patience_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAP_PRUNE_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"SWAP_PRUNE_TIMEOUT must be a number of seconds above 0, got '{text}'"):
        distributed.patience()


def test_a_process_that_is_gone_ends_the_other(pair: Path) -> None:
    assert not (pair / "loss-1.pt").exists()
    kind, text, seconds = torch.load(pair / "loss-0.pt")
    assert kind == "ConnectionError" and "lost the others" in text and seconds < 30


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("samples", "calibration samples"),
        ("seed", "settings"),
        ("plan", "storage, found by the free memory of each (memory= gives a budget)"),
        ("losses", "losses"),
    ],
)
def test_processes_that_do_not_do_the_same_are_refused_on_both(case: str, what: str, pair: Path) -> None:
    for rank in (0, 1):
        kind, text, _ = torch.load(pair / f"{case}-{rank}.pt")
        assert kind == "ValueError" and f"the same {what}, but process 1 differs" in text


def test_there_has_to_be_a_process_group() -> None:
    with pytest.raises(ValueError, match="storage 'sharded' needs several processes"):
        prune(small_network(), small_data(), 0.5, "lr", samples=20, storage="sharded", progress=False)


def test_a_rank_must_hold_its_parts() -> None:
    team = Team(1, 2, torch.device("cpu"), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rank 1 must hold parts of 5 rows and \[2, 3, 2, 3\] columns, got \[\]"):
        ShardedFactor((), (5, 20), team, 3, torch.empty(0))


@pytest.mark.parametrize("size", range(1, PARTS + 1))
@pytest.mark.parametrize("parts", [1, 3, PARTS, 11])
def test_every_part_has_one_owner(size: int, parts: int) -> None:
    teams = [Team(rank, size, torch.device("cpu"), None) for rank in range(size)]  # type: ignore[arg-type]
    owned = [team.owned(parts) for team in teams]
    assert [part for some in owned for part in some] == list(range(parts))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_what_the_first_process_has_is_written_over_what_another_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast", lambda flat, **_: flat.zero_())
    own, turned, expanded = torch.ones(2, 3), torch.ones(2, 3).T, torch.ones(1, 3).expand(4, 3)
    team = Team(1, 2, torch.device("cpu"), None)  # type: ignore[arg-type]
    team.take_from_first_([own, turned, unexpanded(expanded)])
    assert not own.any() and not turned.any() and not expanded.any()


def test_each_process_has_the_gpu_of_its_own_number_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [own_device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:2", "cuda:0", "cpu"]


def test_processes_of_one_machine_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_count() == 4


def test_more_processes_than_there_are_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "process_count", lambda: PARTS + 1)
    with pytest.raises(ValueError, match="for 8 processes at the most, got 9"), team_of(torch.device("cpu")):
        pass
