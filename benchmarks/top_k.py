"""What does the search for the k largest scores cost, against ``torch.topk``?

    python benchmarks/top_k.py [--sizes 1000000 25000000]

One thread; k is a tenth, and half, of the scores. Memory is the most that is held while the search runs beyond what was
held before, each measured in a process of its own. Only Linux forgets an earlier peak: elsewhere it may be too low.
"""

from __future__ import annotations

import argparse
import multiprocessing

import torch
from timing import best_time
from torch import Tensor

from swap_prune.process_memory import held_memory, peak_memory, reset_peak_memory, return_free_memory
from swap_prune.regression.top_k import top_k


def by_torch(scores: Tensor, keep: int) -> Tensor:
    """Return what torch finds, in increasing order; which of equal scores, it does not say."""
    return torch.topk(scores, keep, sorted=False).indices.sort().values


def measure(size: int, keep: int, searched: bool) -> tuple[float, float]:
    """Return seconds, and the MB that a search takes beside the scores."""
    scores = torch.randn(size, generator=torch.Generator().manual_seed(0)).square_()  # a copy would count as a peak
    find = top_k if searched else by_torch
    find(scores[:1000], 10)
    return_free_memory()
    reset_peak_memory()
    before = held_memory()
    find(scores, keep)
    grown = peak_memory() - before
    return best_time(lambda: find(scores, keep)), grown / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 25_000_000])
    print(f"{'p':>10} {'k':>10} {'':>8} {'seconds':>9} {'MB':>6}")
    for size in parser.parse_args().sizes:
        for keep in (size // 10, size // 2):
            for searched in (False, True):
                with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
                    seconds, grown = pool.apply(measure, (size, keep, searched))
                print(f"{size:>10} {keep:>10} {'search' if searched else 'torch':>8} {seconds:9.3f} {grown:6.0f}")


if __name__ == "__main__":
    main()
