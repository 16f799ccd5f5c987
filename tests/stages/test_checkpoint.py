"""Runs that were interrupted after some stage, and go on: they end in the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from swap_prune import FineTune, PruningReport, prune
from swap_prune.stages import checkpoint
from swap_prune.stages.runner import StageRunner
from tests.test_pipeline import small_data, small_network

SIZE = len(small_data())


class Interrupted(BaseException):
    pass


class Noisy(TensorDataset):
    """Augments with torch's own random state."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(inputs.shape), label


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from small_data()


class Counting(nn.Module):
    """A network with a buffer that no state_dict has, and one that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("seen", torch.zeros(0), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        outputs: Tensor = self.body(inputs)
        return outputs


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
    "batches": (small_network, in_batches, {"samples": 37}),
    "read once": (small_network, lambda: iter(in_batches()), {"samples": 37}),
    "endless": (small_network, Endless, {"samples": 37}),
    "fine-tuned": (small_network, small_data, {"finetune": FineTune(epochs=1)}),
    "a network that draws": (Drawing, small_data, {}),
    "noise": (small_network, small_data, {"noise": ["labels:fraction=0.5", "gradient:std=4,fraction=0.25"]}),
    "attacked": (small_network, small_data, {"noise": "adversarial:attack=fgsm,budget=0.5"}),
    "no data": (small_network, small_data, {"method": "magnitude"}),
    "found by itself": (small_network, small_data, {"stages": "auto"}),
    "buffers": (Counting, small_data, {}),
}


def run(case: str, directory: Path | None, **changes: Any) -> tuple[PruningReport, dict[str, Tensor]]:
    make, data, settings = CASES[case]
    model = make()
    given = {"method": "lr", "samples": 40, "stages": 4, "progress": False, **settings, **changes}
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


@pytest.mark.parametrize("case", CASES)
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
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"samples": 30}, "samples was 40 and is 30"),
        ({"stages": 5}, "stages was 4 and is 5"),
        ({"method": "obd"}, r"method was .*lr.* and is .*obd"),
        ({"noise": "labels:fraction=0.1"}, "noise was null and is"),
        ({"storage": "float16"}, 'storage was "auto" and is "float16"'),
        ({"loss_fn": nn.functional.relu}, 'loss was "CrossEntropy" and is "relu"'),
    ],
)
def test_another_run_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    run("dataset", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"is of another run: .*{words}.*choose another directory"):
        run("dataset", tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_weights_and_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(2, monkeypatch, lambda: run("dataset", tmp_path))
    given = {"method": "lr", "samples": 40, "stages": 4, "progress": False, "checkpoint": tmp_path}
    with pytest.raises(ValueError, match="weights_sha256 was"):
        prune(small_network(seed=3), small_data(), 0.8, **given)
    fewer = TensorDataset(*(tensor[:-1] for tensor in small_data().tensors))
    with pytest.raises(ValueError, match=f"the data are not those of before: {SIZE - 1} samples, and {SIZE} then"):
        prune(small_network(), fewer, 0.8, **given)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty, and no run's"):
        run("dataset", tmp_path)
    with pytest.raises(ValueError, match="cannot be used"):
        run("dataset", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "keep"
    for content in ("[]", "{"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run.json was altered"):
            run("dataset", tmp_path)


def test_damage_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(2, monkeypatch, lambda: run("dataset", tmp_path))
    path = tmp_path / "4-stages.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:1000], whole.replace(b"network.", b"notwork.")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"4-stages.safetensors is damaged or was altered: remove .*begin again"):
            run("dataset", tmp_path)


def test_what_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(1, monkeypatch, lambda: run("dataset", tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"cannot be written: .*No space left"):
        patch.setattr(checkpoint, "save_file", full)
        run("dataset", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    expected, found = run("dataset", None)[1], run("dataset", tmp_path)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(1, monkeypatch, lambda: run("dataset", tmp_path))
    (tmp_path / ".1f.4-stages.safetensors").write_bytes(b"half")
    run("dataset", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4-stages.safetensors", "run.json"]


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


def test_what_a_run_is(tmp_path: Path) -> None:
    run("noise", tmp_path)
    kept = json.loads((tmp_path / "run.json").read_text())
    assert (kept["seed"], kept["stages"], kept["loss"], kept["device"]) == (0, 4, "CrossEntropy", "cpu")
    assert [model["model"] for model in kept["noise"]] == ["LabelNoise", "GradientNoise"]
