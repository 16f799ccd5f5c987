"""Image data sets: MNIST, CIFAR-10 and ImageNet from plain files, normalised a batch at a time.

A pixel v in [0, 255] becomes (v / 255 - mean) / std, per channel. Images stay bytes until asked for: MNIST's
and CIFAR-10's in memory, ImageNet's in their files. The first two are downloaded where they are not found.

Place in the pipeline: before it (images to prune with) and after it (images to measure accuracy on).
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from swap_prune.checks import user_path
from swap_prune.experiments.images import (
    AugmentedBatches,
    ImageFolder,
    ImageTensors,
    damaged,
)
from swap_prune.experiments.zoo import call_named

__all__ = [
    "DATASETS",
    "ImageData",
    "Source",
    "calibration_data",
    "load_dataset",
    "recalibration_data",
]


@dataclass(frozen=True)
class ImageData:
    """A data set: the split to prune and train with, and the split to measure on.

    The splits of `DATASETS` yield (image (C, H, W) float32 normalised, class int) and have `batch(indices)`.
    """

    name: str
    classes: int | None  # None where a user's loader does not say
    train: Dataset[Any] | Iterable[Any]
    test: Dataset[Any] | Iterable[Any]


@dataclass(frozen=True)
class Source:
    """Where a data set lies under the root folder, how it is normalised, and where it comes from."""

    folder: str
    train: tuple[str, ...]  # files, each possibly gzipped, or a folder
    test: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    downloads: tuple[tuple[str, str], ...] = ()  # address and MD5 of a gzipped file, or of a tar of the folder


_AUGMENTED = ("cifar10",)  # whose networks are trained with random crops and flips
_OTHER_STREAM = 0x5EED  # calibration and recalibration draw augmentations of their own
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
DATASETS: dict[str, Source] = {
    "mnist": Source(
        folder="MNIST/raw",
        train=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        test=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        mean=(0.1307,),
        std=(0.3081,),
        downloads=(
            (_MNIST + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            (_MNIST + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            (_MNIST + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            (_MNIST + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
    ),
    "cifar10": Source(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test=("test_batch.bin",),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        downloads=(("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
    ),
    "imagenet": Source("imagenet", ("train",), ("val",), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def load_dataset(
    name: str,
    data_dir: Path | str | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageData:
    """Load a data set by name.

    Args:
        name: A name of `DATASETS`, or `package.module:loader`, which is called without arguments, finds and
            normalises its own data, and returns an `ImageData` or a pair (train, test).
        data_dir: The folder that holds the data set's, and takes the download. Default: the folder named by
            the environment variable `SWAP_PRUNE_DATA`, then the cache, which takes the download.
        mean: Per-channel mean of pixels in [0, 1]; default the data set's own.
        std: Per-channel standard deviation; default the data set's own.

    Raises:
        ValueError: Unknown name, files neither found nor downloaded, damaged files, bad mean or std.
    """
    if ":" in name:
        return _call_loader(name)
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise ValueError(f"data must be {known} or package.module:loader, got {name!r}: correct the name")
    source = DATASETS[name]
    mean, std = source.mean if mean is None else mean, source.std if std is None else std
    folder = _find(name, source, data_dir)
    if name == "imagenet":
        wnids = _read_wnids(folder)
        splits = [ImageFolder(folder / part, wnids, mean, std) for part in source.train + source.test]
        return ImageData(name, len(wnids), *splits)
    read = _read_mnist if name == "mnist" else _read_cifar10
    tensors = [ImageTensors(*read(folder, files), mean, std) for files in (source.train, source.test)]
    return ImageData(name, 10, *tensors)


def calibration_data(images: ImageData, seed: int) -> Any:
    """Return what gradients are taken on: the training split, augmented where BatchNorm's statistics belong to that.

    Statistics of images as they are and of augmented ones make two different networks of the same weights; gradients
    should be those of the network that recalibration will leave.
    """
    if isinstance(images.train, ImageTensors) and images.name in _AUGMENTED:
        return images.train.augmented(seed ^ _OTHER_STREAM)
    return images.train


def recalibration_data(images: ImageData, seed: int) -> AugmentedBatches | None:
    """Return what BatchNorm is recalibrated from, where that is not the training split as it is.

    The statistics of CIFAR-10 networks belong to the training augmentation.
    """
    if isinstance(images.train, ImageTensors) and images.name in _AUGMENTED:
        return AugmentedBatches(images.train.augmented(seed), batch_size=250, seed=seed)
    return None


def _call_loader(spec: str) -> ImageData:
    """Return what a user's loader gives, as an ImageData."""
    result = call_named(spec, "data")
    if isinstance(result, ImageData):
        return result
    parts = result if isinstance(result, tuple | list) and len(result) == 2 else [None]
    if all(isinstance(part, Dataset | Iterable) and not isinstance(part, Tensor | str) for part in parts):
        return ImageData(spec, None, *parts)
    raise ValueError(
        "data must name a loader that returns ImageData or a pair (train, test) of Datasets or iterables of "
        f"batches, got {spec!r}, which returned {type(result).__name__}: return such a pair"
    )


def _existing(folder: Path, name: str) -> Path | None:
    """Return the path of a file or folder, plain or gzipped, if it is there."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _find(name: str, source: Source, data_dir: Path | str | None) -> Path:
    """Return the folder that holds all of the data set, downloading it where it is in none."""
    environment = os.environ.get("SWAP_PRUNE_DATA")
    places = [environment, "~/.cache/swap-prune/data"] if environment else ["~/.cache/swap-prune/data"]
    roots: list[Path] = []
    for place in places if data_dir is None else [data_dir]:
        roots.append(user_path(place))  # one by one: the home directory may not be known, and not be needed
        folder = roots[-1] / source.folder
        if all(_existing(folder, need) for need in source.train + source.test):
            return folder
    looked = " and ".join(str(root / source.folder) for root in roots)
    if not source.downloads:
        raise ValueError(
            f"data {name!r} must lie in DIR/{source.folder}/{{train,val}}/<wnid>/*.JPEG (ImageFolder layout, "
            f"class order in the optional classes.txt), got nothing complete in {looked}: it is never "
            "downloaded, so put it there, or name its DIR by data_dir (--data-dir)"
        )
    for url, md5 in source.downloads:
        try:
            _download(url, md5, roots[-1], source)
        except (OSError, HTTPException, tarfile.TarError, KeyError) as error:
            raise ValueError(
                f"data {name!r} must be on disk or downloadable, got nothing complete in {looked} and "
                f"{type(error).__name__} ({error}) from {url}: put {', '.join(source.train + source.test)} "
                f"there, or name the folder that holds {source.folder} by data_dir (--data-dir)"
            ) from error
    return roots[-1] / source.folder


def _download(url: str, md5: str, root: Path, source: Source) -> None:
    """Fetch a gzipped file, or a tar of several, verify it and move what is missing into place."""
    folder, file = root / source.folder, url.rpartition("/")[2]
    needs = source.train + source.test if file.endswith(".tar.gz") else (file.removesuffix(".gz"),)
    missing = [need for need in needs if _existing(folder, need) is None]
    if not missing:
        return
    with urllib.request.urlopen(url, timeout=20) as response:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary:
            fetched, digest = Path(temporary) / file, hashlib.md5(usedforsecurity=False)
            with fetched.open("wb") as out:
                while chunk := response.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() != md5:
                raise ValueError(
                    f"download {url} must have MD5 {md5}, got {digest.hexdigest()}: try again, or put the "
                    f"files in {folder} yourself"
                )
            parts = [fetched]
            if file.endswith(".tar.gz"):
                parts = [fetched.with_name(need) for need in missing]
                with tarfile.open(fetched) as archive:
                    for part in parts:
                        member = archive.extractfile(f"{folder.name}/{part.name}")
                        part.write_bytes(member.read() if member else b"")
            folder.mkdir(parents=True, exist_ok=True)
            for part in parts:
                part.replace(folder / part.name)


def _read_bytes(folder: Path, name: str) -> tuple[Path, bytearray]:
    """Return a file's path and its contents, unzipped."""
    path = _existing(folder, name) or folder / name
    try:
        return path, bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, "readable", str(error)) from error


def _read_idx(folder: Path, name: str, dimensions: int) -> tuple[Path, Tensor]:
    """Return a file's path and the bytes of its array, from the IDX format of MNIST."""
    path, raw = _read_bytes(folder, name)
    start = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < start:
        raise damaged(path, f"an IDX file of bytes in {dimensions} dimensions", f"header {raw[:4].hex()}")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if len(raw) != start + math.prod(shape) or not math.prod(shape):
        raise damaged(path, f"{start + math.prod(shape)} bytes and not empty", f"{len(raw)} bytes")
    return path, torch.frombuffer(raw, dtype=torch.uint8, offset=start).view(shape)


def _read_mnist(folder: Path, files: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, H, W) uint8 and classes (N,) int64."""
    (_, images), (path, labels) = _read_idx(folder, files[0], 3), _read_idx(folder, files[1], 1)
    if len(labels) != len(images) or labels.max() > 9:
        raise damaged(path, f"{len(images)} labels of 0 to 9", f"{len(labels)} up to {int(labels.max())}")
    return images.unsqueeze(1), labels.long()


def _read_cifar10(folder: Path, files: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) uint8 and classes (N,) int64."""
    records = []
    for path, raw in (_read_bytes(folder, name) for name in files):
        if not raw or len(raw) % 3073:
            raise damaged(path, "one or more records of 3073 bytes", f"{len(raw)} bytes")
        records.append(torch.frombuffer(raw, dtype=torch.uint8).view(-1, 3073))
        if records[-1][:, 0].max() > 9:
            raise damaged(path, "records with labels 0 to 9", f"label {int(records[-1][:, 0].max())}")
    table = torch.cat(records)
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def _read_wnids(folder: Path) -> list[str]:
    """Return the class folders' names in the order of classes.txt (first word a line), else sorted."""
    listing = folder / "classes.txt"
    if listing.exists():
        try:
            return [line.split()[0] for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise damaged(listing, "text in UTF-8", f"byte {error.object[error.start]:#x}") from error
    return sorted({path.name for part in ("train", "val") for path in (folder / part).iterdir() if path.is_dir()})
