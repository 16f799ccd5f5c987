"""What does each way to hold G give, and what does it take?

    python benchmarks/storage.py [--samples 200]     # the embedded network: accuracy, and the kept set
    python benchmarks/storage.py --wide              # 784-3000-500-10, random: the most memory held, and the forecast

LR at 0.9, one stage, one thread, with its processor seconds and passes through the network. Each run is a process of
its own, so that its peak is its own; the share is that of float32's kept weights that are kept as well. The wide
network is random and keeps nothing worth measuring but its size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune import prune
from swap_prune.experiments.demo import embedded_data, embedded_network
from swap_prune.experiments.evaluate import evaluate
from swap_prune.fisher.storage import StorageKind
from swap_prune.pipeline import plan

STORAGES = [kind for kind in get_args(StorageKind) if kind != "sharded"]  # benchmarks/sharded.py
_WIDE_SAMPLES = 128


def measure(storage: str, samples: int, *, wide: bool) -> dict[str, Any]:
    """Prune with a storage, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if wide:
        model: nn.Module = nn.Sequential(nn.Linear(784, 3000), nn.ReLU(), nn.Linear(3000, 500), nn.Linear(500, 10))
        data, test = TensorDataset(torch.randn(2 * samples, 784), torch.randint(10, (2 * samples,))), None
    else:
        model, (data, test) = embedded_network(), embedded_data()
    forecast = plan(model, data, 0.9, "lr", samples=samples, storage=storage).require()
    started = time.process_time()
    report = prune(model, data, 0.9, "lr", samples=samples, storage=storage, progress=False)
    return {
        "storage": storage,
        "cpu_seconds": time.process_time() - started,
        "accuracy": None if test is None else evaluate(model, test).accuracy,
        "kept": [] if wide else torch.cat([p.detach().flatten() != 0 for p in model.parameters()]).nonzero().tolist(),
        "passes": report.stages[0].evidence.get("passes"),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,  # kilobytes on Linux
        "forecast_gb": forecast.need / 1e9,
    }


def measured_apart(storage: str, samples: int, *, wide: bool) -> dict[str, Any]:
    """Do the same in a process of its own."""
    command = [sys.executable, __file__, "--one", storage, "--samples", str(samples), *(["--wide"] if wide else [])]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="rows of G; 200, or 128 where the network is wide")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--one", choices=STORAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    samples = given.samples or (_WIDE_SAMPLES if given.wide else 200)
    if given.one:
        print(json.dumps(measure(given.one, samples, wide=given.wide)))
        return
    columns = ("peak, GB", "forecast, GB") if given.wide else ("accuracy, %", "kept set, %")
    print("| storage | " + " | ".join(columns) + " | processor seconds | passes |\n|---|---|---|---|---|")
    reference: set[int] = set()
    for storage in STORAGES:
        one = measured_apart(storage, samples, wide=given.wide)
        kept = {index for (index,) in one["kept"]}
        reference = reference or kept
        passes = "" if one["passes"] is None else sum(one["passes"][way] for way in ("along", "back", "rows"))
        if given.wide:
            cells = f"{one['peak_gb']:.2f} | {one['forecast_gb']:.2f}"
        else:
            cells = f"{one['accuracy']:.2f} | {100 * len(kept & reference) / len(reference):.2f}"
        print(f"| {storage} | {cells} | {one['cpu_seconds']:.1f} | {passes} |", flush=True)


if __name__ == "__main__":
    main()
