"""Statistics of layer inputs: against the layers' own outputs, and against inputs written down by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from swap_prune.fisher.capture import layer_inputs as inputs
from swap_prune.fisher.capture.layer_inputs import LayerInputs
from swap_prune.selection import select_parameters
from tests.cases import normal


def output_sum(model, batch):
    return model(batch).flatten(1).sum(1)


def inputs_of(model, *batches, **selection):
    return LayerInputs(model, select_parameters(model, **selection), batches, output_sum)


LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "strided": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 8, 5)),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 6, 6)),
    "same": (nn.Conv2d(2, 3, (2, 3), padding="same"), (2, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 5, 5)),
    "pointwise": (nn.Conv2d(5, 3, 1), (5, 4, 4)),
    "1d": (nn.Conv1d(4, 6, 3, groups=2, stride=2), (4, 11)),
    "3d": (nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 3, 4, 4)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear over tokens": (nn.Linear(5, 3), (7, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_moments_give_the_power_of_any_output(layer, shape):
    """The mean square of output o is ``w_o^T M w_o``, for any weights."""
    layer = layer.double()
    x = normal(6, *shape)
    (moments,) = inputs_of(nn.Sequential(layer), x).moments().values()
    (squares,) = inputs_of(nn.Sequential(layer), x[:2], x[2:]).mean_squares().values()
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=1))
        layer.bias.zero_()
        y = layer(x)
    y = y.movedim(1 if isinstance(layer, nn.modules.conv._ConvNd) else -1, 0).flatten(1)
    w = layer.weight.detach().reshape(len(moments), -1, moments.shape[-1])
    torch.testing.assert_close(torch.einsum("grd,gde,gre->gr", w, moments, w).flatten(), y.square().mean(1))
    torch.testing.assert_close(squares, moments.diagonal(dim1=1, dim2=2), rtol=1e-9, atol=1e-12)


def test_pieces_add_up(monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3)), normal(8, 2, 6, 6, dtype=torch.float32)
    (whole,) = inputs_of(model, x).moments().values()
    monkeypatch.setattr(inputs, "_CHUNK_BYTES", 1)
    (pieces,) = inputs_of(model, x).moments().values()
    torch.testing.assert_close(pieces, whole)


def test_every_layer_sees_its_own_inputs():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double(), normal(9, 4)
    moments = inputs_of(model, x).moments()
    hidden = model[1](model[0](x)).detach()
    assert list(moments) == ["0.weight", "2.weight"]
    torch.testing.assert_close(moments["0.weight"], (x.T @ x / 9)[None])
    torch.testing.assert_close(moments["2.weight"], (hidden.T @ hidden / 9)[None])


def test_a_shared_weight_sees_the_inputs_of_all_its_layers():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model, x = nn.Sequential(first, nn.Tanh(), second).double(), normal(5, 3)
    (squares,) = inputs_of(model, x).mean_squares().values()
    seen = torch.cat([x, first(x).tanh().detach()])
    torch.testing.assert_close(squares, seen.square().mean(0)[None])


def test_half_precision_is_summed_in_single():
    model, x = nn.Sequential(nn.Linear(3, 2)).bfloat16(), normal(400, 3).bfloat16()
    (squares,) = inputs_of(model, x).mean_squares().values()
    torch.testing.assert_close(squares, x.float().square().mean(0)[None])


def test_the_network_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = inputs_of(model, normal(9, 4, dtype=torch.float32))
    first, second = statistics.moments(), statistics.moments()
    assert all(torch.equal(first[name], second[name]) for name in first), "eval mode: no dropout"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_the_output_layer_of_attention_sees_what_was_attended_to():
    model, x = Attention().double(), normal(3, 5, 4)
    (squares,) = inputs_of(model, x, targets=["inner.out_proj.weight"]).mean_squares().values()
    with torch.no_grad():
        model.inner.out_proj.weight.copy_(torch.eye(4))
        model.inner.out_proj.bias.zero_()
        torch.testing.assert_close(squares, model(x).square().mean((0, 1))[None])


class Functional(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.fc = nn.Linear(*sizes)

    def forward(self, x):
        return x @ self.fc.weight.T


class Loud(nn.Linear):
    def forward(self, x):
        return super().forward(10 * x)


@pytest.mark.parametrize(("model", "scale"), [(Functional(5, 3), 1), (nn.Sequential(Loud(5, 3)), 10)])
def test_weights_see_what_they_are_multiplied_with_whoever_does_it(model, scale):
    x = normal(3, 2, 5)
    (squares,) = inputs_of(model.double(), x).mean_squares().values()
    torch.testing.assert_close(squares, (scale * x).square().mean((0, 1))[None])


@pytest.mark.parametrize(
    "use",
    [
        lambda x, fc: (fc.weight @ x.mT).mT,
        lambda x, fc: functional.linear(x.double(), fc.weight.double().clone()),
        lambda x, fc: functional.conv1d(x.mT, fc.weight.unsqueeze(2)).mT,
    ],
)
def test_weights_on_the_left_and_in_other_types_and_shapes_see_their_inputs(use):
    class Used(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return use(x, self.fc)

    x = normal(3, 2, 5)
    moments = inputs_of(Used().double(), x).moments()["fc.weight"]
    torch.testing.assert_close(moments, torch.einsum("btd,bte->de", x, x)[None] / 6)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.embed, self.fc = nn.LSTM(4, 3, batch_first=True), nn.Embedding(3, 4), nn.Linear(3, 3)

    def forward(self, x):
        return self.lstm(x + self.embed.weight[x[..., 0].long() % 3])[0] + 0 * self.fc.weight.square().sum()


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 10)

    def forward(self, x):
        return functional.linear(x, self.fc.weight.view(4, 5))


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (
            nn.Sequential(nn.ConvTranspose1d(2, 3, 3)),
            ["ConvTranspose1d"],
            r"Linear and Conv layers: '0.weight' multiplies the other way round; leave .* ignore=\['0.weight'\]",
        ),
        (nn.Sequential(nn.Conv1d(2, 3, 3)), ["0.bias"], "no inputs of '0.bias' were seen"),
        (Attention(), ["inner.in_proj_weight"], "'inner.in_proj_weight' projects for attention"),
        (
            Recurrent(),
            ["Embedding", "LSTM"],
            r"'embed.weight' is an embedding; 'lstm.weight_ih_l0' belongs to a recurrent layer.*ignore=\['embed",
        ),
        (Recurrent(), ["fc.weight"], "no inputs of 'fc.weight' were seen"),
        (Reshaped(), ["fc.weight"], "'fc.weight' multiplies in another shape"),
    ],
)
def test_weights_of_other_layers_are_refused(model, targets, message):
    wide = isinstance(model, Attention | Recurrent)
    x = normal(3, 5, 4, dtype=torch.float32) if wide else normal(3, 2, 5, dtype=torch.float32)
    statistics = inputs_of(model, x, targets=targets)
    with pytest.raises(ValueError, match=message):
        statistics.mean_squares()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
