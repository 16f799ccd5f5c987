"""Which parameters a pattern takes, and the flat vector that stands for them."""

import pytest
import torch
from torch import nn

from swap_prune.selection import DEFAULT_TARGETS, Selection, layer_floors, select_parameters


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.table = nn.Parameter(torch.ones(3, 4))


class OwnLinear(nn.Linear):
    pass


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.own = OwnLinear(4, 3)
        self.head = nn.Linear(4, 5, bias=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


QUERIES = ("blocks.0.query.weight", "blocks.1.query.weight")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (DEFAULT_TARGETS, ("conv.weight", *QUERIES, "own.weight", "head.weight")),
        (("Linear",), (*QUERIES, "own.weight", "head.weight")),
        ("Linear", (*QUERIES, "own.weight", "head.weight")),
        (("OwnLinear",), ("own.weight",)),
        (("Embedding", "Conv2d"), ("embedding.weight", "conv.weight")),
        (("Conv2d", "Embedding"), ("embedding.weight", "conv.weight")),
        (("Attention",), ("blocks.0.table", "blocks.0.query.weight", "blocks.1.table", "blocks.1.query.weight")),
        (("blocks.0",), ("blocks.0.table", "blocks.0.query.weight")),
        (("blocks",), ("blocks.0.table", "blocks.0.query.weight", "blocks.1.table", "blocks.1.query.weight")),
        (("head.weight",), ("head.weight",)),
        (("own.bias", "norm.weight"), ("norm.weight", "own.bias")),
        (("blocks.1.scale", "head"), ("blocks.1.scale", "head.weight")),
        ((r"re:blocks\.\d\.query.*",), QUERIES),
        ((r"re:blocks\.1",), ("blocks.1.table", "blocks.1.query.weight")),
        (("re:.*weight",), ("embedding.weight", "conv.weight", *QUERIES, "own.weight", "head.weight")),
        (("head", "Linear"), (*QUERIES, "own.weight", "head.weight")),
    ],
)
def test_targets(targets, names):
    assert select_parameters(Network(), targets).names == names


@pytest.mark.parametrize(
    ("ignore", "names"),
    [
        (("head",), ("conv.weight", *QUERIES, "own.weight")),
        ("head.weight", ("conv.weight", *QUERIES, "own.weight")),
        (("blocks", "Conv2d"), ("own.weight", "head.weight")),
        (("re:.*query.*",), ("conv.weight", "own.weight", "head.weight")),
        (("Attention",), ("conv.weight", "own.weight", "head.weight")),
        (("own.bias", "blocks.1"), ("conv.weight", QUERIES[0], "own.weight", "head.weight")),
    ],
)
def test_ignore(ignore, names):
    assert select_parameters(Network(), ignore=ignore).names == names


def test_patterns_match_whole_names():
    """``fc1`` is not ``fc10``, and a regular expression has to match all of a name."""
    model = nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc10": nn.Linear(2, 2)})
    assert select_parameters(model, ("fc1",)).names == ("fc1.weight",)
    assert select_parameters(model, ("re:fc1",)).names == ("fc1.weight",)
    for part in ("re:c1", "re:fc"):
        with pytest.raises(ValueError, match=part):
            select_parameters(model, (part,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(targets=("Conv3d",)),
            r"targets .*'Conv3d'.* did you mean 'Conv2d'\? \(classes: .*Conv2d.*; parameters: ",
        ),
        (dict(targets=("Linear", "blocks.1.key")), "did you mean 'blocks.1.query"),
        (dict(targets=("Q7",)), r"'re:\.\.\.' \(classes"),
        (dict(targets=("Linear", "fc")), "targets .*'fc'"),
        (dict(targets=("norm",)), "targets .*'norm'"),
        (dict(targets=("Module",)), "targets .*'Module'"),
        (dict(targets=()), "targets"),
        (dict(targets=("",)), "targets"),
        (dict(targets=(3,)), "targets .*3"),
        (dict(targets=("re:(",)), r"re:\("),
        (dict(ignore=("tail",)), "ignore .*'tail'"),
        (dict(ignore=("re:[",)), r"re:\["),
        (dict(ignore=("Conv2d", "Linear")), "nothing to prune"),
    ],
)
def test_patterns_that_select_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_parameters(Network(), **arguments)


def test_networks_without_weights():
    for model in (nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential()):
        with pytest.raises(ValueError, match="nothing to prune"):
            select_parameters(model)


def test_a_network_that_was_never_run():
    with pytest.raises(ValueError, match=r"0\.weight.*not initialised"):
        select_parameters(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("targets", [("Embedding",), ("Linear", "Embedding"), ("embedding.weight",), ("head.weight",)])
def test_tied_weights_are_selected_once(targets):
    selection = select_parameters(Tied(), targets)
    assert selection.names.count("embedding.weight") == 1 and "head.weight" not in selection.names


def test_tied_weights_are_ignored_under_any_name():
    for ignore in ("head.weight", "embedding", "Embedding", r"re:head\.w.*"):
        assert select_parameters(Tied(), ("Linear", "Embedding"), ignore).names == ("fc.weight",)


def test_a_module_used_twice_is_selected_once():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert select_parameters(model).total == 4
    assert select_parameters(model, ("2",)).names == ("0.weight",)


def test_flat_vector():
    model = Network()
    selection = select_parameters(model, ("Linear", "own.bias"))
    flat = selection.read(model)
    assert selection.total == flat.numel() == 4 * 4 * 2 + 12 + 3 + 20
    parameters = dict(model.named_parameters())
    for name, tensor in selection.split(flat).items():
        assert torch.equal(tensor, parameters[name])
        assert torch.equal(flat[selection.slices()[name]], parameters[name].flatten())
    assert torch.equal(selection.flatten(selection.split(flat)), flat)


def test_reading_copies():
    model = nn.Sequential(nn.Linear(3, 2))
    selection = select_parameters(model)
    before = model[0].weight.clone()
    flat = selection.read(model)
    flat.zero_()
    assert torch.equal(model[0].weight, before) and not flat.requires_grad


def test_splitting_is_a_view():
    selection = Selection({"a": torch.Size([2, 3]), "b": torch.Size([4])})
    flat = torch.arange(10.0)
    parts = selection.split(flat)
    parts["b"][0] = -1
    assert flat[6] == -1 and parts["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_dtype_is_at_least_single(dtypes, expected):
    model = nn.Sequential(*(nn.Linear(2, 2).to(dtype) for dtype in dtypes))
    assert select_parameters(model).read(model).dtype == expected


def test_a_share_is_that_of_its_decimals():
    """0.07 of 100 weights are 7, where floating point would make 8 of them."""
    model = nn.Linear(10, 10)
    assert layer_floors(model, select_parameters(model), 0.07, 50) == {"weight": 7}
    assert layer_floors(model, select_parameters(model), 0.071, 50) == {"weight": 8}


def test_the_default_targets_can_be_added_to() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 1, 3))
    assert select_parameters(model).names == ("0.weight",)
    assert select_parameters(model, (*DEFAULT_TARGETS, "ConvTranspose2d")).names == ("0.weight", "1.weight")
    for targets in ((*DEFAULT_TARGETS, "GRU"), ("Linear", "Conv2d")):
        with pytest.raises(ValueError, match=r"GRU|Linear"):
            select_parameters(model, targets)


def test_complex_weights_are_refused_and_not_passed_over() -> None:
    model = nn.Sequential(nn.Linear(4, 5, dtype=torch.complex64), nn.Linear(5, 3))
    for targets in (DEFAULT_TARGETS, ("0.weight", "1.weight")):
        with pytest.raises(ValueError, match=r"'0.weight' is complex, .*ignore= leaves it alone"):
            select_parameters(model, targets)
        assert select_parameters(model, targets, ignore=("0",)).names == ("1.weight",)
