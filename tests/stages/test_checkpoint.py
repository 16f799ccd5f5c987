"""Runs that were interrupted after some stage, and go on: they end in the bytes of one that was not."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from swap_prune import FineTune, PruningReport, files, prune
from swap_prune.losses import CrossEntropy, cross_entropy
from swap_prune.report import StageReport
from swap_prune.stages import checkpoint, identity
from swap_prune.stages.identity import described
from swap_prune.stages.runner import StageRunner
from tests.cases import ONE, but_long
from tests.stages.test_runner import own_labels, sure_network
from tests.test_pipeline import small_data, small_network

SIZE = len(small_data())


class Interrupted(BaseException):
    pass


class Noisy(TensorDataset):
    """Augments with torch's own random state."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(inputs.shape), label


class NoisyByNumPy(TensorDataset):
    """Augments with the random states of NumPy and Python."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * np.random.standard_normal() + 0.1 * random.gauss(0, 1), label


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from small_data()


class Counting(nn.Module):
    """A network without BatchNorm whose outputs depend on buffers that no state_dict has: one grows, one is None."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("seen", torch.zeros(0), persistent=False)
        self.register_buffer("late", None, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not torch._C._functorch.is_batchedtensor(inputs):
            self.calls += 1
            self.seen = torch.cat([self.seen, torch.ones(1)])
            self.late = torch.zeros(()) if self.late is None else self.late + 1
        outputs: Tensor = self.body(inputs) * (1 + 0.01 * self.calls + 0.01 * len(self.seen))
        return outputs if self.late is None else outputs + 0.01 * self.late * inputs[:, 0, 0, :3]


class OwnRandomness(TensorDataset):
    """Augments with a random state of its own."""

    def __init__(self) -> None:
        super().__init__(*small_data().tensors)
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(inputs.shape, generator=self.generator), label


class Drawing(nn.Module):
    """A network that draws random numbers whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.body(inputs + 0.1 * torch.randn(inputs.shape))
        return outputs


def in_batches(size: int = 24) -> list[Any]:
    return list(DataLoader(small_data(), batch_size=size))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "dataset": (small_network, small_data, {}),
    "few samples, that are drawn again": (small_network, small_data, {"samples": SIZE}),
    "augmented": (small_network, lambda: Noisy(*small_data().tensors), {"recalibration_data": small_data(seed=5)}),
    "augmented by NumPy": (small_network, lambda: NoisyByNumPy(*small_data().tensors), {}),
    "augmented by itself": (small_network, OwnRandomness, {}),
    "a part of what augments itself": (small_network, lambda: DataLoader(Subset(OwnRandomness(), range(50))), {}),
    "batches": (small_network, in_batches, {"samples": 37}),
    "read once": (small_network, lambda: iter(in_batches()), {"samples": 37}),
    "endless": (small_network, Endless, {"samples": 37}),
    "fine-tuned": (small_network, small_data, {"finetune": FineTune(epochs=1)}),
    "a network that draws": (Drawing, small_data, {}),
    "noise": (small_network, small_data, {"noise": ["labels:fraction=0.5", "gradient:std=4,fraction=0.25"]}),
    "attacked": (small_network, small_data, {"noise": "adversarial:attack=fgsm,budget=0.5"}),
    "labels doubted": (sure_network, own_labels, {"noise": "labels:fraction=0.5", "samples": 200}),
    "an attack seen": (sure_network, own_labels, {"noise": "adversarial:budget=0.5", "samples": 200}),
    "no data": (small_network, small_data, {"method": "magnitude"}),
    "found by itself": (small_network, small_data, {"stages": "auto", "method": "lr"}),
    "schedule found by itself": (small_network, small_data, {"schedule": "auto"}),
    "buffers": (Counting, small_data, {}),
}


def run(case: str, directory: Path | None, **changes: Any) -> tuple[PruningReport, dict[str, Tensor]]:
    make, data, settings = CASES[case]
    model = make()
    given = {"method": ONE, "samples": 40, "stages": 4, "progress": False, **settings, **changes}
    report = prune(model, data(), 0.8, checkpoint=directory, **given)
    return report, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def interrupted_after(stages: int, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> None:
    """Call something that is interrupted when it begins another stage."""
    own, done = StageRunner.run, []

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(done) == stages:
            raise Interrupted
        done.append(None)
        return own(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageRunner, "run", counted)
        call()


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_seconds(part) for name, part in value.items() if name not in ("seconds", "passes")}
    return [without_seconds(part) for part in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("case", but_long(CASES, short=["dataset", "no data"]))
def test_going_on_ends_in_the_same_bytes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, weights = run(case, None)
    for done in (1, 3):
        directory = tmp_path / str(done)
        interrupted_after(done, monkeypatch, lambda directory=directory: run(case, directory))
        report, found = run(case, directory)
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items()), done
        assert without_seconds(report.to_dict()) == without_seconds(dict(expected.to_dict()))
    with monkeypatch.context() as patch:
        patch.setattr(StageRunner, "run", lambda *_, **__: pytest.fail("all stages are there"))
        again, found = run(case, tmp_path / "1")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert again.seconds > sum(stage.seconds for stage in again.stages), "those of the call, and of what was there"


def test_what_comes_back_lies_where_new_tensors_lie(tmp_path: Path) -> None:
    """Products may round otherwise where their factors lie at odd addresses, as those of a file do."""

    class Odd:
        def remembered(self) -> dict[str, Tensor]:
            return {f"{n}": torch.ones(n) for n in (1, 3, 5, 7)} | {"flag": torch.tensor([True])}

        def recall(self, state: Mapping[str, Tensor]) -> None:
            assert state.keys() == self.remembered().keys()
            assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())
            assert all(map(torch.equal, state.values(), self.remembered().values()))

    kept = checkpoint.Checkpoint(tmp_path / "kept", {}).of(odd=Odd())
    model, data, _ = CASES["dataset"]
    record = prune(model(), data(), 0.5, "lr", samples=40, progress=False).stages[0]
    kept.keep([record], "2")
    assert kept.resume("2") == [record]


def test_the_interrupted_network_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_network()
    interrupted_after(
        2, monkeypatch, lambda: prune(model, small_data(), 0.8, "lr", samples=40, stages=4, checkpoint=tmp_path / "new")
    )
    for name, tensor in small_network().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["4-stages.safetensors", "run.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    but_long(
        [
            ({"seed": 1}, "seed was 0 and is 1"),
            ({"samples": 30}, r"samples was 40 and is 30\."),
            ({"stages": 5}, "stages was 4 and is 5"),
            ({"method": "obd"}, r"method was .*lr.* and is .*obd"),
            ({"method": replace(ONE, rows="samples")}, r'method.rows was "auto" and is "samples"\.'),
            ({"noise": "labels:fraction=0.1"}, "noise was null and is"),
            ({"storage": "float16"}, 'storage.used was "float32" and is "float16"'),
            ({"loss_fn": CrossEntropy(1.0)}, r'loss was "CrossEntropy\(temperature=4.0\)" and is "CrossEntropy\(temp'),
            ({"loss_fn": lambda net, batch: net(batch[0]).sum(1)}, r"loss was .* and is .*<lambda> [0-9a-f]{16}"),
            ({"recalibration_data": small_data()}, 'recalibration_data was null and is "TensorDataset of 60 samples"'),
        ],
        short=2,
    ),
)
def test_another_run_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    run("dataset", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"is of another run: .*{words}.*choose another directory"):
        run("dataset", tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_defence_in_other_words_is_the_same_run(tmp_path: Path) -> None:
    first, weights = run("dataset", tmp_path, defence="auto")
    again, same = run("dataset", tmp_path, defence="labels+inputs+gradients")
    assert first.settings == again.settings and all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.long
def test_other_weights_and_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(2, monkeypatch, lambda: run("dataset", tmp_path))
    given = {"method": ONE, "samples": 40, "stages": 4, "progress": False, "checkpoint": tmp_path}
    with pytest.raises(ValueError, match=r"weights was .* on the dense network"):
        prune(small_network(seed=3), small_data(), 0.8, **given)
    fewer = TensorDataset(*(tensor[:-1] for tensor in small_data().tensors))
    with pytest.raises(ValueError, match=f'data was "TensorDataset of {SIZE} samples" and is "T.* of {SIZE - 1} samp'):
        prune(small_network(), fewer, 0.8, **given)
    report = prune(small_network(), small_data(seed=9), 0.8, **given)
    assert any(note.startswith("the data gave other samples than before the interruption") for note in report.notes)


def times(factor: float) -> Callable[[nn.Module, Any], Tensor]:
    return lambda net, batch: cross_entropy(net, batch) * factor


@dataclass(frozen=True)
class Multiple:
    factor: float

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(net, batch) * self.factor

    def method(self, net: nn.Module, batch: Any) -> Tensor:
        return self(net, batch)


class Tallying:
    def __init__(self) -> None:
        self.calls, self.myself, self.package = 0, self, torch

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return cross_entropy(net, batch)


def counting() -> Callable[[nn.Module, Any], Tensor]:
    calls, mean, listed = 0, torch.zeros(()), list[int]()
    from torch.nn import functional as around

    def loss(net: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        mean.add_(1)
        listed.append(calls)
        return around.cross_entropy(net(batch[0]), batch[1], reduction="none") + (later() if calls < 0 else 0)

    if calls:
        later = loss  # an empty cell
    return loss


def helped(net: nn.Module, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none") * FACTOR


FACTOR = 2
LOSSES: dict[str, Callable[[float], Any]] = {
    "a constant": lambda factor: (
        (lambda net, batch: cross_entropy(net, batch) * 2)
        if factor == 2
        else (lambda net, batch: cross_entropy(net, batch) * 3)
    ),
    "a name": lambda factor: (
        (lambda net, batch: net(batch[0]).square().sum(1))
        if factor == 2
        else (lambda net, batch: net(batch[0]).abs().sum(1))
    ),
    "inside": lambda factor: (
        (lambda net, batch: (lambda x: x.abs() + 1)(cross_entropy(net, batch)))
        if factor == 2
        else (lambda net, batch: (lambda x: x.abs() + 2)(cross_entropy(net, batch)))
    ),
    "a closure": times,
    "a default": lambda factor: lambda net, batch, by=factor: cross_entropy(net, batch) * by,
    "a keyword": lambda factor: lambda net, batch, *, by=factor: cross_entropy(net, batch) * by,
    "a dataclass": Multiple,
    "a method": lambda factor: Multiple(factor).method,
    "a part": lambda factor: functools.partial(lambda net, batch, by: cross_entropy(net, batch) * by, by=factor),
    "a set": lambda factor: times({frozenset({"a", "b", factor}): factor}[frozenset({"b", "a", factor})]),
}


@pytest.mark.parametrize("kind", but_long(LOSSES))
def test_losses_are_told_apart_by_what_they_do(kind: str, tmp_path: Path) -> None:
    run("dataset", tmp_path, loss_fn=LOSSES[kind](2))
    run("dataset", tmp_path, loss_fn=LOSSES[kind](2))
    with pytest.raises(ValueError, match="loss was"):
        run("dataset", tmp_path, loss_fn=LOSSES[kind](3))


def helped_inside(net: nn.Module, batch: Any) -> Tensor:
    return (lambda losses: losses * FACTOR)(cross_entropy(net, batch))


@pytest.mark.parametrize("loss", but_long([helped, helped_inside]))
def test_a_loss_is_told_apart_by_what_it_reads_around_it(
    loss: Callable[[nn.Module, Any], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dataset", tmp_path, loss_fn=loss)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)
    with pytest.raises(ValueError, match="loss was"):
        run("dataset", tmp_path, loss_fn=loss)


@pytest.mark.parametrize("make", but_long([Tallying, counting]))
def test_what_changes_while_a_run_goes_on_does_not_make_it_another(make: Callable[[], Any], tmp_path: Path) -> None:
    loss = make()
    run("dataset", tmp_path, loss_fn=loss)
    run("dataset", tmp_path, loss_fn=loss)


def test_a_compiled_loss_is_the_same_each_time_though_it_has_a_number_of_its_own() -> None:
    def made() -> Callable[[nn.Module, Any], Tensor]:
        compiled = torch.compile(nn.CrossEntropyLoss(reduction="none"), backend="eager")
        return lambda net, batch: compiled(net(batch[0]), batch[1])

    assert described(made()) == described(made())


def test_helpers_that_call_each_other_are_read_once() -> None:
    """Each of forty calls all before it: as a tree they would be read 2^40 times."""
    scope: dict[str, Any] = {"__name__": "helpers"}
    for number in range(40):
        calls = " + ".join(f"helper_{earlier}(x)" for earlier in range(number)) or "FACTOR * x"
        exec(f"FACTOR = 2\ndef helper_{number}(x):\n    return {calls}", scope)
    before = described(scope["helper_39"])
    assert described(scope["helper_39"]) == before
    scope["FACTOR"] = 3
    assert described(scope["helper_39"]) != before


@pytest.mark.long
def test_what_a_loss_is_does_not_depend_on_the_process() -> None:
    program = (
        "from swap_prune.stages.identity import described; from tests.stages.test_checkpoint import LOSSES\n"
        "print([described(make(2)) for make in LOSSES.values()])\n"
        "print(described(lambda net, batch: batch in {'some', 'words', 'in', 'a', 'set'}))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(seen) == 1


def test_a_network_that_no_file_can_hold_is_refused_first(tmp_path: Path) -> None:
    class Odd(nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(ValueError, match="more than dense tensors, which a checkpoint cannot keep"):
        prune(Odd(small_network()), small_data(), 0.5, "lr", samples=40, progress=False, checkpoint=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_data_that_are_read_again_and_give_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"method": "lr", "samples": 24, "stages": 4, "progress": False}
    stream = ((torch.randn(24, 1, 8, 8) + number, torch.arange(24) % 3) for number in itertools.count())
    interrupted_after(
        1, monkeypatch, lambda: prune(small_network(), stream, 0.8, checkpoint=tmp_path / "stream", **given)
    )
    report = prune(small_network(), stream, 0.8, checkpoint=tmp_path / "stream", **given)
    assert any("data gave other samples than before" in note for note in report.notes), "they go on"
    interrupted_after(
        3, monkeypatch, lambda: prune(small_network(), in_batches(), 0.8, checkpoint=tmp_path / "list", **given)
    )
    fewer = [*in_batches()[:-1], tuple(tensor[:4] for tensor in in_batches()[-1])]
    with pytest.raises(ValueError, match=f"the data have changed since the checkpoint: 52 samples, {SIZE} then"):
        prune(small_network(), fewer, 0.8, checkpoint=tmp_path / "list", **given)


@pytest.mark.long
def test_the_storage_of_the_first_stages_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as where memory was short
        patch.setattr("swap_prune.memory.planning._ORDER", (("matrix-free", True),))
        expected, weights = run("dataset", None)
        interrupted_after(2, monkeypatch, lambda: run("dataset", tmp_path))
    assert run("dataset", None)[0].settings["storage"]["used"] == "float32", "what would be chosen now"
    report, found = run("dataset", tmp_path)
    assert report.settings["storage"] == expected.settings["storage"]
    assert report.settings["storage"]["used"] == "matrix-free"
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / ".best.safetensors").write_text("keep")
    with pytest.raises(ValueError, match=r"holds other files \("):
        run("dataset", tmp_path)
    assert (tmp_path / ".best.safetensors").read_text() == "keep"
    with pytest.raises(ValueError, match="is not a directory: choose another"):
        run("dataset", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "keep"
    for content in (b"[]", b"{", b"\xff\xfe", b'{"mine": 1}'):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"run.json was altered|is of another run: .*mine was 1"):
            run("dataset", tmp_path)
        assert (tmp_path / "run.json").read_bytes() == content


def test_damage_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(2, monkeypatch, lambda: run("dataset", tmp_path))
    path = tmp_path / "4-stages.safetensors"
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        about, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    records = json.loads(about["stages"])
    twice = safetensors.torch.save(state, about | {"stages": json.dumps(records + records)})
    deep = safetensors.torch.save(state, about | {"stages": 5000 * "["})
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (b"", whole[:1000], whole.replace(b"network.", b"notwork."), twice, deep, bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"4-stages.safetensors is damaged or was altered: remove .*begin again"):
            run("dataset", tmp_path)


@pytest.mark.parametrize("change", [{"at_once": 0}, {"at_once": "x"}, {"spilled": "all"}, {"team": 1}, {"lean": 1}])
def test_a_storage_that_was_altered_is_another_runs(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_after(1, monkeypatch, lambda: run("dataset", tmp_path))
    assert checkpoint.kept_storage(tmp_path) is not None
    about = json.loads((tmp_path / "run.json").read_text())
    about["storage"] |= change
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert checkpoint.kept_storage(tmp_path) is None
    with pytest.raises(ValueError, match=r"is of another run: storage(\.\w+)? was"):
        run("dataset", tmp_path)
    (tmp_path / "run.json").write_text(5000 * "[")
    with pytest.raises(ValueError, match=r"run.json was altered"):
        run("dataset", tmp_path)


@pytest.mark.long
def test_what_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(1, monkeypatch, lambda: run("dataset", tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"cannot be written: .*No space left"):
        patch.setattr(checkpoint, "write_tensors", full)
        run("dataset", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    expected, found = run("dataset", None)[1], run("dataset", tmp_path)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.long
def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(1, monkeypatch, lambda: run("dataset", tmp_path))
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout
    left = {
        process: tmp_path / f".{platform.node()}-{process}-{'1f' * 16}.4-stages.safetensors"
        for process in (int(gone), os.getpid())
    }
    for path in left.values():
        path.mkdir()
        (path / "4-stages.safetensors").write_bytes(b"half")
    run("dataset", tmp_path)
    shutil.rmtree(left[os.getpid()])  # another thread may be writing it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4-stages.safetensors", "run.json"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f".{platform.node()}-{gone.strip()}-{'1f' * 16}.run.json").mkdir()
    run("dataset", tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["4-stages.safetensors", "run.json"]


@pytest.mark.long
def test_every_process_compares_and_writes_unless_it_shares_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dataset", tmp_path / "one")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        run("dataset", tmp_path / "one", seed=1)
    run("dataset", tmp_path / "other", seed=1)
    assert (tmp_path / "other" / "4-stages.safetensors").exists()


@pytest.mark.long
def test_networks_that_no_file_holds_are_refused_before_any_work(tmp_path: Path) -> None:
    for odd in (torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex128)):
        model = small_network()
        model.register_buffer("odd", odd, persistent=False)
        with pytest.raises(ValueError, match=r"cannot keep 'odd' \(.*\): leave checkpoint out"):
            prune(model, small_data(), 0.8, "lr", samples=40, stages=2, checkpoint=tmp_path / "run")
        prune(model, small_data(), 0.8, "lr", samples=40)


def test_evidence_that_is_no_number_comes_back(tmp_path: Path) -> None:
    kept = checkpoint.Checkpoint(tmp_path, {})
    record = StageReport(
        sparsity=0.5, kept=3, samples=2, loss=math.inf, seconds=1.5, converged=True, iterations=1,
        evidence={"a": math.nan, "b": [1e-300, None]},
    )  # fmt: skip
    kept.keep([record], "2")
    (found,) = kept.resume("2")
    assert math.isnan(found.evidence.pop("a")) and record.evidence.pop("a") and found == record
    with pytest.raises(ValueError, match="cannot be written"):
        kept.keep([record.model_copy(update={"evidence": {"a": torch.zeros(1)}})], "2")


@pytest.mark.long
def test_killed_at_any_moment(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import torch; from tests.stages.test_checkpoint import run;"
        "torch.set_num_threads(1);"
        "torch.save(run('dataset', Path(sys.argv[1]), stages=12)[1], sys.argv[2])"
    )
    weights, kills = tmp_path / "weights.pt", 0
    for pause in (0.0, 0.05, 0.1, 0.2, 600.0):
        command = [sys.executable, "-c", code, str(tmp_path / "run"), str(weights)]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}) as own:
            try:
                seen = stamp(tmp_path)
                while own.poll() is None and stamp(tmp_path) == seen:
                    time.sleep(0.005)
                own.wait(pause)
            except subprocess.TimeoutExpired:
                kills += 1
            finally:
                own.kill()
        assert own.returncode in (0, -signal.SIGKILL)
    assert kills > 0 and weights.exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = run("dataset", None, stages=12)[1]
    finally:
        torch.set_num_threads(threads)
    found = torch.load(weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "run").glob(".*")), "what was torn is gone"


def stamp(folder: Path) -> int:
    """Return when the file of the stages was written, in nanoseconds."""
    path = folder / "run" / "12-stages.safetensors"
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.long
def test_what_a_run_is(tmp_path: Path) -> None:
    run("noise", tmp_path)
    kept = json.loads((tmp_path / "run.json").read_text())
    assert (kept["seed"], kept["stages"], kept["device"]) == (0, 4, "cpu")
    assert [model["model"] for model in kept["noise"]] == ["LabelNoise", "GradientNoise"]


def test_a_run_of_other_versions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("dataset", tmp_path)
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "0.1"})
    with pytest.raises(ValueError, match="is of another run: versions was"):
        run("dataset", tmp_path)


def test_a_stage_that_is_kept_is_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[Path] = []
    kept = checkpoint.Checkpoint(tmp_path, {})
    monkeypatch.setattr(files, "force_to_disk", forced.append)
    kept.keep([], 2)
    assert [path.name.endswith("2-stages.safetensors") for path in forced[:1]] == [True]
    assert forced[1:] == [tmp_path], "the file, and the name of it"
