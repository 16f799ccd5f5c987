"""How accurate is a pruned MLPNet, without fine-tuning? A table over methods, sparsities and seeds.

    python benchmarks/mlpnet.py --weights mlpnet_mnist.safetensors --data-dir DIR

Every row uses the same seeds, hence the same calibration images; magnitude, which without noise is the same on every
seed, takes the first alone. A run that warms up comes first. The table goes to standard output as Markdown, the single
runs to standard error and, with ``--out``, to a JSON-lines file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from swap_prune import prune
from swap_prune.experiments.datasets import ImageData, load_dataset
from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.zoo import build_model
from swap_prune.weights_file import load_weights


def parsed() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--methods", nargs="+", default=["magnitude", "lr", "ewr"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.98])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--stages", type=lambda text: text if text == "auto" else int(text), default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--noise")
    parser.add_argument("--defence", default="auto")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure(options: argparse.Namespace, images: ImageData, method: str, sparsity: float, seed: int) -> dict[str, Any]:
    """Prune once, and say what came of it."""
    model, _ = build_model("mlpnet")
    load_weights(model, options.weights)
    asked = {"samples": options.samples, "noise": options.noise, "defence": options.defence}
    report = prune(model, images.train, sparsity, method, stages=options.stages, seed=seed, progress=False, **asked)
    accuracy = evaluate(model, images.test).accuracy
    run = {"method": method, "sparsity": sparsity, "seed": seed, "accuracy": accuracy, "stages": len(report.stages)}
    return run | asked | {"seconds": report.seconds}


def main() -> None:
    options = parsed()
    images = load_dataset("mnist", options.data_dir)
    measure(options, images, "magnitude", 0.5, 0)  # warms up
    print("| method | " + " | ".join(f"{s:g}" for s in options.sparsities) + " | seconds a run |")
    print("|---|" + "---|" * (len(options.sparsities) + 1))
    for method in options.methods:
        count = 1 if method == "magnitude" and options.noise is None else options.seeds
        cells, seconds = [], []
        for sparsity in options.sparsities:
            accuracies = []
            for seed in range(options.first_seed, options.first_seed + count):
                run = measure(options, images, method, sparsity, seed)
                accuracies.append(run["accuracy"])
                seconds.append(run["seconds"])
                line = json.dumps(run)
                print(line, file=sys.stderr, flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(line + "\n")
            error = statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else None
            cells.append(f"{statistics.mean(accuracies):.2f}" + (f" ± {error:.2f}" if error is not None else ""))
        print(f"| {method} | " + " | ".join(cells) + f" | {statistics.mean(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
