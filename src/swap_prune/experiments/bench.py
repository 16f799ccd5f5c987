"""What all runs of an experiment share: the dense network and the data, loaded and checked before any work."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from swap_prune.artifact import check_dense, weights_sha256
from swap_prune.checks import user_path
from swap_prune.experiments.config import Experiment
from swap_prune.experiments.datasets import ImageData, load_dataset, recalibration_data
from swap_prune.experiments.evaluate import Evaluation, evaluate
from swap_prune.experiments.images import iterate
from swap_prune.experiments.zoo import MODELS, build_model
from swap_prune.fisher.capture.layers import UnsupportedLayerError
from swap_prune.fisher.capture.low_rank import numbers_of_a_row
from swap_prune.losses import cross_entropy, errors_worded
from swap_prune.network.device import check_values
from swap_prune.network.layout import images_laid_out, takes_channels_last
from swap_prune.network.modes import exact_kernels
from swap_prune.randomness import seeded
from swap_prune.request import check_pattern, limits_of
from swap_prune.samples.calibration import CalibrationStream
from swap_prune.samples.numbered import known_length
from swap_prune.samples.peek import peek
from swap_prune.schedule import keep_count
from swap_prune.selection import Selection, select_parameters
from swap_prune.surgery.batchnorm import repair_batchnorm
from swap_prune.weights_file import load_weights

__all__ = ["Bench", "prepare", "repair"]


@dataclass(frozen=True)
class Bench:
    """What all runs of an experiment share: the dense network and where the data comes from.

    Attributes:
        experiment: The experiment.
        network: The dense network as its checkpoint has it.
        data_dir: Folder of the data sets, or None.
        device: Where to compute.
        images: The data set; None for a loader of the user's, which is called anew for each use, since its
            batches may be readable only once.
        scratch: Directory of temporary files; None: the system's.
        keep_rows: Whether G of first stages is left there for other runs, by methods that hold it in a file.
        memory: Budget of a run in bytes where the experiment gives none; None: what is free when it starts.
    """

    experiment: Experiment
    network: nn.Module
    data_dir: Path | None
    device: torch.device
    images: ImageData | None
    scratch: Path | None = None
    keep_rows: bool = False
    memory: int | None = None

    @property
    def weights_sha256(self) -> str:
        """Hash of the dense network's tensors and their names."""
        return weights_sha256(self.network)

    def data(self) -> ImageData:
        """Return the data set."""
        with seeded(0):
            return self.images or load_dataset(self.experiment.data, self.data_dir)

    def measure(self, network: nn.Module) -> Evaluation:
        """Evaluate on the test images, or the part of them that the experiment names."""
        test, limit = self.data().test, self.experiment.test_images
        if limit is None:
            return evaluate(network, test)
        length = known_length(test) if isinstance(test, Dataset) else None
        if length is None:
            raise ValueError("test_images needs test data that is a Dataset with a length; leave it out")
        order = torch.randperm(length, generator=torch.Generator().manual_seed(0), device="cpu")
        return evaluate(network, iterate(test, order[:limit].sort().values))

    def dense(self) -> nn.Module:
        """Return a copy of the dense network, its BatchNorm statistics repaired where they do not fit the data."""
        network = copy.deepcopy(self.network)
        repair(network, self.data(), self.experiment.seeds[0])
        return network


def repair(network: nn.Module, images: ImageData, seed: int) -> list[str]:
    """Repair a dense network's BatchNorm statistics in place, where they do not fit the data; return notes on it."""
    source, first = recalibration_data(images, seed) or images.train, next(network.parameters(), None)
    place = torch.device("cpu") if first is None else first.device
    stream = CalibrationStream(source, torch.Generator().manual_seed(seed), place)
    laid = takes_channels_last(network, cross_entropy, peek(source, place), backwards=False)
    with exact_kernels(place), images_laid_out(network, laid):
        return repair_batchnorm(network, stream, cross_entropy)


def prepare(
    experiment: Experiment, folder: Path, weights: Path | None, data_dir: Path | None, device: torch.device
) -> Bench:
    """Build and load what an experiment names, so that a mistake shows before any work.

    Args:
        experiment: The experiment.
        folder: Where its file lies; its weights are looked for there first.
        weights: Checkpoint to take instead of the experiment's.
        data_dir: Folder of the data sets, or None.
        device: Where to compute.

    Raises:
        ValueError: If something is missing or does not fit.
    """
    with seeded(0):  # a factory of the user's may draw its weights
        network, entry = build_model(experiment.model, **experiment.model_options)
    check_dense(network, "which an experiment cannot compare: leave it out")
    with errors_worded(lambda reason: f"a copy of the model is pruned in each run, and it cannot be copied: {reason}"):
        copy.deepcopy(network)
    path = weights if weights is not None else _find_weights(experiment.weights, folder, data_dir)
    if path is not None:
        load_weights(network, path)
    elif experiment.model in MODELS:
        raise ValueError(
            f"model {experiment.model!r} of the zoo has no weights of its own: name them by the key weights"
        )
    check_values(network)
    selection = select_parameters(network, experiment.targets, experiment.ignore)
    for sparsity in experiment.sparsities:
        keep = keep_count(selection.total, sparsity)
        limits_of(network, selection, keep, experiment.min_keep, experiment.pattern)
    _check_methods(experiment, network, selection)
    own = entry is not None and entry.dataset == experiment.data
    mean, std = (entry.mean, entry.std) if entry is not None and own else (None, None)
    with seeded(0):
        images = load_dataset(experiment.data, data_dir, mean=mean, std=std)
    return Bench(experiment, network.to(device), data_dir, device, None if ":" in experiment.data else images)


def _check_methods(experiment: Experiment, network: nn.Module, selection: Selection) -> None:
    """Refuse methods that cannot do what the experiment asks of all."""
    for method in experiment.methods:
        check_pattern(method.resolve(), experiment.pattern)
        if method.storage == "low-rank":
            try:
                numbers_of_a_row(network, selection, in_batches=False)
            except UnsupportedLayerError as error:
                raise ValueError(
                    f"method {method.label!r}: storage 'low-rank' does not hold such weights ({error})"
                ) from error


def _find_weights(name: str | None, folder: Path, data_dir: Path | None) -> Path | None:
    """Look for a checkpoint beside the experiment's file, then in the data directories."""
    if name is None:
        return None
    environment = os.environ.get("SWAP_PRUNE_DATA")
    roots = [folder, *([data_dir] if data_dir else []), *([Path(environment)] if environment else [])]
    paths = [(user_path(root) / user_path(name)).absolute() for root in roots]
    for path in paths:
        if path.exists():
            return path
    looked = " and ".join(dict.fromkeys(map(str, paths)))
    raise ValueError(f"weights: {name} was not found as {looked}; put it there, or name it by --weights FILE")
