"""Switches of torch that are set for a while."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune.fisher.capture.rows import Backend, capture_gradients
from swap_prune.losses import cross_entropy
from swap_prune.network.modes import batch_statistics, eval_mode, exact_kernels
from swap_prune.pipeline import prune
from swap_prune.samples.batches import slice_batch
from swap_prune.selection import select_parameters


def test_a_batchnorm_layer_that_is_frozen_stays_on_its_statistics() -> None:
    """By ``track_running_stats=False``: pruning asks the network as it will be used, and leaves them alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    frozen, data = model[1], TensorDataset(torch.randn(60, 1, 8, 8), torch.arange(60) % 3)
    assert isinstance(frozen, nn.BatchNorm2d) and frozen.running_mean is not None
    frozen.running_mean += 0.3
    frozen.track_running_stats = False
    x = data.tensors[0]
    with torch.no_grad(), batch_statistics(model):
        assert torch.equal(model(x), model.eval()(x))
    before = {name: value.clone() for name, value in frozen.state_dict().items() if "running" in name}
    report = prune(model, data, 0.5, "lr", samples=40, progress=False)
    assert all(torch.equal(frozen.state_dict()[name], value) for name, value in before.items())
    assert not frozen.track_running_stats and not any("BatchNorm" in note for note in report.notes)


PRECISION = hasattr(torch.backends.cudnn, "conv")


def test_recurrent_layers_on_cudnn_go_back_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their dropout, the one thing that is different there."""
    model = nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 3)
    with eval_mode(model):
        assert not model[0].training
        expected = model(x)[0]
    monkeypatch.setattr("swap_prune.network.modes._is_on_cudnn", lambda module: isinstance(module, nn.RNNBase))
    with eval_mode(model):
        assert model[0].training and not model.training and model[0].dropout == 0
        assert torch.equal(model(x)[0], expected)
    assert model[0].dropout == 0.5 and model[0].training


def switches() -> dict[str, object]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found: dict[str, object] = {"deterministic": cudnn.deterministic, "benchmark": cudnn.benchmark}
    if PRECISION:
        precisions = {name: one.fp32_precision for name, one in (("conv", cudnn.conv), ("rnn", cudnn.rnn))}
        return found | precisions | {"matmul": matmul.fp32_precision}
    return found | {"conv": cudnn.allow_tf32, "matmul": matmul.allow_tf32}


def test_cuda_computes_in_full_float32_for_a_while() -> None:
    before = switches()
    with exact_kernels(torch.device("cpu")):
        assert switches() == before
    with pytest.raises(KeyError), exact_kernels(torch.device("cuda")):
        inside = switches()
        raise KeyError
    assert inside["deterministic"] is True and inside["benchmark"] is False
    assert {inside["conv"], inside["matmul"]} == ({"ieee"} if PRECISION else {False})
    assert switches() == before


@pytest.mark.long
@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_what_a_caller_has_set_is_given_back(setting: str) -> None:
    """Of either kind of switch: torch refuses to read one kind where the other was set."""
    if "fp32_precision" in setting and not PRECISION:
        pytest.skip("torch has no such switch yet")
    code = "import torch\nfrom swap_prune.network.modes import exact_kernels\n"
    code += "from tests.network.test_modes import switches\n"
    code += f"{setting}\nbefore = switches()\n"
    code += "with exact_kernels(torch.device('cuda')), torch.backends.cudnn.flags(enabled=False): pass\n"
    code += "assert switches() == before\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Stopping(nn.Linear):
    """Is interrupted while its mode is set."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if not mode:
            raise KeyboardInterrupt
        return self


def test_modes_are_given_back_though_an_interruption_came_while_they_were_set() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Stopping(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        pass
    assert all(module.training for module in model.modules())


class Stem(nn.Module):
    """A convolution whose outputs become tokens, as in hybrid vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.after, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.norm(self.conv(x)).flatten(2).transpose(1, 2)).mean(1))


def test_gradients_of_one_sample_go_back_rightly_through_batchnorm() -> None:
    """torch mistakes the strides of what comes back, on a CPU."""
    torch.manual_seed(0)
    model = Stem().double()
    model.norm.running_var.uniform_(0.5, 2)
    x, weight = torch.randn(3, 2, 6, 6, dtype=torch.double), model.conv.weight
    with eval_mode(model):
        alone = [torch.autograd.grad(model(one).square().sum(), weight)[0] for one in x.split(1)]
        (together,) = torch.autograd.grad(model(x).square().sum(), weight)
    torch.testing.assert_close(sum(alone), together)
    assert not model.norm._forward_hooks


@pytest.mark.parametrize("backend", ["auto", "hooks", "vmap", "loop"])
def test_rows_of_one_sample_at_a_time_where_batchnorm_comes_before_tokens(backend: Backend) -> None:
    torch.manual_seed(0)
    model = Stem().double()
    model.norm.running_var.uniform_(0.5, 2)
    batch = torch.randn(5, 2, 6, 6, dtype=torch.double), torch.arange(5) % 3
    selection = select_parameters(model)
    expected = capture_gradients(model, selection, [batch], cross_entropy, backend="vmap").factor.matrix
    for batches in ([batch], [slice_batch(batch, i, i + 1) for i in range(5)]):
        found = capture_gradients(model, selection, batches, cross_entropy, backend=backend)
        torch.testing.assert_close(found.factor.matrix, expected)
        assert found.backend == ("hooks" if backend == "auto" else backend)


class Paired(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x.mean()


def test_batchnorm_may_return_what_it_likes() -> None:
    layer, x = Paired(3), torch.randn(1, 3, requires_grad=True)
    with eval_mode(layer):
        normed, mean = layer(x)
    assert normed.shape == (1, 3) and mean.ndim == 0
