"""How accurate is a pruned MLPNet, without fine-tuning? A table over methods, sparsities and seeds.

    python benchmarks/mlpnet.py --weights mlpnet_mnist.safetensors --data-dir DIR

Every row uses the same seeds, hence the same calibration images. The table goes to standard output as Markdown, the
single runs to standard error and, with ``--out``, to a JSON-lines file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from swap_prune import prune
from swap_prune.artifact import load_weights
from swap_prune.experiments.datasets import load_dataset
from swap_prune.experiments.evaluate import evaluate
from swap_prune.experiments.zoo import build_model


def main() -> None:
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
    options = parser.parse_args()
    images = load_dataset("mnist", options.data_dir)
    print("| method | " + " | ".join(f"{s:g}" for s in options.sparsities) + " | seconds a run |")
    print("|---|" + "---|" * (len(options.sparsities) + 1))
    for method in options.methods:
        cells, seconds = [], []
        for sparsity in options.sparsities:
            accuracies = []
            for seed in range(options.first_seed, options.first_seed + (options.seeds if method != "magnitude" else 1)):
                model, _ = build_model("mlpnet")
                load_weights(model, options.weights)
                report = prune(
                    model,
                    images.train,
                    sparsity,
                    method,
                    samples=options.samples,
                    stages=options.stages,
                    noise=options.noise,
                    defence=options.defence,
                    seed=seed,
                    progress=False,
                )
                accuracies.append(evaluate(model, images.test).accuracy)
                seconds.append(report.seconds)
                run = {"method": method, "sparsity": sparsity, "seed": seed, "accuracy": accuracies[-1]}
                run |= {
                    "stages": len(report.stages),
                    "samples": options.samples,
                    "noise": options.noise,
                    "defence": options.defence,
                }
                line = json.dumps(run | {"seconds": report.seconds})
                print(line, file=sys.stderr, flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(line + "\n")
            error = statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else None
            cells.append(f"{statistics.mean(accuracies):.2f}" + (f" ± {error:.2f}" if error is not None else ""))
        print(f"| {method} | " + " | ".join(cells) + f" | {statistics.mean(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
