"""How much memory and time does each process take, where several share G, and are the weights the same?

    torchrun --nproc-per-node N benchmarks/sharded.py [--samples 288] [--width 1200]

A network of random weights on random data. Each process prints one JSON object; "weights" is a digest of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import swap_prune
from swap_prune.distributed import team_of
from swap_prune.fisher.backends.sharded import owned_columns
from swap_prune.process_memory import peak_memory


def measure(samples: int, width: int) -> dict[str, Any]:
    """Prune in the process group that there is; return what this process took."""
    state = torch.Generator().manual_seed(0)
    images = torch.randn(2 * samples, 1000, generator=state)
    data = TensorDataset(images, torch.randint(50, (2 * samples,), generator=state))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(1000, width), nn.ReLU(), nn.Linear(width, 600), nn.ReLU(), nn.Linear(600, 50))
    started, used = time.perf_counter(), sum(os.times()[:2])
    report = swap_prune.prune(model, data, 0.9, "lr", samples=samples, progress=False)
    used, seconds = sum(os.times()[:2]) - used, time.perf_counter() - started
    with team_of(torch.device("cpu")) as team:
        own = sum(b - a for a, b in owned_columns(report.total, team))
    weights = torch.cat([t.flatten() for t in model.state_dict().values()])
    return {
        "process": f"{team.rank} of {team.size}",
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12],
        "p": report.total,
        "rows": report.stages[0].samples,
        "G_mb": round(4 * own * report.stages[0].samples / 1e6),
        "peak_mb": round(peak_memory() / 1e6),
        "cpu_seconds": round(used, 1),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=288)
    parser.add_argument("--width", type=int, default=1200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print(json.dumps(measure(arguments.samples, arguments.width)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
