"""Per-sample gradients: both back ends against one backward pass a sample, and what capture must not touch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.losses import cross_entropy
from swap_prune.samples.batches import slice_batch
from swap_prune.selection import select_parameters
from tests.cases import generator
from tests.reference import per_sample_gradients

BACKENDS = pytest.mark.parametrize("backend", ["vmap", "loop", "auto"])  # auto: hooks where it can; test_hooks.py


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class TiedLanguageModel(nn.Module):
    """Tokens in, logits (n, words, positions) out; the head is the embedding itself."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embedding(tokens)))).transpose(1, 2)


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 5, padding_idx=0)
        self.head = nn.Linear(5, 4)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


class PartlyUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 3)

    def forward(self, x):
        return self.used(x)


class Branching(nn.Module):
    """Looks at its values: nothing that vmap can trace."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        scale = 2.0 if x.detach().abs().max().item() > 1e3 else 1.0
        return scale * self.fc(x)


class ReusedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


def images(*shape, classes=4, n=7):
    state = generator(1)
    return torch.randn(n, *shape, generator=state), torch.randint(classes, (n,), generator=state)


def tokens(words, n=7, length=5):
    return torch.randint(words, (n, length), generator=generator(2))


def convolutional(conv, norm, *shape):
    """A grouped, strided, dilated convolution between plain ones, with a normalisation in between."""
    dims = len(shape) - 1
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    return lambda: nn.Sequential(
        conv(shape[0], 4, 3, padding=1),
        norm(4),
        nn.ReLU(),
        conv(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        conv(6, 6, 1, bias=False),
        pool(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def token_batch():
    inputs, targets = tokens(11), tokens(11).roll(1, 1)
    targets = targets.clone()
    targets[2, 3:] = -100  # positions that do not count
    return inputs, targets


def group_norm(channels):
    return nn.GroupNorm(2, channels)


CASES = {
    "linear": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)),
        ("Linear",),
        lambda: images(3, 4),
    ),
    "conv1d": (convolutional(nn.Conv1d, group_norm, 2, 9), ("Conv1d", "Linear"), lambda: images(2, 9)),
    "conv2d": (convolutional(nn.Conv2d, group_norm, 2, 7, 6), ("Conv2d", "Linear"), lambda: images(2, 7, 6)),
    "conv3d": (convolutional(nn.Conv3d, group_norm, 2, 5, 4, 6), ("Conv3d", "Linear"), lambda: images(2, 5, 4, 6)),
    "batchnorm": (
        convolutional(nn.Conv2d, nn.BatchNorm2d, 2, 7, 6),
        ("Conv2d", "1.weight", "1.bias"),
        lambda: images(2, 7, 6),
    ),
    "groupnorm": (
        convolutional(nn.Conv2d, group_norm, 2, 7, 6),
        ("1.weight", "1.bias", "0.bias"),
        lambda: images(2, 7, 6),
    ),
    "layernorm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Flatten(), nn.Linear(18, 4)),
        ("Linear", "1.weight", "1.bias"),
        lambda: images(3, 5),
    ),
    "linear over tokens": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), Transpose()),
        ("Linear",),
        lambda: (torch.randn(7, 3, 5, generator=generator(3)), tokens(4, length=3)),
    ),
    "embedding": (BagOfWords, ("Embedding", "Linear"), lambda: (tokens(9), images(1)[1])),
    "tied weights": (TiedLanguageModel, ("Embedding",), token_batch),
    "tied weights and token targets": (TiedLanguageModel, ("Embedding", "Linear"), token_batch),
    "unused parameter": (PartlyUnused, ("Linear",), lambda: images(6)),
    "layer used twice": (ReusedLayer, ("Linear",), lambda: images(6)),
}


def build(make):
    """A network with weights, and BatchNorm statistics, that are not the initial ones; in training mode."""
    state = torch.get_rng_state()
    torch.manual_seed(5)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    torch.set_rng_state(state)
    return model.train()


def expected_rows(model, selection, batches, loss_fn=cross_entropy, sizes=(7,)):
    twin = copy.deepcopy(model).eval()
    singles = [slice_batch(batch, i, i + 1) for batch, size in zip(batches, sizes, strict=True) for i in range(size)]
    return per_sample_gradients(twin, selection.names, loss_fn, singles)


def assert_captured(capture, expected):
    rows, losses = expected
    torch.testing.assert_close(capture.factor.matrix.double(), rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(capture.losses.double(), losses, rtol=1e-5, atol=1e-6)


@BACKENDS
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_single_backward_passes(name, backend):
    make, targets, data = CASES[name]
    model, batch = build(make), data()
    selection = select_parameters(model, targets)
    capture = capture_gradients(model, selection, [batch], cross_entropy, backend=backend)
    assert capture.factor.shape == (7, selection.total) and capture.chunk >= 1
    if backend != "auto":
        assert capture.backend == backend
    expected = expected_rows(model, selection, [batch])
    assert float(expected[0].abs().max()) > 1e-3
    assert_captured(capture, expected)


@BACKENDS
def test_batches_of_different_sizes_in_order(backend):
    make, targets, data = CASES["conv2d"]
    model, (inputs, labels) = build(make), data()
    batches = [(inputs[:4], labels[:4]), (inputs[4:5], labels[4:5]), (inputs[5:], labels[5:])]
    selection, counted = select_parameters(model, targets), []
    capture = capture_gradients(model, selection, batches, cross_entropy, backend=backend, advance=counted.append)
    assert_captured(capture, expected_rows(model, selection, [(inputs, labels)]))
    assert sum(counted) == 7


@BACKENDS
def test_chunks(backend, monkeypatch):
    """A budget of next to nothing makes chunks of one sample; the rows are the same."""
    monkeypatch.setattr("swap_prune.fisher.storage.CHUNK_BYTES", 1)
    make, targets, data = CASES["linear"]
    model, batch = build(make), data()
    selection = select_parameters(model, targets)
    capture = capture_gradients(model, selection, [batch], cross_entropy, backend=backend)
    assert capture.chunk == 1
    assert_captured(capture, expected_rows(model, selection, [batch]))


@BACKENDS
def test_dict_batches_with_a_loss_of_their_own(backend):
    def loss_fn(model, batch):
        errors = (model(batch["inputs"]) - batch["wanted"]).square().sum(1)
        return batch["weight"] * errors * batch["scale"]

    state = generator(6)
    batch = {
        "note": "not a tensor",
        "inputs": torch.randn(7, 6, generator=state),
        "wanted": torch.randn(7, 4, generator=state),
        "weight": torch.rand(7, generator=state),
        "scale": torch.tensor(0.5),  # shared by all samples
    }
    model = build(PartlyUnused)
    selection = select_parameters(model)
    capture = capture_gradients(model, selection, [batch], loss_fn, backend=backend)
    assert_captured(capture, expected_rows(model, selection, [batch], loss_fn))


@BACKENDS
def test_opaque_batches_go_through_the_loop(backend):
    class Opaque:
        def __init__(self, inputs, labels):
            self.inputs, self.labels = inputs, labels

    def loss_fn(model, batch):
        return functional.cross_entropy(model(batch.inputs), batch.labels, reduction="none")

    inputs, labels = images(6)
    model = build(PartlyUnused)
    selection = select_parameters(model)
    batches = [Opaque(inputs[:5], labels[:5]), Opaque(inputs[5:], labels[5:])]
    capture = capture_gradients(model, selection, batches, loss_fn, backend=backend)
    assert capture.backend == "loop"
    assert_captured(capture, expected_rows(model, selection, [(inputs, labels)]))


def test_a_network_that_vmap_cannot_trace_falls_back():
    model, batch = build(Branching), images(6)
    selection = select_parameters(model, ("fc.weight", "fc.bias"))
    capture = capture_gradients(model, selection, [batch], cross_entropy)
    assert capture.backend == "loop"
    assert_captured(capture, expected_rows(model, selection, [batch]))
    with pytest.raises((RuntimeError, ValueError)):
        capture_gradients(model, selection, [batch], cross_entropy, backend="vmap")


def test_recurrent_cells_which_vmap_refuses():
    model, batch = build(lambda: nn.Sequential(nn.RNNCell(6, 5), nn.Linear(5, 4))), images(6)
    selection = select_parameters(model, ("0.weight_ih", "0.weight_hh", "Linear"))
    capture = capture_gradients(model, selection, [batch], cross_entropy)
    assert_captured(capture, expected_rows(model, selection, [batch]))


@BACKENDS
def test_dropout_is_off_and_modes_come_back(backend):
    model = build(lambda: nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 4)))
    model[2].eval()
    batch, selection = images(6), select_parameters(model)
    capture = capture_gradients(model, selection, [batch], cross_entropy, backend=backend)
    assert_captured(capture, expected_rows(model, selection, [batch]))
    assert [module.training for module in model.modules()] == [True, True, True, False]


@BACKENDS
def test_the_network_and_the_random_state_are_left_alone(backend):
    make, targets, data = CASES["batchnorm"]
    model, batch = build(make), data()
    model[3].weight.requires_grad_(False)  # frozen by the caller, and still to be pruned
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, labels = (part.clone() for part in batch)
    random = torch.get_rng_state()
    selection = select_parameters(model, targets)
    capture = capture_gradients(model, selection, [batch], cross_entropy, backend=backend)
    assert bool(capture.factor.matrix[:, selection.slices()["3.weight"]].any())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"3.weight"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"0.weight"}
    assert bool((model[0].weight.grad == 3).all())
    assert all(module.training for module in model.modules())
    assert torch.equal(batch[0], inputs) and torch.equal(batch[1], labels)
    assert not capture.factor.matrix.requires_grad and not capture.losses.requires_grad


@BACKENDS
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_gradients_are_had_with_autograd_switched_off_around(context, backend):
    make, targets, data = CASES["linear"]
    model, batch = build(make), data()
    selection = select_parameters(model, targets)
    with context():
        capture = capture_gradients(model, selection, [batch], cross_entropy, backend=backend)
    assert_captured(capture, expected_rows(model, selection, [batch]))


@BACKENDS
def test_twice_the_same_bits(backend):
    make, targets, data = CASES["conv2d"]
    model, batch = build(make), data()
    selection = select_parameters(model, targets)
    first, second = (capture_gradients(model, selection, [batch], cross_entropy, backend=backend) for _ in range(2))
    assert torch.equal(first.factor.matrix, second.factor.matrix) and torch.equal(first.losses, second.losses)
    assert first.chunk == second.chunk and first.backend == second.backend


@BACKENDS
def test_a_network_in_double_precision(backend):
    make, targets, data = CASES["linear"]
    model = build(make).double()
    inputs, labels = data()
    selection = select_parameters(model, targets)
    capture = capture_gradients(model, selection, [(inputs.double(), labels)], cross_entropy, backend=backend)
    assert_captured(capture, expected_rows(model, selection, [(inputs.double(), labels)]))
    capture.factor.matvec(selection.read(model))  # G and w can be multiplied


@BACKENDS
def test_a_network_in_half_precision(backend):
    make, targets, data = CASES["linear"]
    model = build(make).bfloat16()
    inputs, labels = data()
    selection = select_parameters(model, targets)
    capture = capture_gradients(model, selection, [(inputs.bfloat16(), labels)], cross_entropy, backend=backend)
    expected, _ = expected_rows(model, selection, [(inputs.bfloat16(), labels)])
    assert capture.factor.matrix.dtype == torch.float32
    torch.testing.assert_close(capture.factor.matrix.double(), expected, rtol=0.05, atol=0.02)
    capture.factor.matvec(selection.read(model))


def refused(batches, loss_fn, message, backend="auto", make=PartlyUnused):
    model = build(make)
    with pytest.raises(ValueError, match=message):
        capture_gradients(model, select_parameters(model), batches, loss_fn, backend=backend)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def halves(batch):
    return [slice_batch(batch, 0, 4), slice_batch(batch, 4, 7)]


@BACKENDS
@pytest.mark.parametrize("position", [1, 6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite(backend, position, value):
    inputs, labels = images(6)
    inputs[position, 0] = value
    refused(halves((inputs, labels)), cross_entropy, "not finite", backend)


@BACKENDS
def test_a_gradient_that_is_not_finite(backend):
    def loss_fn(model, batch):  # 0 at 0 with an infinite slope
        return (model(batch[0]).sum(1) * batch[1]).abs().sqrt()

    inputs, _ = images(6)
    refused([(inputs, torch.tensor([1.0, 1, 1, 1, 1, 0, 1]))], loss_fn, "gradient is not finite on 1 of 7", backend)


@BACKENDS
def test_a_gradient_whose_square_is_not_finite(backend):
    def loss_fn(model, batch):
        return model(batch[0]).sum(1) * batch[1]

    inputs, _ = images(6)
    refused([(inputs, torch.tensor([1.0, 1, 1, 1, 1, 1e21, 1]))], loss_fn, "longer than 1.8e.17 on 1 of 7", backend)


@BACKENDS
@pytest.mark.parametrize("position", [0, 6])
@pytest.mark.parametrize("label", [4, -1, 1000])
def test_a_label_out_of_range(backend, position, label):
    inputs, labels = images(6)
    labels[position] = label
    refused(halves((inputs, labels)), cross_entropy, r"labels .* 0\.\.3", backend)


@BACKENDS
@pytest.mark.parametrize(
    "reduce",
    [
        lambda losses: losses.mean(),
        lambda losses: losses[:, None],
        lambda losses: losses[:-1],
        lambda losses: losses.tolist(),
        lambda losses: losses.long(),
        lambda losses: None,
    ],
)
def test_a_loss_that_is_not_one_a_sample(backend, reduce):
    refused([images(6)], lambda model, batch: reduce(cross_entropy(model, batch)), "loss_fn must return", backend)


@BACKENDS
@pytest.mark.parametrize(
    "batch",
    [
        {"inputs": torch.zeros(3, 6)},
        torch.zeros(3, 6),
        (torch.zeros(3, 6),),
        (torch.zeros(3, 6), [0, 1, 2]),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 6), torch.zeros(2, dtype=torch.long)),
    ],
)
def test_a_batch_that_does_not_fit(backend, batch):
    refused([batch], cross_entropy, "batch", backend)


@BACKENDS
def test_a_batch_that_does_not_fit_after_one_that_does(backend):
    inputs, labels = images(6)
    refused([(inputs, labels), (inputs[:, :5], labels)], cross_entropy, "batch", backend)


@BACKENDS
def test_a_loss_that_is_cut_off_from_the_weights(backend):
    refused([images(6)], lambda model, batch: cross_entropy(model, batch).detach(), "does not depend", backend)
