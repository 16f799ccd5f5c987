"""Published figures and real checkpoints, where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from swap_prune.cli import app, run
from tests.cases import but_long

SHARED = Path(__file__).parents[2] / "shared"
CHECKPOINTS = Path(os.environ.get("SWAP_PRUNE_CHECKPOINTS", SHARED / "checkpoints"))
DATA = Path(os.environ.get("SWAP_PRUNE_DATA", SHARED / "data"))

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not (CHECKPOINTS.is_dir() and DATA.is_dir()), reason="no checkpoints or data at hand"),
]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    command = [*arguments, "--data-dir", str(DATA), "--json"]
    assert run(lambda: app(args=command, standalone_mode=False)) == 0
    return json.loads(capsys.readouterr().out)


def mlpnet(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    weights = str(CHECKPOINTS / "mlpnet_mnist.safetensors")
    return call(capsys, "prune", "--model", "mlpnet", "--data", "mnist", "--weights", weights, *arguments)


@pytest.mark.parametrize(("sparsity", "published"), [("0.90", 90.30), ("0.95", 83.64), ("0.98", 32.25)])
def test_magnitude_pruning_gives_the_published_figures(
    capsys: pytest.CaptureFixture[str], sparsity: str, published: float
) -> None:
    assert mlpnet(capsys, "--method", "magnitude", "--sparsity", sparsity)["accuracy"] == pytest.approx(published)


@pytest.mark.parametrize(("sparsity", "published", "spread"), but_long([("0.90", 91.97, 0.5), ("0.95", 87.17, 0.8)]))
def test_chita_is_where_its_own_code_is(
    capsys: pytest.CaptureFixture[str], sparsity: str, published: float, spread: float
) -> None:
    result = mlpnet(capsys, "--method", "chita", "--sparsity", sparsity, "--samples", "1000")
    assert result["accuracy"] == pytest.approx(published, abs=spread)


@pytest.mark.parametrize(
    ("method", "published"), but_long([("woodfisher", 91.7), ("cbs", 93.1), ("obd", 88.6)], short=[("obd", 88.6)])
)
def test_baselines_are_near_the_published_figures_at_90_percent(
    capsys: pytest.CaptureFixture[str], method: str, published: float
) -> None:
    result = mlpnet(capsys, "--method", method, "--sparsity", "0.9", "--samples", "500")
    assert result["accuracy"] == pytest.approx(published, abs=1.5)


@pytest.mark.long
def test_one_stage_of_lr_is_far_above_magnitude(capsys: pytest.CaptureFixture[str]) -> None:
    result = mlpnet(capsys, "--method", "lr", "--sparsity", "0.95", "--samples", "500")
    assert result["accuracy"] > 83.64 + 2


@pytest.mark.long
def test_resnet20_is_repaired_and_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_prune.surgery.batchnorm.RECALIBRATION_SAMPLES", 1000)
    weights = str(CHECKPOINTS / "resnet20_cifar10.safetensors")
    result = call(capsys, "eval", "--model", "resnet20", "--data", "cifar10", "--weights", weights)
    assert result["accuracy"] > 90.5 and result["notes"]


@pytest.mark.slow
def test_mobilenetv1_has_its_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    weights = str(CHECKPOINTS / "mobilenetv1_075_224_imagenet.safetensors")
    result = call(capsys, "eval", "--model", "mobilenetv1", "--data", "imagenet", "--weights", weights)
    assert result["accuracy"] == pytest.approx(100 * 505 / 650, abs=0.2)
