"""Tensors in files: the same values and gradients, and no memory that they stay in."""

from __future__ import annotations

import errno
import gc
import os
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import TensorDataset

from swap_prune import EWR, METHODS, prune
from swap_prune.memory.planning import plan_memory
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.samples.spill import Spill, _Segment, can_spill
from tests.cases import but_long
from tests.test_pipeline import small_data, small_network
from tests.test_process_memory import load

pytestmark = pytest.mark.skipif(not can_spill(torch.device("cpu")), reason="this system does not let pages go")
Pair = namedtuple("Pair", ["left", "right"])
CPU_BITS = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", CPU_BITS)
def test_values_strides_and_containers_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(2 * 3 * 5 * 7).remainder(3).view(2, 3, 5, 7).to(dtype)
    laid = values.to(memory_format=torch.channels_last)
    batch = {"images": laid, "pair": Pair(values[:, 1:, ::2], [values[:0], "name", None]), "number": torch.tensor(3)}
    kept = Spill(tmp_path).keep(batch)
    assert torch.equal(kept["images"], laid) and kept["images"].stride() == laid.stride()
    assert kept["images"].dtype == dtype and kept["images"].data_ptr() != laid.data_ptr()
    assert isinstance(kept["pair"], Pair) and torch.equal(kept["pair"].left, batch["pair"].left)
    assert kept["pair"].right[0].shape == (0, 3, 5, 7) and kept["pair"].right[1:] == ["name", None]
    assert int(kept["number"]) == 3
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_what_lies_in_a_file_stays_there_and_sparse_tensors_in_memory() -> None:
    spill = Spill()
    kept, index = spill.keep((torch.randn(4, 8), torch.arange(4)))
    again = spill.keep((kept[1:], index))
    assert again[0].data_ptr() == kept[1:].data_ptr() and again[1] is index
    sparse = torch.eye(3).to_sparse()
    assert spill.keep([sparse])[0] is sparse


def resident(spill: Spill) -> int:
    """Bytes of the files' pages that the process holds."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        place = re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line)
        if place:
            inside = any(int(place[1], 16) in own for own in spill._files.values())
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_pages_are_let_go_and_come_back() -> None:
    size, spill = 64 * 2**20, Spill()
    kept = spill.keep(torch.arange(size // 4, dtype=torch.float32))
    assert resident(spill) == 0, "written, and not held"
    assert float(kept[-1]) == size // 4 - 1 and float(kept.double().sum()) == (size // 4) * (size // 4 - 1) / 2
    assert resident(spill) == size, "read again"
    spill.let_go()
    assert resident(spill) == 0
    assert float(kept[12345]) == 12345 and 0 < resident(spill) < size // 4


@pytest.mark.long
def test_a_file_goes_with_its_last_tensor() -> None:
    spill = Spill()
    kept = spill.keep([torch.randn(100), torch.randn(100)])
    part = kept[0][3:5]
    del kept
    gc.collect()
    assert len(spill._files) == 1
    del part
    gc.collect()
    assert len(spill._files) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_said_before_anything_is_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=rf"no file of 4 MB could be made in {tmp_path} .*{os.strerror(code)}"):
        Spill(tmp_path).keep(torch.zeros(10**6))
    with pytest.raises(ValueError, match="scratch="):
        Spill(tmp_path / "nowhere").keep(torch.zeros(10))


def test_a_disk_that_cannot_be_asked_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    values = torch.randn(1000)
    assert torch.equal(Spill().keep(values), values)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 28 * 28, 3)
    )


def test_gradients_are_the_same_to_the_bit_and_activations_are_not_held() -> None:
    model, inputs = convolutional(), torch.randn(8, 3, 32, 32)
    plain = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
    spill = Spill(activations=True)
    with spill.around():
        value = model(inputs).square().sum()
        assert len(spill._files) == 1, "inputs of convolutions, BatchNorm and ReLU"
        spilled = torch.autograd.grad(value, list(model.parameters()))
    gc.collect()
    assert len(spill._files) == 0, "what a backward pass has used is free"
    assert all(map(torch.equal, plain, spilled))


def test_weights_are_not_written_and_what_two_layers_share_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes: list[int] = []
    add = _Segment.add
    monkeypatch.setattr(_Segment, "add", lambda self, tensor: sizes.append(tensor.numel()) or add(self, tensor))
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    inputs = torch.randn(256, 512)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with Spill(activations=True).around():
        functional_call(model, weights, (inputs,)).square().sum().backward()
    assert sizes == [256 * 512] * 3, "what goes into each layer"

    class Shared(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x.sigmoid()
            return self[0](h) + self[1](h) + h.square()

    sizes.clear()
    with Spill(activations=True).around():
        value = Shared(*model)(inputs.requires_grad_()).sum()
    value.backward()
    assert sizes == [256 * 512]


def test_many_small_files_are_not_needed() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(60)))
    spill = Spill(activations=True)
    with spill.around():
        value = model(torch.randn(512, 256)).sum()
        assert 1 <= len(spill._files) <= 2, "512 kB each"
        value.backward()


def test_what_is_changed_in_place_later_has_the_gradient_of_what_it_was() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).sigmoid()
            y = self.b(h)
            return y + (h.mul_(0.5) if self.training else h * 0.5)

    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(3, 4)
    plain = torch.autograd.grad(model.eval()(x).square().sum(), list(model.parameters()))
    with Spill(activations=True).around():
        value = model.train()(x).square().sum()
    changed = torch.autograd.grad(value, list(model.parameters()))
    for one, other in zip(plain, changed, strict=True):
        torch.testing.assert_close(one, other)


def test_parts_of_a_network_that_are_called_alone_let_go_too() -> None:
    spill = Spill(activations=True)
    kept, model = spill.keep(torch.randn(2**22)), convolutional()
    with spill.around():
        kept.sum()
        assert resident(spill) == 2**24
        part = model[0](torch.randn(32, 3, 32, 32))
        assert resident(spill) == 0
        assert len(spill._files) == 2, "its input is kept for the backward pass"
        part.sum().backward()


def test_an_interrupted_call_leaves_no_hooks() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    spill = Spill(activations=True)
    with pytest.raises(KeyboardInterrupt), spill.around():
        nn.Sequential(Interrupted())(torch.zeros(1))
    torch.randn(2**20, requires_grad=True).square().sum()
    assert len(spill._files) == 0


def test_second_derivatives_and_functorch_pass_through() -> None:
    model, inputs = convolutional().eval(), torch.randn(4, 3, 32, 32)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(state: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return functional_call(model, state, (sample[None],)).square().sum()

    def second() -> torch.Tensor:
        weight = model[3].weight
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    rows, curved = vmap(grad(loss), (None, 0))(weights, inputs), second()
    with Spill(activations=True).around():
        again = vmap(grad(loss), (None, 0))(weights, inputs)
        assert all(torch.equal(rows[name], again[name]) for name in rows)
        assert torch.equal(second(), curved)


def test_a_network_that_fails_leaves_nothing_behind() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    model, spill = nn.Sequential(Failing()), Spill(activations=True)
    for _ in range(2):
        with pytest.raises(RuntimeError), spill.around():
            model(torch.zeros(1))
    assert not model._forward_pre_hooks and not model._forward_hooks
    large = torch.randn(2**18, requires_grad=True)
    large.square().sum()
    assert len(spill._files) == 0, "no hook on saved tensors is left"


@pytest.mark.parametrize("spilled", ["samples", "activations"])
@pytest.mark.parametrize(
    "method",
    but_long([*METHODS, EWR(epsilon=0.1, anchor=0.1)], short=["magnitude", "wanda", "sparsegpt"]),
    ids=lambda method: str(method)[:7],
)
def test_a_run_has_the_same_bits(spilled: str, method: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.samples.spill._LEAST", 64)
    monkeypatch.setattr("swap_prune.memory.planning._SPARING", ((16, spilled),))
    networks = []
    for where in ("memory", "files"):
        with monkeypatch.context() as patch:
            if where == "memory":
                patch.setattr(Spill, "keep", lambda _self, batch: batch)
            model = small_network()
            report = prune(model, small_data(200), 0.7, method, samples=100, stages=2, progress=False)
        networks.append(model.state_dict())
        if report.settings["storage"] is not None:
            assert report.settings["storage"]["spilled"] == spilled
            assert any("lie in files" in note for note in report.notes)
    assert all(torch.equal(one, networks[1][name]) for name, one in networks[0].items())


def test_draws_are_the_same_and_lie_in_files(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(50, 4), torch.arange(50))
    batches = [(torch.randn(6, 4), torch.arange(6)) for _ in range(5)]
    for source in (lambda: data, lambda: batches, lambda: iter(batches)):
        spill = Spill(tmp_path)
        streams = [
            CalibrationStream(source(), torch.Generator().manual_seed(0), size=8, keep=keep)
            for keep in (None, spill.keep)
        ]
        drawn = [(stream.draw(10), *stream.draw_apart(10, 5)) for stream in streams]
        plain, kept = ([batch for part in parts for batch in part] for parts in drawn)
        assert len(plain) == len(kept)
        for (x, y), (a, b) in zip(plain, kept, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)
            assert not spill._can_be_mapped(a), "it lies in a file"


def test_files_are_taken_before_fewer_samples_run_at_once_and_only_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: known(path)._replace(free=10**11))
    sizes = {"kept_bytes": 10**8, "largest_bytes": 10**6, "sample_bytes": 10**6}
    work = replace(load(10, 1000), samples=5000, can_spill=True, **sizes)
    held = plan_memory(work, None, "float32", tmp_path).require()
    assert held.storage.spilled == "nothing" and held.disk == 0
    filed = plan_memory(work, held.need - 10**6, "float32", tmp_path).require()
    assert (filed.storage.spilled, filed.storage.at_once) == ("samples", 64) and filed.disk == 5000 * 10**6
    assert held.need - filed.need > 10**9
    least = plan_memory(work, 1, "float32", tmp_path).forecasts[-1]
    assert least.need < filed.need // 3
    short = plan_memory(work, least.need, "float32", tmp_path)
    assert short.require().storage.spilled == "activations" and short.require().storage.at_once == 8
    monkeypatch.setattr(shutil, "disk_usage", lambda path: known(path)._replace(free=4 * 10**9))
    full = plan_memory(work, least.need, "float32", tmp_path)
    assert full.chosen is None and "its file needs 6.6 GB" in full.why
    nowhere = plan_memory(work, held.need - 10**6, "float32", tmp_path / "nowhere")
    assert nowhere.chosen is None or nowhere.chosen.storage.spilled == "nothing"


def test_nothing_of_a_call_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs = x.sigmoid()
            seen.append(StorageWeakRef(outputs.untyped_storage()))
            return outputs

    seen: list[StorageWeakRef] = []
    for least in (1, 2**18):
        monkeypatch.setattr("swap_prune.samples.spill._LEAST", least)
        with Spill(activations=True).around():
            Kept()(torch.randn(100, requires_grad=True))
    assert [one.expired() for one in seen] == [True, True]
