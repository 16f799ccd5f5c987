"""The zoo: sizes and key names of its models, and what becomes of every way to name a model wrongly."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from swap_prune.experiments.zoo import MODELS, ConvUnit, MobileNetV1, build_model

REPOSITORY = Path(__file__).parents[2]
CHECKPOINTS = Path(os.environ.get("SWAP_PRUNE_CHECKPOINTS", REPOSITORY.parent / "shared" / "checkpoints"))
PARAMETERS = {"mlpnet": 32_360, "resnet20": 272_474, "mobilenetv1": 2_585_560, "resnet50": 25_557_032}
INPUTS = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224)}


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters(name):
    model, entry = build_model(name)
    assert entry is MODELS[name] and entry.name == name
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_the_usual_input_size(name):
    model, entry = build_model(name)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(1, *INPUTS[entry.dataset]))
    assert logits.shape == (1, 1000 if entry.dataset == "imagenet" else 10)
    assert len(entry.mean) == len(entry.std) == INPUTS[entry.dataset][0]


def test_mlpnet_equals_its_formula():
    model, _ = build_model("mlpnet")
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    first, second, third = (parameter.detach() for parameter in model.parameters())
    hidden = (images.reshape(3, 784) @ first.T).clamp(min=0)
    expected = (hidden @ second.T).clamp(min=0) @ third.T
    torch.testing.assert_close(model(images), expected)
    assert list(model.state_dict()) == ["fc1.weight", "fc2.weight", "fc3.weight"]


def test_resnet50_has_the_keys_and_strides_of_torchvision():
    model, _ = build_model("resnet50")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 320
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer4.2.bn3.running_var"] == (2048,)
    assert shapes["fc.weight"] == (1000, 2048)
    assert "layer1.1.downsample.0.weight" not in shapes
    assert model.layer2[0].conv1.stride == (1, 1) and model.layer2[0].conv2.stride == (2, 2)


def test_mobilenet_pads_stride_two_on_the_right_and_the_bottom():
    unit = ConvUnit(1, 1, 3, stride=2).eval()
    nn.init.ones_(unit.conv.weight)
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 0, 0] = 1.0
    assert unit(image)[0, 0].nonzero().tolist() == [[0, 0]]
    counts = unit(torch.full((1, 1, 4, 4), 0.5))[0, 0] / 0.5
    torch.testing.assert_close(counts, torch.tensor([[9.0, 6.0], [6.0, 4.0]]), rtol=1e-2, atol=0)
    assert unit.bn.eps == 1e-3


def test_mobilenet_width_sets_the_channels():
    model = MobileNetV1(width=0.25)
    assert model.stem.conv.out_channels == 8 and model.fc.in_features == 256


@pytest.mark.parametrize("width", [0, -1.0, 0.01, float("nan"), float("inf"), "wide"])
def test_mobilenet_refuses_a_width(width):
    with pytest.raises(ValueError, match=r"width must be a finite number.*got"):
        build_model("mobilenetv1", width=width)


def test_weights_follow_the_callers_seed_only():
    torch.manual_seed(3)
    first, _ = build_model("mlpnet")
    other, _ = build_model("mlpnet")
    torch.manual_seed(3)
    again, _ = build_model("mlpnet")
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


USER_MODULE = """
import sys
from torch import nn

class Inner:
    @staticmethod
    def make():
        return nn.Linear(2, 2)

number = 3

def linear(size=2):
    return nn.Linear(size, size)

def lazily():
    import zoo_user_helper
    return zoo_user_helper.make()

def nothing():
    return None

def broken():
    raise RuntimeError("first line\\nsecond line")

def leaves():
    sys.exit(2)
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "zoo_user.py").write_text(USER_MODULE)
    (tmp_path / "zoo_user_helper.py").write_text("from torch import nn\nmake = lambda: nn.Linear(5, 5)\n")
    (tmp_path / "zoo_user_bad.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("zoo_user", "zoo_user_helper", "zoo_user_bad"):
        sys.modules.pop(name, None)


def test_user_factory_from_the_working_directory(user_module):
    before = list(sys.path)
    model, entry = build_model("zoo_user:linear", size=4)
    assert entry is None and model.weight.shape == (4, 4)
    assert build_model("zoo_user:Inner.make")[0].weight.shape == (2, 2)
    assert build_model("zoo_user:lazily")[0].weight.shape == (5, 5)
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("no_such_model", {}, "mlpnet, resnet20, mobilenetv1, resnet50 or package.module:factory"),
        ("mlpnet", {"width": 1}, r"options of model 'mlpnet' must be among \[\], got \['width'\]"),
        ("mobilenetv1", {"depth": 1}, r"must be among \['width'\], got \['depth'\]"),
        ("no_such_module_here:factory", {}, "ModuleNotFoundError"),
        (":factory", {}, "must be an importable"),
        ("zoo_user:", {}, "AttributeError"),
        ("zoo_user:absent", {}, "AttributeError"),
        ("zoo_user_bad:factory", {}, "SyntaxError"),
        ("zoo_user:number", {}, "a function that returns the model"),
        ("zoo_user:linear", {"breadth": 1}, "unexpected keyword argument 'breadth'"),
        ("mlpnet", {"spec": "a"}, r"must be among \[\], got \['spec'\]"),
        ("zoo_user:linear", {"spec": "a"}, "unexpected keyword argument 'spec'"),
        ("zoo_user:nothing", {}, "which returned NoneType"),
        ("zoo_user:broken", {}, "RuntimeError: first line:"),
        ("zoo_user:leaves", {}, "SystemExit"),
    ],
)
def test_bad_names_are_one_line_value_errors(user_module, spec, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(spec, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mlpnet", "mlpnet_mnist"),
        ("resnet20", "resnet20_cifar10"),
        ("mobilenetv1", "mobilenetv1_075_224_imagenet"),
    ],
)
def test_public_checkpoint_loads_strictly(name, file):
    safetensors = pytest.importorskip("safetensors.torch")
    path = CHECKPOINTS / f"{file}.safetensors"
    if not path.exists():
        pytest.skip(f"no {path}")
    model, _ = build_model(name)
    model.load_state_dict(safetensors.load_file(path), strict=True)
