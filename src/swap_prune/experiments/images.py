"""Images served to a model: kept as bytes in memory or in files, normalised and augmented by the batch.

A pixel v in [0, 255] becomes (v / 255 - mean) / std, per channel.

Place in the pipeline: before it (images to prune with) and after it (images to measure accuracy on).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Subset

from swap_prune.randomness import uniform

__all__ = ["AugmentedBatches", "AugmentedImages", "ImageFolder", "ImageTensors", "Images", "damaged", "iterate"]


class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images kept as bytes and normalised when asked for; a subclass says where the bytes are."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep the normalisation: per-channel mean and standard deviation of pixels in [0, 1]."""
        self.mean, self.std = tuple(mean), tuple(std)
        if not self.mean or len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(
                f"mean and std must be of equal length with std > 0, got mean={self.mean}, std={self.std}: "
                "give one number a channel"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes (n, C, H, W) and the classes (n,) int64 of the images `indices` (n,)."""
        raise NotImplementedError

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised images (n, C, H, W) float32 and classes (n,) int64 of `indices` (n,)."""
        pixels, labels = self.read(indices)
        return self.normalise(pixels), labels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return (pixels / 255 - mean) / std as float32, for bytes (n, C, H, W)."""
        if pixels.shape[1] != len(self.mean):
            raise ValueError(
                f"mean and std must have one number for each of {pixels.shape[1]} channels, got "
                f"{len(self.mean)}: give those of this data set"
            )
        std = torch.tensor(self.std, device="cpu").view(-1, 1, 1)
        shift = torch.tensor(self.mean, device="cpu").view(-1, 1, 1) / std
        return pixels.float().div_(255 * std).sub_(shift)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one normalised image (C, H, W) and its class."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several images at once: what a `DataLoader` calls."""
        images, labels = self.batch(torch.as_tensor(indices, dtype=torch.long))
        return list(zip(images, labels.tolist(), strict=True))


class ImageTensors(Images):
    """Images in memory."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep images (N, C, H, W) uint8 and classes (N,) int64."""
        super().__init__(mean, std)
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                "images must be uint8 (N, C, H, W) with N labels, got "
                f"{images.dtype} {tuple(images.shape)} with labels {tuple(labels.shape)}: convert them"
            )
        self.images, self.labels = images, labels.long()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes (n, C, H, W) and the classes (n,) int64 of the images `indices` (n,)."""
        return self.images[indices], self.labels[indices]

    def augmented(self, seed: int) -> AugmentedImages:
        """Return these images with random crops and flips."""
        return AugmentedImages(self, seed)


class AugmentedImages(ImageTensors):
    """Images padded with 4 black pixels, cropped back at random, and flipped half the time, anew at each access.

    Black means bytes of 0, before the normalisation.
    """

    def __init__(self, images: ImageTensors, seed: int) -> None:
        """Share the images' memory; `seed` starts the stream that crops and flips are drawn from by default."""
        super().__init__(images.images, images.labels, images.mean, images.std)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return augmented images (n, C, H, W) float32 and classes (n,) int64 of `indices` (n,)."""
        source = self.generator if generator is None else generator
        pixels, labels = self.read(indices)
        pixels = pad(pixels, (4, 4, 4, 4))
        count, channels, height, width = len(pixels), pixels.shape[1], *self.images.shape[2:]
        top, left = torch.randint(9, (2, count, 1), generator=source, device="cpu")
        flip = uniform((count, 1), source) < 0.5
        rows = top + torch.arange(height, device="cpu")
        columns = left + torch.where(flip, torch.arange(width, device="cpu").flip(0), torch.arange(width, device="cpu"))
        crops = pixels[
            torch.arange(count, device="cpu")[:, None, None, None],
            torch.arange(channels, device="cpu")[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        return self.normalise(crops), labels


class AugmentedBatches:
    """Augmented images in batches: each iteration is one pass in a new order, reproducible from the seed."""

    def __init__(self, images: AugmentedImages, batch_size: int, seed: int) -> None:
        self._images = images
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one pass of (images, classes) batches."""
        order = torch.randperm(len(self._images), generator=self._generator, device="cpu")
        for start in range(0, len(order), self._batch_size):
            yield self._images.batch(order[start : start + self._batch_size], self._generator)


class ImageFolder(Images):
    """Images in `folder/<wnid>/*.JPEG`, listed at the first use and decoded when asked for, 224x224."""

    def __init__(self, folder: Path, wnids: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep the folder; the class of an image is the position of its folder's name in `wnids`."""
        super().__init__(mean, std)
        self.folder, self.wnids = folder, tuple(wnids)

    @cached_property
    def files(self) -> tuple[tuple[Path, int], ...]:
        """Files and their classes, by folder and file name."""
        number = {wnid: index for index, wnid in enumerate(self.wnids)}
        files = []
        for path in sorted(self.folder.glob("*/*")):
            if path.suffix.lower() in (".jpeg", ".jpg", ".png"):
                if path.parent.name not in number:
                    raise ValueError(f"image folders must be listed in classes.txt, got {path.parent}: add or move it")
                files.append((path, number[path.parent.name]))
        if not files:
            raise ValueError(f"{self.folder} must hold <wnid>/*.JPEG, got no image: put the images there")
        return tuple(files)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Decode, on a few threads, the bytes (n, 3, 224, 224) of `indices` (n,); classes (n,) int64."""
        paths, labels = zip(*(self.files[index] for index in indices.tolist()), strict=True)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(_decode, paths))), torch.tensor(labels, device="cpu")


def _decode(path: Path) -> Tensor:
    """Return the centre of an image as bytes (3, 224, 224).

    A shorter side above 256 or below 224 is first resized to 256, as torchvision's evaluation does.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"{path} must be decoded by Pillow, which is missing: pip install pillow") from error
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged(path, "an RGB image", str(error)) from error
    if not 224 <= min(image.size) <= 256:
        width, height = (int(256 * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in image.size)
    crop = image.crop((left, top, left + 224, top + 224))
    return torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1)


def iterate(
    dataset: Dataset[Any] | Iterable[Any], indices: Tensor | None = None, batch_size: int = 256
) -> Iterator[Any]:
    """Yield (inputs, targets) batches in order.

    Args:
        dataset: Images, any other Dataset of pairs, or an iterable of batches, which are yielded as they are.
        indices: Which images (n,), all by default; not for an iterable of batches.
        batch_size: Images a batch; the last may be smaller.

    Raises:
        ValueError: `batch_size` below 1, or indices of an iterable.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}: give a positive number")
    if isinstance(dataset, Images):
        chosen = torch.arange(len(dataset), device="cpu") if indices is None else indices
        for start in range(0, len(chosen), batch_size):
            yield dataset.batch(chosen[start : start + batch_size])
    elif isinstance(dataset, Dataset):
        part = dataset if indices is None else Subset(dataset, indices.tolist())
        # Its own generator, for a DataLoader draws from the global one even when it does not shuffle.
        yield from DataLoader(part, batch_size=batch_size, generator=torch.Generator())
    elif indices is None:
        yield from dataset
    else:
        raise ValueError(f"indices must be None for an iterable of batches, got {len(indices)} indices: give a Dataset")


def damaged(path: Path, constraint: str, got: str) -> ValueError:
    """Return the error of a file that is not what its name promises."""
    return ValueError(f"data file {path} must be {constraint}, got {got}: delete it and fetch it again")
