"""What does each way to hold G give, and what does it take?

    python benchmarks/storage.py [--samples 200]     # the embedded network
    python benchmarks/storage.py --network wide      # 784-3000-500-10, random: what is measured is memory and time
    python benchmarks/storage.py --network mobilenetv1 --sparsity 0.5 --weights W.safetensors --data-dir DIR
    python benchmarks/storage.py ... --budgets 12GB 2GB 1GB    # instead: what is taken within each, by itself

LR, one stage, one thread: accuracy, the share of the weights kept by float32 that are kept as well, the most memory
that the process held and what was forecast, processor seconds, and passes through the network. Each run is a process of
its own, so that its peak is its own. On MobileNetV1 one ridge, damping and metric are given and no steps are taken: one
regression is solved, and what differs is its rounding alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune import LR, plan, prune
from swap_prune.experiments.datasets import load_dataset
from swap_prune.experiments.demo import embedded_data, embedded_network
from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.zoo import build_model
from swap_prune.fisher.storage import StorageKind
from swap_prune.methods import Method
from swap_prune.process_memory import peak_memory
from swap_prune.weights_file import load_weights

STORAGES = [kind for kind in get_args(StorageKind) if kind != "sharded"]  # benchmarks/sharded.py
_SAMPLES = {"embedded": 200, "wide": 128, "mobilenetv1": 1000}


def prepare(
    network: str, samples: int, weights: Path | None, data_dir: Path | None
) -> tuple[nn.Module, Any, Any, Method]:
    """Return a network, its calibration data, its test data or None, and the method."""
    torch.manual_seed(0)
    if network == "embedded":
        return embedded_network(), *embedded_data(), LR()
    if network == "wide":
        model = nn.Sequential(nn.Linear(784, 3000), nn.ReLU(), nn.Linear(3000, 500), nn.Linear(500, 10))
        data = TensorDataset(torch.randn(2 * samples, 784), torch.randint(10, (2 * samples,)))
        return model, data, None, LR()
    if weights is None:
        raise SystemExit("MobileNetV1 needs --weights")
    model, entry = build_model(network, width=0.75)
    assert entry is not None, "it is of the zoo"
    images = load_dataset(entry.dataset, data_dir, mean=entry.mean, std=entry.std)
    method = LR(ridge=0.025, damping=1.0, metric="diagonal", first_order=0)
    return load_weights(model, weights), images.train, images.test, method


def measure(
    storage: str,
    network: str,
    samples: int,
    sparsity: float = 0.9,
    weights: Path | None = None,
    data_dir: Path | None = None,
    memory: str | None = None,
) -> dict[str, Any]:
    """Prune with a storage, or within a budget, in this process."""
    torch.set_num_threads(1)
    model, data, test, method = prepare(network, samples, weights, data_dir)
    forecast = plan(model, data, sparsity, method, samples=samples, storage=storage, memory=memory).require()
    started = time.process_time()
    report = prune(model, data, sparsity, method, samples=samples, storage=storage, memory=memory, progress=False)
    seconds = time.process_time() - started
    peak = peak_memory() / 1e9
    parameters = dict(model.named_parameters())
    kept = torch.cat([parameters[name].detach().flatten() != 0 for name in report.layers])
    passes = report.stages[0].evidence.get("passes")
    return {
        "storage": forecast.name,
        "at_once": forecast.storage.at_once,
        "spilled": forecast.storage.spilled,
        "accuracy": None if test is None else evaluate(model, test).accuracy,
        "kept": kept.nonzero().squeeze(1).tolist(),
        "peak_gb": peak,
        "forecast_gb": forecast.need / 1e9,
        "cpu_seconds": seconds,
        "passes": None if passes is None else sum(passes[way] for way in ("along", "back", "rows")),
    }


def measured_apart(storage: str, memory: str | None, arguments: list[str]) -> dict[str, Any]:
    """Do the same in a process of its own."""
    command = [
        sys.executable,
        __file__,
        *arguments,
        "--one",
        storage,
        *([] if memory is None else ["--memory", memory]),
    ]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(_SAMPLES), default="embedded")
    parser.add_argument("--samples", type=int, help="of calibration")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=STORAGES, help="float32 first")
    parser.add_argument("--budgets", nargs="+", default=[], help="such as 2GB; the largest first")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    samples = given.samples or _SAMPLES[given.network]
    if given.one:
        run = (given.one, given.network, samples, given.sparsity, given.weights, given.data_dir, given.memory)
        print(json.dumps(measure(*run)))
        return
    ways: list[tuple[str, str | None]] = [(storage, None) for storage in given.storages]
    if given.budgets:
        ways = [("auto", budget) for budget in given.budgets]
        print("| budget | storage | at once | in files | ", end="")
    else:
        print("| storage | ", end="")
    print("accuracy, % | kept set, % | peak, GB | forecast, GB | processor seconds | passes |")
    print("|---" * (10 if given.budgets else 7) + "|", flush=True)
    reference: set[int] = set()
    for storage, budget in ways:
        one = measured_apart(storage, budget, sys.argv[1:])
        kept = set(one["kept"])
        reference = reference or kept
        cells = ["" if one["accuracy"] is None else f"{one['accuracy']:.2f}"]
        cells += [f"{100 * len(kept & reference) / len(reference):.2f}"]
        cells += [f"{one['peak_gb']:.2f}", f"{one['forecast_gb']:.2f}", f"{one['cpu_seconds']:.1f}"]
        cells += ["" if one["passes"] is None else f"{one['passes']}"]
        if budget is not None:
            cells = [budget, one["storage"], str(one["at_once"]), one["spilled"], *cells]
        else:
            cells = [storage, *cells]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
