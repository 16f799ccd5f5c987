"""The pruning papers' models, with the layer names of their public checkpoints, and how a user names one.

MLPNet (MNIST), ResNet20 (CIFAR-10), MobileNetV1 and ResNet50 (ImageNet) are defined here. `build_model` turns
a word of `MODELS` or `package.module:factory` into an `nn.Module`. Weights are drawn by PyTorch's defaults
from the caller's random state: seed before the call or load a checkpoint after it.

Place in the pipeline: before it; an experiment or the command line builds the model that `prune` changes.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from swap_prune.checks import first_line
from swap_prune.methods import Method, resolve_method
from swap_prune.options import parse_setting
from swap_prune.process_memory import pass_on_shortage

__all__ = [
    "MODELS",
    "MLPNet",
    "MobileNetV1",
    "ResNet20",
    "ResNet50",
    "ZooEntry",
    "build_model",
    "call_named",
    "import_named",
    "named_method",
]


class MLPNet(nn.Module):
    """Multilayer perceptron 784-40-20-10 with ReLU and no biases: 32,360 weights.

    Source: the MLPNet of WoodFisher (Singh and Alistarh, 2020), used since by CBS and CHITA.
    """

    def __init__(self) -> None:
        """Make the three linear layers."""
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, 10) of images (n, 1, 28, 28) or (n, 784)."""
        hidden = functional.relu(self.fc1(images.flatten(1)))
        logits: Tensor = self.fc3(functional.relu(self.fc2(hidden)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        """Make a block from `inputs` to `channels` channels; the first convolution strides."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(inputs, channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, channels, h / stride, w / stride) from (n, inputs, h, w)."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.downsample(images))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut, the stride on the 3x3 (ResNet v1.5)."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        """Make a block from `inputs` to `4 * channels` channels."""
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, 4 * channels, h / stride, w / stride) from (n, inputs, h, w)."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)))
        return functional.relu(self.bn3(self.conv3(hidden)) + self.downsample(images))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return 1x1 convolution and BatchNorm where the shape changes, else the identity (no keys)."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(block: type[BasicBlock | Bottleneck], inputs: int, channels: int, count: int, stride: int) -> nn.Sequential:
    """Return `count` residual blocks; the first one changes the width and strides."""
    rest = (block(channels * block.expansion, channels, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, channels, stride), *rest)


class ResNet20(nn.Module):
    """CIFAR-10 ResNet of 20 layers, 1x1-convolution shortcuts, linear head with bias: 272,474 parameters.

    Source: He et al. (2016), section 4.2; the shortcuts are those of the pruning papers' checkpoint.
    """

    def __init__(self) -> None:
        """Make three stages of three blocks, of 16, 32 and 64 channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(BasicBlock, 16, 16, 3, 1)
        self.layer2 = _stage(BasicBlock, 16, 32, 3, 2)
        self.layer3 = _stage(BasicBlock, 32, 64, 3, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, 10) of images (n, 3, 32, 32)."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


class ResNet50(nn.Module):
    """ImageNet ResNet50 v1.5 with torchvision's parameter names: 25,557,032 parameters."""

    def __init__(self) -> None:
        """Make the stem and stages of 3, 4, 6 and 3 bottlenecks."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(Bottleneck, 64, 64, 3, 1)
        self.layer2 = _stage(Bottleneck, 256, 128, 4, 2)
        self.layer3 = _stage(Bottleneck, 512, 256, 6, 2)
        self.layer4 = _stage(Bottleneck, 1024, 512, 3, 2)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, 1000) of images (n, 3, 224, 224)."""
        hidden = functional.max_pool2d(functional.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


class ConvUnit(nn.Module):
    """Convolution, BatchNorm (eps 1e-3) and ReLU6, padded as TensorFlow's `SAME` for even image sizes."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        """Make a unit with a `kernel` of 1 or 3; with stride 2 only the right and the bottom are padded."""
        super().__init__()
        self.pad_right_bottom = stride == 2
        padding = 0 if self.pad_right_bottom else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, images: Tensor) -> Tensor:
        """Return (n, outputs, h / stride, w / stride) from (n, inputs, h, w)."""
        padded = functional.pad(images, (0, 1, 0, 1)) if self.pad_right_bottom else images
        return functional.relu6(self.bn(self.conv(padded)))


class MobileNetV1(nn.Module):
    """ImageNet MobileNet of depthwise separable convolutions (Howard et al., 2017, table 1).

    With width 0.75 it has 2,585,560 parameters.
    """

    CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    def __init__(self, width: float = 0.75) -> None:
        """Make the network with `int(c * width)` channels for every c of the paper.

        Raises:
            ValueError: `width` is not a number that leaves at least one channel.
        """
        super().__init__()
        if not isinstance(width, int | float) or not 1 / 32 <= width < float("inf"):
            raise ValueError(
                f"width must be a finite number of at least 1/32, got {width!r}: give the multiplier of the "
                "checkpoint, for example width=0.75"
            )
        inputs = int(32 * width)
        self.stem = ConvUnit(3, inputs, 3, stride=2)
        blocks = []
        for channels, stride in zip(self.CHANNELS, self.STRIDES, strict=True):
            outputs = int(channels * width)
            depthwise = ConvUnit(inputs, inputs, 3, stride=stride, groups=inputs)
            blocks.append(nn.Sequential(depthwise, ConvUnit(inputs, outputs, 1)))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, 1000) of images (n, 3, 224, 224)."""
        hidden = self.blocks(self.stem(images))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class ZooEntry:
    """A model of the zoo and what its checkpoints expect."""

    name: str
    factory: Callable[..., nn.Module]  # draws the weights from the caller's random state
    dataset: str  # the data set it is evaluated on
    mean: tuple[float, ...]  # per channel, subtracted from pixels in [0, 1]
    std: tuple[float, ...]  # per channel, divides the result
    options: tuple[str, ...] = ()  # names of the keyword options of the factory


MODELS: dict[str, ZooEntry] = {
    entry.name: entry
    for entry in (
        ZooEntry("mlpnet", MLPNet, "mnist", (0.1307,), (0.3081,)),
        ZooEntry("resnet20", ResNet20, "cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ZooEntry("mobilenetv1", MobileNetV1, "imagenet", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ("width",)),
        ZooEntry("resnet50", ResNet50, "imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
}


def build_model(spec: str, /, **options: Any) -> tuple[nn.Module, ZooEntry | None]:
    """Build the model that a user named.

    Args:
        spec: A name of `MODELS`, or `package.module:factory`; the working directory is importable.
        **options: Keyword options for the factory.

    Returns:
        The model and its zoo entry; `None` for a factory of the user's.

    Raises:
        ValueError: No such name, an option it does not take, a factory that fails or returns no module.
    """
    if ":" in spec:
        model = call_named(spec, "model", **options)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model must name a factory that returns a torch.nn.Module, got {spec!r}, which returned "
                f"{type(model).__name__}: return the model itself"
            )
        return model, None
    if spec not in MODELS:
        raise ValueError(f"model must be {', '.join(MODELS)} or package.module:factory, got {spec!r}: correct the name")
    entry = MODELS[spec]
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        raise ValueError(
            f"options of model {spec!r} must be among {list(entry.options)}, got {unknown}: leave them out"
        )
    return entry.factory(**options), entry


def call_named(spec: str, parameter: str, /, **options: Any) -> Any:
    """Import `package.module:name`, call it with the options and return what it returns.

    The working directory is importable meanwhile, ahead of installed packages, as under `python -m`.
    `parameter` names the setting that the spec was given for.

    Raises:
        ValueError: The import, the attribute or the call fails; the cause is chained. Or it is an object, no function.
    """
    module_name, _, attribute = spec.partition(":")
    with _importable_working_directory(), contextlib.redirect_stdout(sys.stderr):  # standard output is the program's
        try:
            named = operator.attrgetter(attribute)(importlib.import_module(module_name))
            if callable(named) and not isinstance(named, nn.Module):
                return named(**options)
        except (Exception, SystemExit) as error:  # a user's module may raise anything, even call sys.exit
            pass_on_shortage(error)
            cause = first_line(error, typed=True)
            raise ValueError(
                f"{parameter} must be an importable package.module:name that takes the options "
                f"{sorted(options)}, got {spec!r}, which raised {cause}: correct it, or start from the "
                "folder that holds the module"
            ) from error
    raise ValueError(
        f"{parameter} must name a function that returns the {parameter}, got {spec!r}, which is a "
        f"{type(named).__name__} itself: wrap it in one"
    )


def named_method(name: str, settings: Sequence[str], *specs: str) -> Method:
    """Return a method by its name and settings as text, which the module of a model or of data may register.

    Raises:
        ValueError: If there is no such method, or a setting cannot be used.
    """
    import_named(*specs)
    return resolve_method(name, dict(map(parse_setting, settings)))


def import_named(*specs: Any) -> None:
    """Import the modules of what is given as `package.module:name`: they may register methods and noise models.

    One that cannot be imported is passed over: whoever calls it says why.
    """
    with _importable_working_directory(), contextlib.redirect_stdout(sys.stderr):
        for spec in specs:
            if isinstance(spec, str) and ":" in spec:
                with contextlib.suppress(Exception, SystemExit):
                    importlib.import_module(spec.partition(":")[0])


@contextlib.contextmanager
def _importable_working_directory() -> Iterator[None]:
    """Put the working directory first on the import path, and take it off again."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
