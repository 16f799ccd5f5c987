"""G of the dense network, left for later runs: found again, or not believed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune import LR, SelfDistillation, plan, prune
from swap_prune.fisher.backends.mapped import _HEADER, MappedFactor
from swap_prune.stages import capturing
from tests.cases import but_long, generator
from tests.fisher.defence.test_gradients import perceptron
from tests.stages.test_runner import Asking
from tests.test_pipeline import small_data, small_network


def run(folder: Path | None, model: nn.Module, data: Any, sparsity: float = 0.4, **options: Any) -> tuple[Any, Any]:
    """Prune a copy; return its weights, and the evidence of the first stage."""
    own = copy.deepcopy(model)
    kept = {"storage": "mapped"} if folder is None else {"scratch": folder, "keep_rows": True}
    report = prune(own, data, sparsity, **{"method": "lr", "samples": 40, "progress": False} | kept | options)
    return own.state_dict(), report.stages[0].evidence


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", but_long(["mini-batches", "samples", "labels"], short=["labels"]))
def test_a_later_run_takes_what_an_earlier_one_left(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small_network(), small_data(80)
    options = {
        "recalibrate_batchnorm": kind == "mini-batches",
        "method": LR(fisher="empirical" if kind == "labels" else "auto"),
    }
    _, evidence = run(tmp_path, model, data, **options)
    assert "rows_reused" not in evidence
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and {Path(name).suffix for name in left} == {".fisher", ".json"}
    taken: list[int] = []
    rows = capturing.RowCapture._rows

    def watched(self: Any, weights: Tensor, batches: list[Any], advance: Any, **options: Any) -> Any:
        capture = rows(self, weights, batches, advance, **options)
        taken.append(capture.factor.shape[0])
        return capture

    monkeypatch.setattr(capturing.RowCapture, "_rows", watched)
    found, evidence = run(tmp_path, model, data, 0.6, **options)
    assert evidence["rows_reused"] == Path(left[0]).stem
    if kind == "mini-batches":  # those of samples are compared with them, at this sparsity, and stay too
        assert taken == [1, 80] and sum(1 for _ in tmp_path.iterdir()) == 4
        taken.clear()
        assert same(found, run(tmp_path, model, data, 0.6, **options)[0]) and taken == [1, 1]
    else:
        assert taken == [1] and sorted(path.name for path in tmp_path.iterdir()) == left
    alone, own = run(None, model, data, 0.6, **options)
    assert same(found, alone) and own["ridge"] == evidence["ridge"]


def test_rows_are_found_where_the_losses_of_the_dense_network_are_zero(tmp_path: Path) -> None:
    model, loss = perceptron()[0], SelfDistillation()
    inputs = torch.randn(60, 30, generator=generator(5))
    pairs = loss.label(model, inputs.split(20))
    first, evidence = run(tmp_path, model, pairs, loss_fn=loss)
    assert "rows_reused" not in evidence
    again, evidence = run(tmp_path, model, pairs, loss_fn=loss)
    assert "rows_reused" in evidence and same(first, again)


@pytest.mark.long
def test_only_the_first_stage_is_kept(tmp_path: Path) -> None:
    model, data = small_network(), small_data(80)
    run(tmp_path, model, data, 0.1, stages=3)
    assert len(list(tmp_path.iterdir())) == 2
    found, evidence = run(tmp_path, model, data, 0.1, stages=3)
    assert "rows_reused" in evidence and same(found, run(None, model, data, 0.1, stages=3)[0])


def other_weights(model: nn.Module, data: Any, options: dict[str, Any]) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)


def other_buffers(model: nn.Module, data: Any, options: dict[str, Any]) -> None:
    model[1].running_mean.add_(0.1)  # type: ignore[index, operator]


def other_samples(model: nn.Module, data: Any, options: dict[str, Any]) -> None:
    data.tensors[0][:, 0].add_(0.1)


def another_seed(model: nn.Module, data: Any, options: dict[str, Any]) -> None:
    options["seed"] = 1


def other_layers(model: nn.Module, data: Any, options: dict[str, Any]) -> None:
    options["ignore"] = ["0"]


def another_loss(model: nn.Module, data: Any, options: dict[str, Any]) -> None:
    options["loss_fn"] = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")


def other_rows(model: nn.Module, data: Any, options: dict[str, Any]) -> None:
    options["method"] = LR(fisher="empirical")


@pytest.mark.parametrize(
    "change",
    but_long([other_weights, other_buffers, other_samples, another_seed, other_layers, another_loss, other_rows]),
)
def test_what_rows_depend_on_names_them(change: Any, tmp_path: Path) -> None:
    model, data, options = small_network(), small_data(80), {"recalibrate_batchnorm": False}
    run(tmp_path, model, data, **options)
    change(model, data, options)
    found, evidence = run(tmp_path, model, data, **options)
    assert "rows_reused" not in evidence and len(list(tmp_path.iterdir())) == 4
    assert same(found, run(None, model, data, **options)[0])


@pytest.mark.long
def test_rows_of_other_code_are_not_believed(tmp_path: Path) -> None:
    """The network has the same name, weights and samples, and does something else."""
    model, _, batch = perceptron()

    class Net(nn.Module):
        scale = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x)  # type: ignore[no-any-return]

    data = TensorDataset(*batch)
    run(tmp_path, Net(), data)
    Net.scale = 1.5
    found, evidence = run(tmp_path, Net(), data)
    assert "rows_reused" not in evidence and same(found, run(None, Net(), data)[0])
    assert "rows_reused" in run(tmp_path, Net(), data)[1]


@pytest.mark.parametrize("order", [("auto", "samples"), ("samples", "auto")])
def test_rows_of_another_number_of_draws_are_not_believed(order: tuple[str, str], tmp_path: Path) -> None:
    """Of one sample no mini-batch can be made: it gives a row, or where rows of samples are asked for several."""
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(60, 8), torch.arange(60) % 3)
    methods = [LR(rows=rows) for rows in order]  # type: ignore[arg-type]
    run(tmp_path, model, data, method=methods[0], samples=1)
    found, evidence = run(tmp_path, model, data, method=methods[1], samples=1)
    assert "rows_reused" not in evidence
    assert same(found, run(None, model, data, method=methods[1], samples=1)[0])


@pytest.mark.parametrize("order", [(16, 12), pytest.param((12, 16), marks=pytest.mark.long)])
def test_rows_of_mini_batches_of_another_size_are_not_believed(order: tuple[int, int], tmp_path: Path) -> None:
    """Of 40 samples sixteen at the most make three, and twelve four."""
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(120, 8), torch.arange(120) % 3)
    first, second = (LR(rows="mini-batches", mini_batch=size) for size in order)
    run(tmp_path, model, data, method=first, samples=40)
    found, evidence = run(tmp_path, model, data, method=second, samples=40)
    assert "rows_reused" not in evidence
    assert same(found, run(None, model, data, method=second, samples=40)[0])
    assert "rows_reused" in run(tmp_path, model, data, method=second, samples=40)[1]


class Weighted:
    """A loss that remembers how much each class counts, of which its type says nothing."""

    def __init__(self, counts: list[float]) -> None:
        self.counts = torch.tensor(counts)

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1], self.counts, reduction="none")


@pytest.mark.long
def test_rows_of_another_loss_of_the_same_name_are_not_believed(tmp_path: Path) -> None:
    """The first sample is of a class that counts alike in both."""
    model, data = small_network(), small_data(80)
    data.tensors[1][:] = torch.arange(80) % 3
    batches = [data.tensors]
    run(tmp_path, model, batches, loss_fn=Weighted([1.0, 50.0, 1.0]))
    found, evidence = run(tmp_path, model, batches, loss_fn=Weighted([1.0, 1.0, 50.0]))
    assert "rows_reused" not in evidence
    assert same(found, run(None, model, batches, loss_fn=Weighted([1.0, 1.0, 50.0]))[0])
    assert "rows_reused" in run(tmp_path, model, batches, loss_fn=Weighted([1.0, 1.0, 50.0]))[1]


def cut(fisher: Path, about: Path) -> None:
    fisher.write_bytes(fisher.read_bytes()[:-8])


def altered(fisher: Path, about: Path) -> None:
    content = bytearray(fisher.read_bytes())
    content[-3] ^= 1
    fisher.write_bytes(content)


def of_other_rows(fisher: Path, about: Path) -> None:
    about.write_text(json.dumps(json.loads(about.read_text()) | {"crc32": 1}))


def emptied(fisher: Path, about: Path) -> None:
    about.write_text("{")


def without_losses(fisher: Path, about: Path) -> None:
    about.write_text("{}")


def with_a_losses_past_counting(fisher: Path, about: Path) -> None:
    about.write_text(json.dumps(json.loads(about.read_text()) | {"losses": [10**400]}))


def nested(fisher: Path, about: Path) -> None:
    about.write_text(5000 * "[")


def headed(header: str) -> Any:
    def change(fisher: Path, about: Path) -> None:
        content = fisher.read_bytes()
        magic = content.index(b"{")
        fisher.write_bytes(content[:magic] + header.encode().ljust(_HEADER - magic, b"\0") + content[_HEADER:])

    return change


def gone(fisher: Path, about: Path) -> None:
    about.unlink()


HEADERS = ("[]", "3", "null", 3000 * "[", '{"version": 1, "shape": [-1, -5]}')


@pytest.mark.parametrize(
    "harm",
    but_long(
        [cut, altered, of_other_rows, emptied, without_losses, gone, with_a_losses_past_counting, nested]
        + [headed(header) for header in HEADERS],
        short=2,
    ),
)
def test_a_file_that_is_not_whole_is_made_anew(harm: Any, tmp_path: Path) -> None:
    model, data = small_network(), small_data(80)
    expected, _ = run(tmp_path, model, data)
    fisher, about = sorted(tmp_path.iterdir())
    harm(fisher, about)
    found, evidence = run(tmp_path, model, data)
    assert "rows_reused" not in evidence and same(found, expected)
    assert MappedFactor.open(fisher).shape[1] > 0
    assert "rows_reused" in run(tmp_path, model, data)[1]


def test_samples_without_content_to_compare_are_refused(tmp_path: Path) -> None:
    class Text:
        pass

    model, _, (x, y) = perceptron()
    texts, others = ([{"x": x, "y": y, "text": [f"{word} {i}" for i in range(40)]}] for word in ("one", "other"))

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(batch["x"]), batch["y"], reduction="none")

    with pytest.raises(ValueError, match=r"keep_rows cannot name these samples: a batch holds .*Text, whose"):
        run(tmp_path, model, [{"x": x, "y": y, "text": Text()}], loss_fn=loss)
    run(tmp_path, model, texts, loss_fn=loss)
    assert "rows_reused" in run(tmp_path, model, texts, loss_fn=loss)[1]
    assert "rows_reused" not in run(tmp_path, model, others, loss_fn=loss)[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scratch": None}, "keep_rows needs a directory to keep them in: give scratch="),
        ({"storage": "float32"}, "keep_rows needs storage 'mapped', which holds G in a file, got 'float32'"),
        ({"noise": "labels"}, "keep_rows keeps the gradients of the network as it is, and noise="),
    ],
)
def test_what_keeping_rows_needs(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        prune(model, small_data(80), 0.5, **{"scratch": tmp_path, "keep_rows": True, "progress": False} | options)
    assert same(before, model.state_dict()) and not list(tmp_path.iterdir())


def test_a_run_that_fails_after_capture_leaves_whole_rows(tmp_path: Path) -> None:
    class Failing(Asking):
        def solve(self, problem: Any, generator: torch.Generator) -> Any:
            raise ValueError("no")

    model, data = small_network(), small_data(80)
    with pytest.raises(ValueError, match="no"):
        run(tmp_path, model, data, method=Failing())
    assert len(list(tmp_path.iterdir())) == 2
    assert "rows_reused" in run(tmp_path, model, data)[1]


def test_a_directory_that_is_not_there_is_made(tmp_path: Path) -> None:
    run(tmp_path / "new" / "rows", small_network(), small_data(80))
    assert len(list((tmp_path / "new" / "rows").glob("G-*.fisher"))) == 1
    missing = tmp_path / "other" / "rows"
    forecast = plan(small_network(), small_data(80), 0.6, samples=40, scratch=missing, keep_rows=True)
    assert forecast.chosen is not None and not missing.exists()
