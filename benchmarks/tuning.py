"""What does it cost that settings are chosen on held-out samples, and what is it worth?

    python benchmarks/tuning.py [--weights mlpnet_mnist.safetensors --data-dir DIR]

MLPNet in one stage, no fine-tuning; without weights the embedded network. ``one candidate`` is one regression: ridge,
damping, metric and floor are given, and no step is taken. Then all candidates are compared, then they take steps, then
a coupling is tried as well. Seconds are of whole runs, capture included, the least of a few in turns. What is given,
and what is left to choose, is in ``WAYS``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from swap_prune import EWR, LR, prune
from swap_prune.experiments.datasets import load_dataset
from swap_prune.experiments.demo import embedded_data, embedded_network
from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.zoo import build_model
from swap_prune.weights_file import load_weights

WAYS = {
    "one candidate": LR(ridge=0.025, damping=1.0, metric="diagonal", floor=0.0, first_order=0),
    "candidates compared": LR(first_order=0),
    "with steps: `lr`": LR(),
    "with a coupling: `ewr`": EWR(),
}


def measure(way: str, sparsity: float, options: argparse.Namespace) -> tuple[float, float]:
    """Prune once; return the accuracy, in percent, and the seconds."""
    if options.weights is None:
        model, (train, test) = embedded_network(), embedded_data()
    else:
        images = load_dataset("mnist", options.data_dir)
        model, train, test = build_model("mlpnet")[0], images.train, images.test
        load_weights(model, options.weights)
    report = prune(model, train, sparsity, WAYS[way], samples=options.samples, progress=False)
    return evaluate(model, test).accuracy, report.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.98])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measure("one candidate", 0.5, options)  # warms up
    print("| sparsity | settings | accuracy, % | seconds | times the first |")
    print("|---|---|---|---|---|")
    for sparsity in options.sparsities:
        found = [[measure(way, sparsity, options) for way in WAYS] for _ in range(options.rounds)]
        first = min(runs[0][1] for runs in found)
        for place, way in enumerate(WAYS):
            accuracy, seconds = found[0][place][0], min(runs[place][1] for runs in found)
            print(f"| {sparsity:g} | {way} | {accuracy:.2f} | {seconds:.2f} | {seconds / first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
