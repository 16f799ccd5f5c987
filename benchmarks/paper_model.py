"""What would a large network take, by the forecasts alone? ResNet50, and a decoder of a billion weights.

    python benchmarks/paper_model.py [--networks resnet50 decoder] [--samples 256 1024] [--json]

Nothing is pruned. The memory is what `prune` forecasts before it does any work (LR, 0.9, one stage): with 64 samples
through the network at once, and at the least, with eight and their activations in files. The time of a solve is
arithmetic: forty passes over G, a little more than benchmarks/solver.py prints at the most, each as long as reading G
at the measured speed of a copy; without G, as long as a forward and a backward pass through the samples, of which one
is measured, after one that warms up. Files are taken to be read as fast as memory, so theirs is a lower bound. The
decoder has random weights, blocks of self-attention and an MLP, and predicts 128 tokens; ResNet50 has random weights
and images of 224 x 224.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from timing import best_time
from torch import Tensor, nn
from torch.nn import functional

from swap_prune import TokenCrossEntropy, plan
from swap_prune.experiments.zoo import build_model
from swap_prune.losses import LossFn, cross_entropy
from swap_prune.process_memory import return_free_memory
from swap_prune.selection import select_parameters

_PASSES = 40  # over G in one solve, a little more than benchmarks/solver.py counts
_KINDS = ("float32", "float16", "mapped", "matrix-free", "low-rank")
_COPIED = 2**28  # bytes of the copy that measures bandwidth
_VOCABULARY, _TOKENS = 32000, 128


class Block(nn.Module):
    """Self-attention over the tokens before, and an MLP: 12 width^2 weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (n, tokens, width) to the same."""
        n, tokens, width = hidden.shape
        parts = self.query_key_value(self.norms[0](hidden)).view(n, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.output(mixed.transpose(1, 2).reshape(n, tokens, width))
        return hidden + self.down(functional.gelu(self.up(self.norms[1](hidden))))


class Decoder(nn.Module):
    """A decoder of 20 blocks of width 2,048: 1.007e9 weights in them, beside the embedding, which is tied."""

    def __init__(self, width: int = 2048, blocks: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(blocks)))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens (n, T) to logits (n, T, vocabulary)."""
        return functional.linear(self.blocks(self.embedding(input_ids)), self.embedding.weight)


def resnet50() -> tuple[nn.Module, Any, LossFn]:
    """Return the network, the data set of one sample, and the loss."""
    return build_model("resnet50")[0], (torch.randn(1, 3, 224, 224), torch.zeros(1, dtype=torch.long)), cross_entropy


def decoder() -> tuple[nn.Module, Any, LossFn]:
    """Return the same."""
    tokens = torch.randint(_VOCABULARY, (1, _TOKENS))
    return Decoder(), {"input_ids": tokens, "labels": tokens.roll(-1, 1)}, TokenCrossEntropy()


_NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any, LossFn]]] = {"resnet50": resnet50, "decoder": decoder}


def copy_rate() -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source), 10)


def measure(network: str, counts: list[int]) -> list[dict[str, Any]]:
    """Forecast runs of one network, with each number of samples and in each storage."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, sample, loss_fn = _NETWORKS[network]()
    backward, rate = best_time(lambda: loss_fn(model, sample).sum().backward(), 1), copy_rate()
    model.zero_grad(set_to_none=True)
    return_free_memory()  # what is held counts in the forecasts
    p = select_parameters(model).total
    rows = []
    for count in counts:
        data = [sample] * count
        options: dict[str, Any] = {"loss_fn": loss_fn, "samples": count, "defence": None}
        usual, least = (
            {one.name: one for one in plan(model, data, 0.9, "lr", memory=memory, **options).forecasts}
            for memory in (10**18, 1)  # nothing fits a byte: those forecasts are of the most sparing way
        )
        whole = usual["mapped"].disk  # n rows of p numbers in four bytes
        read = {"float32": whole, "float16": whole / 2, "mapped": whole}
        for name in _KINDS:
            seconds = backward * count if name == "matrix-free" else read.get(name, math.nan) / rate
            rows.append(
                {
                    "network": network,
                    "p": p,
                    "samples": count,
                    "storage": name,
                    "bytes": usual[name].need,
                    "least_bytes": least[name].need,
                    "file_bytes": usual[name].disk,
                    "solve_seconds": None if math.isnan(seconds) else _PASSES * seconds,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(_NETWORKS), default=list(_NETWORKS))
    parser.add_argument("--samples", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of the table")
    options = parser.parse_args()
    rows = [row for network in options.networks for row in measure(network, options.samples)]
    if options.json:
        print(json.dumps(rows))
        return
    print("| network | p | samples | storage | GB | at the least, GB | file, GB | a solve, seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = " | ".join(f"{row[key] / 1e9:.2f}" for key in ("bytes", "least_bytes", "file_bytes"))
        seconds = "-" if row["solve_seconds"] is None else f"{row['solve_seconds']:.0f}"
        first = f"| {row['network']} | {row['p']} | {row['samples']} | {row['storage']} "
        print(first + f"| {sizes} | {seconds} |")


if __name__ == "__main__":
    main()
