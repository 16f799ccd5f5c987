"""Artifacts: what is saved is what is loaded, and everything else is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import platform
import resource
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune import METHODS, FineTune, finetune, load_pruned, load_report, prune
from swap_prune.artifact import weights_sha256
from swap_prune.files import check_output_directory, write_directory
from swap_prune.weights_file import load_weights, read_weights
from tests.cases import but_long


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10), nn.Linear(10, 4))


def pruned(method: str = "lr") -> tuple[nn.Module, object]:
    torch.manual_seed(1)
    model = network()
    data = TensorDataset(torch.randn(40, 8), torch.randint(4, (40,)))
    return model, prune(model, data, 0.75, method, samples=40)


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_keeps_every_value_and_every_zero(method: str, tmp_path: Path) -> None:
    model, report = pruned(method)
    report.save(tmp_path / "out")
    other = network(seed=9)
    assert load_pruned(other, tmp_path / "out") is other
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    zeros = sum(int((layer.weight == 0).sum()) for layer in (other[0], other[2]))
    assert zeros == report.total - report.kept == 120 - 30
    assert load_report(tmp_path / "out").to_dict() == report.to_dict()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.json", "weights.safetensors"]
    assert sorted(safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")) == sorted(model.state_dict())


@pytest.mark.long
def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pruned()[1].save(tmp_path / name)
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()


def test_tied_weights_are_stored_under_all_their_keys(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Tied()
    prune(model, [(torch.randn(6, 5), torch.randint(5, (6,)))], 0.5, "magnitude").save(tmp_path / "out")
    other = load_pruned(Tied(), tmp_path / "out")
    assert torch.equal(other.a.weight, model.a.weight) and other.a.weight is other.b.weight


def test_nothing_is_written_over_or_into(tmp_path: Path) -> None:
    _, report = pruned()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for target in ("full", "file"):
        with pytest.raises(ValueError, match="choose another"):
            report.save(tmp_path / target)
    with pytest.raises(ValueError, match="cannot be written"):
        report.save(tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    report.save(tmp_path / "empty")
    assert (tmp_path / "empty" / "report.json").exists()


def test_folders_above_are_made_when_there_is_something_to_write(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    assert check_output_directory(out) == out and list(tmp_path.iterdir()) == []
    pruned()[1].save(out)
    assert load_report(out).kept == 30
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for impossible in ("link", "x" * 300):
        with pytest.raises(ValueError, match="cannot be written"):
            check_output_directory(tmp_path / impossible / "out")


def test_an_output_is_not_where_a_checkpoint_will_be_nor_in_the_way_of_who_asks_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for checkpoint in (out, out / "below", tmp_path / "other" / ".." / "out"):
        with pytest.raises(ValueError, match="which the run fills"):
            check_output_directory(out, checkpoint)
    assert check_output_directory(out, tmp_path / "outer") == check_output_directory(out, tmp_path) == out
    out.mkdir()
    (out / f".host-1-{'0' * 32}.out").mkdir()  # another's, which is looking whether it can be written
    assert check_output_directory(out) == out
    (out / ".else").touch()
    with pytest.raises(ValueError, match="not empty"):
        check_output_directory(out)


def test_a_model_that_was_trained_after_loading_is_saved_with_the_report_that_was_read(tmp_path: Path) -> None:
    pruned()[1].save(tmp_path / "out")
    model, report = load_pruned(network(seed=9), tmp_path / "out"), load_report(tmp_path / "out")
    finetune(model, TensorDataset(torch.randn(40, 8), torch.randint(4, (40,))), FineTune(epochs=1))
    assert report.save(tmp_path / "tuned", model) == tmp_path / "tuned"
    other = load_pruned(network(), tmp_path / "tuned")
    assert torch.equal(other[0].weight, model[0].weight) and load_report(tmp_path / "tuned").kept == 30
    assert not torch.equal(model[0].weight, load_pruned(network(), tmp_path / "out")[0].weight)
    refused = ((None, "name the model"), (network(), "does not have the sparsity"), (nn.Linear(2, 2), "lacks"))
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            report.save(tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


def test_a_model_changed_after_pruning_is_not_saved(tmp_path: Path) -> None:
    model, report = pruned()
    with torch.no_grad():
        model[0].weight.fill_(1)
    with pytest.raises(ValueError, match="does not have the sparsity"):
        report.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _flip_a_byte(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _densify(folder: Path) -> None:
    import hashlib

    path = folder / "weights.safetensors"
    state = safetensors.torch.load_file(path)
    state["0.weight"] += 1
    data = safetensors.torch.save(state)
    path.write_bytes(data)
    report = json.loads((folder / "report.json").read_text())
    report["weights_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "report.json").write_text(json.dumps(report))


def _state(**changed: object) -> Callable[[Path], object]:
    def alter(folder: Path) -> None:
        path = folder / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return alter


DAMAGE = {
    "altered weights": (_flip_a_byte, "hash"),
    "truncated weights": (
        lambda f: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes()[:100]),
        "damaged",
    ),
    "missing weights": (lambda f: (f / "weights.safetensors").unlink(), "does not exist"),
    "missing report": (lambda f: (f / "report.json").unlink(), "not a pruning artifact"),
    "report not json": (lambda f: (f / "report.json").write_text("{"), "not a pruning report"),
    "report of something else": (lambda f: (f / "report.json").write_text('{"a": 1}'), "not a pruning report"),
    "brackets without end": (lambda f: (f / "report.json").write_text("[" * 200_000), "not a pruning report"),
    "another sparsity": (_state(sparsity=0.99), "was altered: it states 30 of 120 weights at sparsity 0.99"),
    "other counts": (_state(kept=31), "was altered: it states 31 of 120"),
    "no layers": (_state(layers={}), "its layers have 0 of 0"),
    "dense weights": (_densify, "the report says"),
}


@pytest.mark.parametrize("case", but_long(DAMAGE, short=2))
def test_damaged_artifacts_are_refused_and_the_model_stays(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    pruned()[1].save(tmp_path / "out")
    damage(tmp_path / "out")
    model = network(seed=9)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        load_pruned(model, tmp_path / "out")
    assert torch.equal(model[0].weight, before)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    pruned()[1].save(tmp_path / "out")
    with pytest.raises(ValueError, match="shapes"):
        load_pruned(nn.Sequential(nn.Linear(8, 11), nn.BatchNorm1d(11), nn.Linear(11, 4)), tmp_path / "out")
    with pytest.raises(ValueError, match="keys"):
        load_pruned(nn.Sequential(nn.Linear(8, 10)), tmp_path / "out")


class _Exploit:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploited"),))


def test_pickles_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Exploit()}, tmp_path / "a.pt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"weight": _Exploit()}))
    (tmp_path / "c.safetensors").write_bytes(pickle.dumps({"weight": _Exploit()}))
    (tmp_path / "d.bin").write_bytes(bytes(range(100, 200)))
    for name in ("a.pt", "b.pth", "c.safetensors", "d.bin"):
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "exploited").exists()


def test_checkpoints_of_every_kind_load(tmp_path: Path) -> None:
    model = network()
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "b.pth"
    )
    safetensors.torch.save_file(model.state_dict(), tmp_path / "c.safetensors")
    for name in ("plain.pt", "b.pth", "c.safetensors"):
        assert torch.equal(load_weights(network(seed=4), tmp_path / name)[0].weight, model[0].weight)


def test_a_home_directory_that_is_not_known_is_refused() -> None:
    for call in (read_weights, load_report, check_output_directory):
        with pytest.raises(ValueError, match=r"~nosuchuser/x.* names a home directory that is not known; write"):
            call("~nosuchuser/x.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("none.pt", None, "does not exist"), ("x.pt", b"", "damaged"), ("x.onnx", b"abc", "must end in")],
)
def test_unusable_checkpoints(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / name)


ODD = {
    "sparse": lambda: torch.eye(4, 10).to_sparse(),
    "meta": lambda: torch.empty(4, 10, device="meta"),
    "complex64": lambda: torch.zeros(4, 10, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_no_parameter_can_hold_are_refused_before_any_is_loaded(kind: str, tmp_path: Path) -> None:
    model = network()
    state = network(seed=3).state_dict() | {"2.weight": ODD[kind]()}
    torch.save(state, tmp_path / "w.pt")
    before = model[0].weight.clone()
    words = (
        "'2.weight' is complex64 in .*imaginary"
        if kind == "complex64"
        else f"dense tensors, and '2.weight' is .*{kind}"
    )
    with pytest.raises(ValueError, match=words):
        load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model[0].weight, before)


def test_damaged_files_of_torch_are_refused_whatever_they_lead_to(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    path = tmp_path / "w.pt"
    for legacy in (False, True):
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for place in torch.randint(len(data), (6,), generator=draw).tolist():
                data[place] = int(torch.randint(256, (), generator=draw))
            path.write_bytes(data)
            with suppress(ValueError):  # what is left of it may be read, or is refused; nothing else is raised
                read_weights(path)


def test_a_file_that_asks_for_more_memory_than_there_is_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    torch.save(network().state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", short)
    with pytest.raises(MemoryError, match=r"no memory for weights file .*w.pt, or it is damaged: .*allocate"):
        read_weights(tmp_path / "w.pt")


def test_a_network_whose_only_child_is_called_module(tmp_path: Path) -> None:
    model, data = nn.DataParallel(network()), [(torch.randn(20, 8), torch.arange(20) % 3)]
    prune(model, data, 0.5, "magnitude", progress=False).save(tmp_path / "out")
    other = nn.DataParallel(network(seed=4))
    load_pruned(other, tmp_path / "out")
    assert torch.equal(other.module[0].weight, model.module[0].weight)
    assert torch.equal(
        load_weights(nn.DataParallel(network(seed=5)), tmp_path / "out" / "weights.safetensors").module[0].weight,
        model.module[0].weight,
    )


class Noting(nn.Linear):
    """Keeps something in its state_dict that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_states_of_more_than_tensors_are_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(Noting(8, 3))
    report = prune(model, [(torch.randn(20, 8), torch.arange(20) % 3)], 0.5, "magnitude", progress=False)
    with pytest.raises(ValueError, match="more than dense tensors, which is not saved"):
        report.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    torch.save({3: torch.zeros(2)}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match="its keys are no names"):
        load_weights(network(), tmp_path / "numbers.pt")


@pytest.mark.parametrize("made", [False, True], ids=["a new directory", "an empty one"])
def test_what_a_killed_process_left_of_a_directory_is_deleted_by_the_next(made: bool, tmp_path: Path) -> None:
    target = tmp_path / "there"
    if made:
        target.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, living = (
        (target if made else tmp_path) / f".{platform.node()}-{process}-{'0' * 32}.there"
        for process in (gone.pid, os.getpid())
    )
    for directory in (left, living):
        directory.mkdir()
        (directory / "weights").write_bytes(b"half")
    write_directory(check_output_directory(target), {"weights": b"whole"})
    assert not left.exists() and living.exists() and (target / "weights").read_bytes() == b"whole"


def test_weights_are_written_from_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made of tensors that share memory, and of no others: a network may take half of what there is."""
    model, report = pruned("magnitude")
    model.register_buffer("again", model[1].running_mean)
    model.register_buffer("part", model[1].running_var[:5])
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    written, save_file = {}, safetensors.torch.save_file

    def watched(state: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        written.update({name: tensor.data_ptr() for name, tensor in state.items()})
        save_file(state, path, **options)

    monkeypatch.setattr("swap_prune.files.save_file", watched)
    report.save(tmp_path / "out")
    assert {name for name in places if written[name] != places[name]} == {"1.running_mean", "part"}
    state = safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_whoever_may_read_what_a_user_writes_may_read_what_is_saved(tmp_path: Path) -> None:
    report = pruned("magnitude")[1]
    before = os.umask(0o027)
    try:
        report.save(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"weights.safetensors": 0o640, "report.json": 0o640}


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    """The limit of a process on the size of files fails in the same calls."""
    report = pruned("magnitude")[1]
    size = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, size[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*out: File too large"):
            report.save(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_weights_tells_shapes_and_names_apart() -> None:
    first, second = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        second.weight.copy_(first.weight.view(2, 3))
    named = nn.ModuleDict({"x": second})
    assert len({weights_sha256(model) for model in (first, second, named)}) == 3


def test_a_network_that_cannot_be_saved_says_so_in_the_report() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    report = prune(Noting(), None, 0.5, "magnitude", progress=False)
    (note,) = (note for note in report.notes if note.startswith("report.save cannot write this network"))
    assert "_extra_state" in note


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")  # num_batches_tracked is one by right
    torch.save({name: value.to(dtype) for name, value in model.state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"'0.weight' is (int|bool).* real number in .* were quantised"):
        load_weights(model, tmp_path / "w.pt")


def test_a_wrapped_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"model_state_dict": nn.Linear(4, 3).state_dict(), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="got keys model_state_dict, epoch; under 'state_dict' or 'model'"):
        load_weights(nn.Linear(4, 3), tmp_path / "w.pt")


class _Pair(nn.Module):
    """Two layers of one shape, whose weights may be one."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        if tied:
            self.b.weight = self.a.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_their_own_are_not_loaded_to_one_place(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in _Pair(tied=False).state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "apart.safetensors")
    model = _Pair(tied=True).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"'a.weight' and 'b.weight' are one tensor in the model, and have other values"
    ):
        load_weights(model, tmp_path / "apart.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state["a.weight"].fill_(torch.nan)[0] = 0.0
    state["b.weight"] = -state["a.weight"]  # where 0 is -0
    safetensors.torch.save_file(state, tmp_path / "same.safetensors")
    assert load_weights(model, tmp_path / "same.safetensors").b.weight.isnan().sum() == 56


def test_numbers_that_a_smaller_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    state["0.weight"][0, 0], state["0.bias"][0] = 1e5, torch.inf
    safetensors.torch.save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=r"'0.weight' in .* has numbers that torch.float16 cannot hold"):
        load_weights(network().half(), tmp_path / "large.safetensors")
    state["0.weight"][0, 0] = 6e4
    safetensors.torch.save_file(state, tmp_path / "large.safetensors")
    assert load_weights(network().half(), tmp_path / "large.safetensors")[0].bias.isinf().sum() == 1


@pytest.mark.parametrize("case", but_long(["inference", "hook"], short=["hook"]))
def test_a_network_that_does_not_take_all_of_an_artifact_has_nothing_of_it(case: str, tmp_path: Path) -> None:
    _, report = pruned()
    report.save(tmp_path / "out")
    model = network(seed=9)
    if case == "inference":
        with torch.inference_mode():
            model[2].weight = nn.Parameter(torch.randn(4, 10), requires_grad=False)
    else:
        model[2].register_load_state_dict_post_hook(lambda *_: 1 / 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="made under torch.inference_mode" if case == "inference" else "did not take"):
        load_pruned(model, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        model = network(seed=9)
        assert int(load_pruned(model, tmp_path / "out")[0].weight.count_nonzero()) == report.layers["0.weight"].kept


@pytest.mark.parametrize("change", but_long(["leaves out", "changes"]))
def test_an_artifact_that_could_not_be_loaded_is_not_written(change: str, tmp_path: Path) -> None:
    model, report = pruned()

    def hook(_: nn.Module, state: dict[str, torch.Tensor], *__: object) -> None:
        weights = state.pop("0.weight")
        if change == "changes":
            state["0.weight"] = weights + 1

    handle = model.register_state_dict_post_hook(hook)
    with pytest.raises(ValueError, match=r"leaves out or changes the pruned weights '0.weight'"):
        report.save(tmp_path / "out")
    handle.remove()
    with pytest.raises(ValueError, match="save the network that was pruned, in the wrapper"):
        report.save(tmp_path / "out", nn.DataParallel(model))
    with pytest.raises(ValueError, match="lies on the meta device"):
        report.save(tmp_path / "out", network().to("meta"))
    assert list(tmp_path.iterdir()) == []
    model.register_buffer("cache", torch.empty(2, device="meta"), persistent=False)
    assert report.save(tmp_path / "out") == tmp_path / "out"


def test_buffers_that_are_infinite_in_the_model_as_well_are_loaded(tmp_path: Path) -> None:
    """As masks of -1e9 are in half precision."""
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.full((3, 3), -1e9).triu(1))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "mask.safetensors")
    half = copy.deepcopy(model).half()
    assert load_weights(half, tmp_path / "mask.safetensors").mask.isinf().sum() == 3
    half.mask.zero_()
    with pytest.raises(ValueError, match=r"'mask' in .* has numbers that torch.float16 cannot hold"):
        load_weights(half, tmp_path / "mask.safetensors")


def test_what_is_not_written_to_may_be_made_under_inference_mode(tmp_path: Path) -> None:
    model = network()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with torch.inference_mode():
        model.register_buffer("cache", torch.zeros(2), persistent=False)
    load_weights(model, tmp_path / "weights.safetensors")
