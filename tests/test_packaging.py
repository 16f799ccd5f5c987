"""What is installed: the version, the type marker, the embedded network and images."""

import importlib.metadata
import tomllib
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import swap_prune

ASSETS = files("swap_prune") / "assets"
NAMES = ["mlpnet_mnist.safetensors", "mnist_part.npz", "README.md"]


def test_version_is_the_one_in_pyproject():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    declared = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]
    assert swap_prune.__version__ == importlib.metadata.version("swap-prune") == declared


def test_command_points_at_the_command_line():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="swap-prune")
    assert script.value == "swap_prune.cli:main"


def test_type_marker_is_shipped():
    assert (files("swap_prune") / "py.typed").is_file()


def test_assets_are_small():
    assert sum(len((ASSETS / name).read_bytes()) for name in NAMES) < 2_000_000


@pytest.mark.parametrize("part, count", [("calibration", 2000), ("test", 4000)])
def test_images_load_without_pickle(part, count):
    with (ASSETS / "mnist_part.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    assert images.dtype == labels.dtype == np.uint8
    assert images.shape == (count, 28, 28)
    assert labels.shape == (count,)
    assert images.max() == 255
    assert set(labels.tolist()) == set(range(10))


def test_network_loads():
    with as_file(ASSETS / "mlpnet_mnist.safetensors") as path, safe_open(path, framework="numpy") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata()
    shapes = {"fc1.weight": (40, 784), "fc2.weight": (20, 40), "fc3.weight": (10, 20)}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    assert all(weight.dtype == np.float32 and np.isfinite(weight).all() for weight in weights.values())
    assert {"script", "seed", "test_accuracy"} <= metadata.keys()


def test_network_reaches_its_stated_accuracy():
    with (ASSETS / "mnist_part.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["test_images"], arrays["test_labels"]
    with as_file(ASSETS / "mlpnet_mnist.safetensors") as path, safe_open(path, framework="numpy") as file:
        weights = [file.get_tensor(f"fc{layer}.weight") for layer in (1, 2, 3)]
        stated = float(file.metadata()["test_accuracy"])
    hidden = (images.reshape(len(images), -1) / np.float32(255) - np.float32(0.1307)) / np.float32(0.3081)
    for weight in weights[:-1]:
        hidden = np.maximum(hidden @ weight.T, 0)
    accuracy = np.mean((hidden @ weights[-1].T).argmax(axis=1) == labels)
    assert 0.96 <= stated <= 1
    assert accuracy == pytest.approx(stated, abs=0.01)  # these 4000 are a part of the 10,000
