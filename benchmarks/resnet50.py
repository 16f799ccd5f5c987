"""Does ResNet50 go through the default method within a budget of memory?

    python benchmarks/resnet50.py --storage low-rank --memory 6GB
    python benchmarks/resnet50.py --storage matrix-free --memory 3GB --samples 128 --few-passes

25.5 million weights in Linear and Conv layers, to 0.9 in one stage. Random weights and random images of 224 x 224, a
little brighter in the middle for half of the classes: what is measured is time and memory, not accuracy. One JSON
object with the forecast and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from swap_prune import LR, plan, prune
from swap_prune.experiments.zoo import build_model
from swap_prune.methods import Method
from swap_prune.process_memory import peak_memory


class RandomImages(Dataset[tuple[Tensor, int]]):
    """Images of 1000 classes, drawn when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image (3, 224, 224) and its class."""
        image = torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index))
        image[:, 56:168, 56:168] += index % 2
        return image, index % 1000


FEW_PASSES = LR(ridge=0.0025, damping=30.0, metric="diagonal", swaps=0, first_order=0, iterations=2)


def measure(storage: str, memory: str, samples: int, method: str | Method) -> dict[str, Any]:
    """Prune in this process."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, _ = build_model("resnet50")
    data = RandomImages(samples + samples // 4)
    options: dict[str, Any] = {"samples": samples, "storage": storage, "memory": memory}
    forecast = plan(model, data, 0.9, method, **options).require()
    report = prune(model, data, 0.9, method, **options)
    return {
        "storage": storage,
        "memory": memory,
        "method": method if isinstance(method, str) else repr(method),
        "samples": report.stages[0].samples,
        "kept": report.kept,
        "total": report.total,
        "seconds": round(report.seconds, 1),
        "passes": report.stages[0].evidence.get("passes"),
        "steps": len(report.stages[0].evidence.get("first_order", [])),
        "peak_gb": peak_memory() / 1e9,
        "forecast_gb": forecast.need / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="low-rank")
    parser.add_argument("--memory", default="6GB")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--method", default="ewr")
    parser.add_argument("--few-passes", action="store_true", help="LR with one candidate, no swaps and no steps")
    options = parser.parse_args()
    method = FEW_PASSES if options.few_passes else options.method
    print(json.dumps(measure(options.storage, options.memory, options.samples, method)))


if __name__ == "__main__":
    main()
