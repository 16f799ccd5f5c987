"""The demo: an embedded MNIST network pruned with magnitude, LR and EWR, with clean and with noisy gradients.

Everything it needs is in the package. It writes a self-contained page with a picture, and the figures as JSON.
"""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.side_by_side import side_by_side
from swap_prune.experiments.zoo import MODELS, build_model
from swap_prune.files import write_directory
from swap_prune.methods import METHODS
from swap_prune.pipeline import prune
from swap_prune.report import PruningReport
from swap_prune.weights_file import load_weights

__all__ = ["embedded_data", "embedded_network", "run_demo"]

SPARSITY = 0.95
SAMPLES = 400
STAGES = 5
NOISE = "gradient:std=4,fraction=0.25"
_ORDER = ("magnitude", "lr", "ewr")
_COLOURS = {"dense": "#9aa0a6", "clean": "#2f6db3", "noisy": "#d9822b"}


def embedded_network() -> nn.Module:
    """Return the MLPNet (784-40-20-10) of the package, trained by ``scripts/make_demo_assets.py``."""
    model, _ = build_model("mlpnet")
    with as_file(files("swap_prune") / "assets" / "mlpnet_mnist.safetensors") as path:
        return load_weights(model, path)


def embedded_data() -> tuple[TensorDataset, TensorDataset]:
    """Return the package's part of MNIST: calibration and test images, normalised."""
    entry = MODELS["mlpnet"]
    with as_file(files("swap_prune") / "assets" / "mnist_part.npz") as path, np.load(path, allow_pickle=False) as part:

        def split(name: str) -> TensorDataset:
            pixels = torch.from_numpy(part[f"{name}_images"]).float().unsqueeze(1) / 255
            labels = torch.from_numpy(part[f"{name}_labels"]).long()
            return TensorDataset((pixels - entry.mean[0]) / entry.std[0], labels)

        return split("calibration"), split("test")


def run_demo(target: Path, seed: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the demo and write its report.

    Args:
        target: Directory for the report; it must not exist or be empty, and appears whole or not at all.
        seed: Seed of every run.
        say: Called with progress messages.

    Returns:
        One row a method: name, clean and noisy accuracy in percent (noisy None where gradients are not used)
        and seconds of both runs.
    """
    rows: dict[str, dict[str, Any]] = {
        name: {"method": name, "clean": None, "noisy": None, "seconds": 0.0} for name in ("dense", *_ORDER)
    }
    conditions = [(name, noise) for noise in (NOISE, None) for name in reversed(_ORDER)]  # the longest runs first
    conditions = [one for one in conditions if one[1] is None or METHODS[one[0]].needs_gradients]
    runs = [(name, noise, SAMPLES, STAGES, seed) for name, noise in conditions]
    pixels: dict[str, Tensor] = {}
    say(f"{len(runs)} runs, each on one thread ...")
    with side_by_side(_run, runs, torch.get_num_threads(), embedded_data) as results:
        _, test = embedded_data()
        rows["dense"]["clean"] = evaluate(embedded_network(), test).accuracy
        for done in results:
            condition = "clean" if done.pixels is not None else "noisy"
            say(f"{done.method}, {condition} gradients: {done.accuracy:.2f} % in {done.seconds:.0f} s")
            rows[done.method][condition] = done.accuracy
            rows[done.method]["seconds"] += done.seconds
            if done.pixels is not None:
                pixels[done.method] = torch.tensor(done.pixels)
    table = list(rows.values())
    _write(target, table, _draw(table, {name: pixels[name] for name in _ORDER}), len(test), seed)
    return table


class _Done(NamedTuple):
    """A run: its method, accuracy in percent, seconds, and pixels read, (28, 28), where gradients were clean."""

    method: str
    accuracy: float
    seconds: float
    pixels: list[list[int]] | None


def _run(
    data: tuple[TensorDataset, TensorDataset], method: str, noise: str | None, samples: int, stages: int, seed: int
) -> _Done:
    """Prune the embedded network, and measure it."""
    started = time.perf_counter()
    (calibration, test), model = data, embedded_network()
    report = prune(
        model, calibration, SPARSITY, method, samples=samples, stages=stages, noise=noise, seed=seed, progress=False
    )
    _check(report)
    accuracy = evaluate(model, test).accuracy
    pixels = _inputs_read(model).tolist() if noise is None else None
    return _Done(method, accuracy, time.perf_counter() - started, pixels)


def _check(report: PruningReport) -> None:
    assert report.kept == report.stages[-1].kept, "the model does not have the sparsity that was asked for"


def _inputs_read(model: nn.Module) -> Tensor:
    """Count, for each input pixel, the first-layer weights that are left: (28, 28)."""
    weight = dict(model.named_parameters())["fc1.weight"]
    return (weight != 0).sum(0).reshape(28, 28)


def _draw(rows: list[dict[str, Any]], pixels: dict[str, Tensor]) -> bytes:
    from matplotlib.figure import Figure  # slow to import, and a run needs none

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    top, bottom = halves
    bars = top.subplots()
    for place, row in enumerate(rows):
        shown = [(c, row[c]) for c in ("clean", "noisy") if row[c] is not None]
        for i, (condition, value) in enumerate(shown):
            x = place + (i - (len(shown) - 1) / 2) * 0.38
            colour = _COLOURS["dense" if row["method"] == "dense" else condition]
            bars.bar(x, value, 0.36, color=colour)
            bars.text(x, value + 0.8, f"{value:.2f}", ha="center", va="bottom", fontsize=9)
    for condition, label in (("clean", "clean gradients"), ("noisy", "noisy gradients (4 sigma on 25 % of entries)")):
        bars.bar(0, 0, color=_COLOURS[condition], label=label)
    bars.set_xticks(range(len(rows)), [row["method"] for row in rows])
    bars.set_ylim(0, 114)
    bars.set_yticks(range(0, 101, 20))
    bars.set_ylabel("test accuracy, %")
    bars.set_title(f"MLPNet on MNIST with {100 * SPARSITY:.0f} % of its weights removed, no fine-tuning", fontsize=12)
    bars.spines[["top", "right"]].set_visible(False)
    bars.legend(frameon=False, loc="upper right", ncols=2)
    maps = bottom.subplots(1, len(pixels))
    limit = max(int(counts.max()) for counts in pixels.values())
    for axis, (name, counts) in zip(maps, pixels.items(), strict=True):
        image = axis.imshow(counts.numpy(), cmap="magma", vmin=0, vmax=limit)
        axis.set_title(f"{name}: {int((counts > 0).sum())} of 784 pixels still read", fontsize=10)
        axis.set_axis_off()
    bottom.colorbar(image, ax=maps, shrink=0.8, label="weights left at each pixel")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _write(target: Path, rows: list[dict[str, Any]], picture: bytes, test_images: int, seed: int) -> None:
    settings = {"sparsity": SPARSITY, "samples": SAMPLES, "stages": STAGES, "noise": NOISE, "seed": seed}
    body = "".join(
        f"<tr><td>{html.escape(row['method'])}</td><td>{row['clean']:.2f}</td>"
        f"<td>{'-' if row['noisy'] is None else format(row['noisy'], '.2f')}</td><td>{row['seconds']:.1f}</td></tr>"
        for row in rows
    )
    error = 100 * (0.9 * 0.1 / test_images) ** 0.5
    page = _PAGE.format(
        picture=base64.b64encode(picture).decode(),
        rows=body,
        test_images=test_images,
        error=f"{error:.1f}",
        settings=html.escape(", ".join(f"{name} {value}" for name, value in settings.items())),
    )
    results = json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n"
    write_directory(
        target, {"results.json": results.encode(), "picture.png": picture, "report.html": page.encode("utf-8")}
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>swap-prune demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ width: 100% }} table {{ border-collapse: collapse }} td, th {{ padding: .3rem 1rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} tr {{ border-bottom: 1px solid #ddd }} .small {{ color: #666 }}
</style>
<h1>Pruning an MNIST network</h1>
<img alt="Test accuracy of each method, and the input pixels that each pruned network still reads"
     src="data:image/png;base64,{picture}">
<table><tr><th>method</th><th>clean gradients, %</th><th>noisy gradients, %</th><th>seconds</th></tr>{rows}</table>
<p>Accuracy on {test_images} test images; one standard error near 90 % is {error} points. Magnitude pruning uses no
gradients, so noise cannot reach it. LR and EWR also move the weights that stay.</p>
<p class="small">One seed. Settings: {settings}. Data: a part of MNIST (LeCun, Cortes and Burges), CC BY-SA 3.0.</p>
</html>
"""
