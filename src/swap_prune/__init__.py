"""swap-prune: prune trained networks by sparse entropic Wasserstein regression.

One call, ``prune(model, data, sparsity)``, on any ``torch.nn.Module``; start reading at ``pipeline.py``.
"""

from swap_prune.artifact import load_pruned, load_report
from swap_prune.fisher.noise import (
    AdversarialInputs,
    AnalogMemory,
    GradientNoise,
    InputNoise,
    LabelNoise,
    NoiseModel,
    PoisonedRows,
)
from swap_prune.losses.distillation import SelfDistillation
from swap_prune.losses.tokens import TokenCrossEntropy
from swap_prune.losses.values import BinaryCrossEntropy, SquaredError
from swap_prune.memory.planning import MemoryPlan
from swap_prune.methods import CBS, CHITA, EWR, LR, METHODS, OBD, Magnitude, SparseGPT, Wanda, WoodFisher
from swap_prune.pipeline import plan, prune
from swap_prune.report import PruningReport
from swap_prune.selection import DEFAULT_TARGETS
from swap_prune.training.finetune import FineTuneReport, finetune
from swap_prune.training.masks import MaskKeeper, keep_masks, masks_of
from swap_prune.training.recalibration import recalibrate_batchnorm
from swap_prune.training.settings import FineTune

__all__ = [
    "CBS",
    "CHITA",
    "DEFAULT_TARGETS",
    "EWR",
    "LR",
    "METHODS",
    "OBD",
    "AdversarialInputs",
    "AnalogMemory",
    "BinaryCrossEntropy",
    "FineTune",
    "FineTuneReport",
    "GradientNoise",
    "InputNoise",
    "LabelNoise",
    "Magnitude",
    "MaskKeeper",
    "MemoryPlan",
    "NoiseModel",
    "PoisonedRows",
    "PruningReport",
    "SelfDistillation",
    "SparseGPT",
    "SquaredError",
    "TokenCrossEntropy",
    "Wanda",
    "WoodFisher",
    "__version__",
    "finetune",
    "keep_masks",
    "load_pruned",
    "load_report",
    "masks_of",
    "plan",
    "prune",
    "recalibrate_batchnorm",
]

__version__ = "0.19.0"
