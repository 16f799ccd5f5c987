"""Makes what `swap-prune demo` carries with it: a trained MLPNet and a part of MNIST.

The network (784-40-20-10, ReLU, no biases) is trained to a minimum of cross-entropy with weight decay, by
Adam with a learning rate that falls to zero along a cosine: pruning by second-order methods supposes that
the gradient is about zero. The images are drawn without replacement, calibration from the 60,000 training
images and test from the 10,000 test images. One thread, fixed seeds, fixed time stamps: with the same
versions of torch, numpy and zlib a second run writes the same bytes.

    python scripts/make_demo_assets.py --data-dir DIR      # DIR/MNIST/raw/*.gz; or set SWAP_PRUNE_DATA
"""

import argparse
import io
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from swap_prune.experiments.datasets import load_dataset
from swap_prune.experiments.images import ImageTensors
from swap_prune.experiments.zoo import build_model

ASSETS = Path(__file__).resolve().parents[1] / "src" / "swap_prune" / "assets"
SEED = 0
EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY = 30, 250, 4e-3, 3e-3
CALIBRATION, TEST = 2000, 4000
SIZE_LIMIT = 1_700_000  # bytes, all assets together

README = """# Embedded demonstration data

`mnist_part.npz`: {calibration} training images (`calibration_images`, `calibration_labels`) and {test} test
images (`test_images`, `test_labels`) of MNIST; uint8, 28x28, pixels unchanged, drawn without replacement
with seed {seed}.

`mlpnet_mnist.safetensors`: MLPNet 784-40-20-10, ReLU, no biases, float32, trained on the 60,000 training
images, normalised with mean {mean} and standard deviation {std}. It labels {full:.2%} of all 10,000 test
images correctly, {part:.2%} of the {test} above.

Origin: the MNIST database of handwritten digits by Yann LeCun, Corinna Cortes and Christopher J.C. Burges.
Licence of the images, and of this selection from them: Creative Commons Attribution-Share Alike 3.0
(CC BY-SA 3.0), not the licence of the code.

Made by `python scripts/make_demo_assets.py --data-dir DIR`, where `DIR/MNIST/raw` holds the four original
files, gzipped. Running it again gives the same bytes.
"""


def train(x: Tensor, y: Tensor) -> nn.Module:
    """Trains on `(n, 1, 28, 28)` images; linear warm-up over one epoch, then a cosine down to zero."""
    torch.manual_seed(SEED)
    model, _ = build_model("mlpnet")
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    warm, total = len(x) // BATCH, EPOCHS * (len(x) // BATCH)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Fraction of the images that the model labels correctly."""
    return (model(x).argmax(dim=1) == y).double().mean().item()


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """What `numpy.savez_compressed` writes, with a fixed time stamp on every member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """What `safetensors.torch.save` returns, with a sorted header: it orders metadata by chance."""
    content = save(tensors, metadata)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def draw(size: int, count: int) -> Tensor:
    """`count` of the indices below `size`, without replacement, in the order drawn."""
    return torch.from_numpy(np.random.default_rng(SEED).choice(size, size=count, replace=False))


def replace_file(path: Path, content: bytes) -> None:
    """Writes under a temporary name and renames: the file is the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def mnist_split(split: object) -> ImageTensors:
    """The split itself, known to be the kind that keeps bytes in memory."""
    if not isinstance(split, ImageTensors):
        raise TypeError(f"mnist must load as ImageTensors, got {type(split).__name__}")
    return split


def make_assets(data_dir: Path) -> dict[str, bytes]:
    """Trains, measures, draws; file name -> content."""
    data = load_dataset("mnist", data_dir)
    train_set, test_set = mnist_split(data.train), mnist_split(data.test)
    model = train(*train_set.batch(torch.arange(len(train_set))))
    chosen = {"calibration": draw(len(train_set), CALIBRATION), "test": draw(len(test_set), TEST)}
    arrays = {}
    for part, split in (("calibration", train_set), ("test", test_set)):
        images, labels = split.read(chosen[part])
        arrays[f"{part}_images"] = images.squeeze(1).numpy()
        arrays[f"{part}_labels"] = labels.numpy().astype(np.uint8)
    full = accuracy(model, *test_set.batch(torch.arange(len(test_set))))
    part_accuracy = accuracy(model, *test_set.batch(chosen["test"]))
    metadata = {"script": "scripts/make_demo_assets.py", "seed": str(SEED), "test_accuracy": f"{full:.4f}"}
    readme = README.format(
        calibration=CALIBRATION,
        test=TEST,
        seed=SEED,
        mean=test_set.mean[0],
        std=test_set.std[0],
        full=full,
        part=part_accuracy,
    )
    return {
        "mlpnet_mnist.safetensors": safetensors_bytes(model.state_dict(), metadata),
        "mnist_part.npz": npz_bytes(arrays),
        "README.md": readme.encode(),
    }


def main() -> None:
    """Reads the arguments and writes the assets."""
    parser = argparse.ArgumentParser(description="Make the embedded network and images of `swap-prune demo`.")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("SWAP_PRUNE_DATA"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("--data-dir must name the folder that holds MNIST/raw, or set SWAP_PRUNE_DATA")
    torch.set_num_threads(1)
    assets = make_assets(arguments.data_dir)
    size = sum(map(len, assets.values()))
    if size > SIZE_LIMIT:
        parser.error(f"the assets must stay under {SIZE_LIMIT} bytes, got {size}: lower CALIBRATION, TEST")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, content in assets.items():
        replace_file(arguments.out / name, content)
        print(f"{arguments.out / name}: {len(content)} bytes")


if __name__ == "__main__":
    main()
