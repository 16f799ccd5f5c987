"""What does capturing G cost, against a plain backward pass through the same samples?

    python benchmarks/capture.py [--samples 256] [--networks mlpnet resnet20 mobilenetv1 resnet50 lstm encoder]
        [--device cuda] [--storage bfloat16]

A sample of mobilenetv1 or resnet50 is far larger than one of resnet20: on a CPU they get at most 32. Random weights and
random images, which the network sees channels last on a CPU, as in ``prune``: the time does not depend on their values.
``lstm`` and ``encoder`` are two layers of ``nn.LSTM``, both ways, and three of ``nn.TransformerEncoder``, of random
sequences of 100 and 64 steps.
The plain pass works on batches of 64. Per-sample rows are those of the empirical Fisher; mini-batch rows those that the
default takes where BatchNorm is recalibrated. Both go to the storage that is asked for. The three take turns.
"""

from __future__ import annotations

import argparse

import torch
from timing import best_times
from torch import Tensor, nn

from swap_prune.experiments.zoo import build_model
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.capture.sketch import sketch_curvature
from swap_prune.fisher.storage import Storage, StorageKind
from swap_prune.losses import cross_entropy
from swap_prune.network.layout import images_laid_out
from swap_prune.network.modes import eval_mode, exact_kernels
from swap_prune.samples.batches import split_batches
from swap_prune.selection import DEFAULT_TARGETS, select_parameters

_MOST = {"mobilenetv1": 32, "resnet50": 32}  # samples, on a CPU
_IMAGES = {"mlpnet": (1, 28, 28), "resnet20": (3, 32, 32), "mobilenetv1": (3, 224, 224), "resnet50": (3, 224, 224)}
_SEQUENCES = {"lstm": (100, 40), "encoder": (64, 256)}  # steps and width
_TARGETS = (*DEFAULT_TARGETS, "LSTM", "MultiheadAttention")
_CLASSES = 10


class Sequences(nn.Module):
    """A recurrent network or a transformer that tells classes of sequences apart."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "lstm":
            self.body: nn.Module = nn.LSTM(40, 128, 2, batch_first=True, bidirectional=True)
        else:
            layer = nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(256, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (n, classes), of sequences (n, steps, width)."""
        out = self.body(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


def measure(
    name: str, samples: int, device: str = "cpu", storage: StorageKind = "float32"
) -> tuple[float, float, float]:
    """Return the seconds of a plain backward pass, of per-sample rows and of mini-batch rows."""
    shape = _IMAGES.get(name) or _SEQUENCES[name]
    state = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build_model(name)[0] if name in _IMAGES else Sequences(name)
    place = torch.device(device)
    model.to(place)
    inputs = torch.randn(samples, *shape, generator=state).to(place)
    batch = (inputs, torch.randint(_CLASSES, (samples,), generator=state).to(place))
    kinds = {type(module).__name__ for module in model.modules()}
    selection = select_parameters(model, [target for target in _TARGETS if target in kinds])
    kept = Storage(storage, roomy=True)

    def plain() -> None:
        with eval_mode(model):
            for part in split_batches([batch], 64):
                cross_entropy(model, part).mean().backward()

    def mini_batches() -> None:
        signs = torch.Generator()
        sketch_curvature(model, selection, [batch], cross_entropy, signs, in_batches=True, storage=kept)

    def rows() -> None:
        capture_gradients(model, selection, [batch], cross_entropy, storage=kept)

    with images_laid_out(model, place.type == "cpu"), exact_kernels(place):
        forwards_and_back, by_sample, mixed = best_times([plain, rows, mini_batches], 3, place)
    return forwards_and_back, by_sample, mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--networks", nargs="+", default=list(_IMAGES)[:3], choices=[*_IMAGES, *_SEQUENCES])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--storage", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    print("| network | plain backward, s | per-sample rows | mini-batch rows |")
    print("|---|---|---|---|")
    for name in options.networks:
        most = _MOST.get(name, options.samples) if options.device == "cpu" else options.samples
        plain, rows, mixed = measure(name, min(options.samples, most), options.device, options.storage)
        print(f"| {name} | {plain:.3f} | {rows / plain:.2f} x | {mixed / plain:.2f} x |", flush=True)


if __name__ == "__main__":
    main()
