"""Transformers: dict batches, padding, labels for each token, tied embeddings, LayerNorm, with every method."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional

import swap_prune
from swap_prune import METHODS, SelfDistillation, TokenCrossEntropy, prune
from swap_prune.fisher.capture.rows import capture_gradients
from swap_prune.fisher.capture.sketch import sketch_curvature
from swap_prune.losses import GaussNewtonLoss
from swap_prune.samples.batches import slice_batch
from swap_prune.selection import select_parameters
from tests.cases import generator
from tests.reference import per_sample_gradients

WORDS, WIDTH, LENGTH = 13, 8, 6


class TinyTransformer(nn.Module):
    """One block of attention and a perceptron between LayerNorms; the head is the embedding itself."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.places = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(input_ids) + self.places[: input_ids.shape[1]]
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(h)).chunk(3, 2))
        allowed = attention_mask.bool()[:, None, None]
        if self.causal:
            length = input_ids.shape[1]
            allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(
            ~allowed, -torch.inf
        )  # vmap knows these, not the fused ones
        h = h + self.mix((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return h + self.drop(self.down(functional.gelu(self.up(self.norm2(h)))))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.hidden(input_ids, attention_mask))}


def transformer(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return TinyTransformer(**options)


def batch(n: int, seed: int = 1, length: int = LENGTH) -> dict[str, Tensor]:
    """Sentences of two to ``length`` tokens, padded by 0; a third of the tokens has a label."""
    state = generator(seed)
    sizes = torch.randint(2, length + 1, (n,), generator=state)
    sizes[0] = length
    mask = (torch.arange(length) < sizes[:, None]).long()
    ids = torch.randint(1, WORDS, (n, length), generator=state) * mask
    labelled = (torch.rand(n, length, generator=state) < 0.3) & mask.bool()
    labelled[:, 0] = True
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~labelled, -100)}


def zeros(model: nn.Module, names: tuple[str, ...]) -> int:
    return sum(int((parameter == 0).sum()) for name, parameter in model.named_parameters() if name in names)


UNTIED = {"ignore": ("embed",)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, 0.83])
def test_every_method_prunes_the_block_exactly(method: str, sparsity: float) -> None:
    model = transformer()
    head = model.embed.weight.detach().clone()
    report = prune(
        model, [batch(30), batch(34, 2, 4)], sparsity, method, loss_fn=TokenCrossEntropy(), samples=40, **UNTIED
    )
    total = 8 * 8 * (3 + 1 + 2 + 2)
    wanted = total - int(total * (1 - sparsity))
    assert report.total == total and zeros(model, tuple(report.layers)) == wanted == total - report.kept
    assert torch.equal(model.embed.weight, head) and model.head.weight is model.embed.weight
    assert bool(torch.isfinite(TokenCrossEntropy()(model, batch(5, 3))).all())


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("wanda", "sparsegpt")])
def test_tied_embeddings_are_pruned_once(method: str) -> None:
    model = transformer()
    report = prune(model, [batch(64)], 0.7, method, loss_fn=TokenCrossEntropy(), samples=48)
    assert report.total == 512 + WORDS * WIDTH and set(report.layers) >= {"embed.weight"}
    assert model.head.weight is model.embed.weight
    assert zeros(model, tuple(report.layers)) == report.total - report.kept == 616 - int(616 * (1 - 0.7))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layer_wise_methods_say_what_to_do_about_tied_embeddings(method: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"'embed.weight' is an embedding; leave out what is not by ignore=",
    ):
        prune(transformer(), [batch(20)], 0.5, method, loss_fn=TokenCrossEntropy())


LOSSES = pytest.mark.parametrize(
    "loss", [TokenCrossEntropy(), TokenCrossEntropy(causal=True)], ids=["each token", "next token"]
)


@LOSSES
@pytest.mark.parametrize("ignore", [("embed",), ()])
def test_captured_rows_are_those_of_single_backward_passes(loss: TokenCrossEntropy, ignore: tuple[str, ...]) -> None:
    """Also where the embedding is tied to the head."""
    model, data = transformer(causal=loss.causal), batch(7)
    selection = select_parameters(model, ignore=ignore)
    captures = {kind: capture_gradients(model, selection, [data], loss, backend=kind) for kind in ("auto", "loop")}
    assert captures["auto"].backend == "hooks"
    singles = [slice_batch(data, i, i + 1) for i in range(7)]
    rows, losses = per_sample_gradients(copy.deepcopy(model).eval(), selection.names, loss, singles)
    for capture in captures.values():
        torch.testing.assert_close(capture.factor.matrix.double(), rows, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(capture.losses.double(), losses, rtol=1e-5, atol=1e-6)
    assert float(rows.abs().max()) > 1e-3


@LOSSES
def test_gauss_newton_rows_agree_between_back_ends(loss: TokenCrossEntropy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = transformer(causal=loss.causal), batch(7)
    selection = select_parameters(model, ignore=("embed",))
    found = sketch_curvature(model, selection, [data], loss, generator(3), in_batches=False)
    assert found.backend == "hooks"

    def by_loop(*arguments: Any, **named: Any) -> Any:
        return capture_gradients(*arguments, **named, backend="loop")

    monkeypatch.setattr("swap_prune.fisher.capture.sketch.capture_gradients", by_loop)
    expected = sketch_curvature(model, selection, [data], loss, generator(3), in_batches=False)
    torch.testing.assert_close(found.factor.matrix, expected.factor.matrix, rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing() -> None:
    model, data, loss = transformer().eval(), batch(7, length=4), TokenCrossEntropy()
    padded = {key: functional.pad(part, (0, 2), value=-100 if key == "labels" else 0) for key, part in data.items()}
    torch.testing.assert_close(loss(model, padded), loss(model, data))
    selection = select_parameters(model, ignore=("embed",))
    rows, more = (capture_gradients(model, selection, [one], loss).factor.matrix for one in (data, padded))
    torch.testing.assert_close(more, rows, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_labelled_tokens() -> None:
    model, data = transformer().eval(), batch(5)
    data["labels"][3] = -100
    logits = model(data["input_ids"], data["attention_mask"])["logits"]
    for i, value in enumerate(TokenCrossEntropy()(model, data)):
        expected = functional.cross_entropy(logits[i], data["labels"][i]) if i != 3 else torch.tensor(0.0)
        torch.testing.assert_close(value, expected)
    model = transformer(causal=True).eval()
    logits = model(data["input_ids"], data["attention_mask"])["logits"]
    value = TokenCrossEntropy(causal=True)(model, data)[0]
    if bool((data["labels"][0, 1:] != -100).any()):
        torch.testing.assert_close(value, functional.cross_entropy(logits[0, :-1], data["labels"][0, 1:]))


def test_one_label_a_sample() -> None:
    model, loss = nn.Linear(4, 3), TokenCrossEntropy(labels="y")
    assert isinstance(loss, GaussNewtonLoss)
    data = {"input": torch.randn(6, 4, generator=generator(1)), "y": torch.tensor([0, 1, 2, 0, 1, 2])}
    expected = functional.cross_entropy(model(data["input"]), data["y"], reduction="none")
    torch.testing.assert_close(loss(model, data), expected)
    data["y"] = torch.tensor([0, -100, 2, 0, 9, 2])
    with pytest.raises(ValueError, match=r"labels out of range: the model has 3 outputs.*got 0..9"):
        loss(model, data)


@LOSSES
def test_the_root_over_all_signs_is_the_second_derivative(loss: TokenCrossEntropy) -> None:
    loss = TokenCrossEntropy(causal=loss.causal, temperature=1.0)
    labels = torch.tensor([[1, -100, 2]])
    z = torch.randn(1, 3, 3 - loss.causal, generator=generator(3), dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=z.numel())), dtype=torch.float64)
    many = {"labels": labels.expand(len(signs), 3)}
    roots = loss.curvature_root(z.expand(len(signs), *z.shape[1:]), many, signs.view(-1, *z.shape[1:])).flatten(1)

    def value(flat: Tensor) -> Tensor:
        return loss.losses(flat.view_as(z), {"labels": labels}).sum()

    torch.testing.assert_close(roots.T @ roots / len(signs), jacrev(jacrev(value))(z.flatten()))


@pytest.mark.long
@pytest.mark.parametrize("method", ["lr", "ewr"])
def test_a_trained_transformer_is_pruned_better_than_by_magnitude(method: str) -> None:
    """Tokens are to be named; also what is padded and has no label takes part."""
    dense, loss, data = transformer(), TokenCrossEntropy(), batch(256)
    optimiser = torch.optim.Adam(dense.parameters(), lr=0.01)
    torch.manual_seed(1)
    masked = {**data, "input_ids": data["input_ids"].roll(1, 0)}
    for _ in range(60):
        optimiser.zero_grad()
        loss(dense, masked).mean().backward()
        optimiser.step()
    after = {}
    for name in ("magnitude", method):
        model = copy.deepcopy(dense)
        report = prune(model, [masked], 0.7, name, loss_fn=loss, samples=200, **UNTIED)
        after[name] = float(loss(model.eval(), masked).detach().mean())
    assert after[method] < after["magnitude"]
    assert report.stages[0].evidence["first_order"]


@pytest.mark.long
def test_hidden_states_are_distilled() -> None:
    model, data = transformer(), batch(80)
    del data["labels"]

    def embed(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        counted = inputs["attention_mask"].unsqueeze(2)
        return (network.hidden(**inputs) * counted).sum(1) / counted.sum(1)  # type: ignore[operator]

    loss = SelfDistillation(embed)
    pairs = loss.label(model, [data])
    report = prune(model, pairs, 0.5, loss_fn=loss, samples=64, **UNTIED)
    assert report.kept == 256 and set(report.layers) == {"qkv.weight", "mix.weight", "up.weight", "down.weight"}
    assert float(loss(model.eval(), pairs[0]).detach().mean()) < 0.2


@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_as_good_as_dicts(causal: bool) -> None:
    named, loss = batch(8), TokenCrossEntropy(causal=causal)
    model = transformer(causal=causal).eval()
    arguments = {name: part for name, part in named.items() if name != "labels"}
    wanted = loss(model, named)
    for inputs in (arguments, (named["input_ids"], named["attention_mask"])):
        torch.testing.assert_close(loss(model, (inputs, named["labels"])), wanted)


def test_classes_that_come_last_are_told_from_those_of_the_default_loss() -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)), torch.randint(WORDS, (40, LENGTH))
    with pytest.raises(ValueError, match=r"the classes last: pass loss_fn=swap_prune.TokenCrossEntropy\(\)"):
        prune(model, [(ids, ids)], 0.5, progress=False)
    report = prune(model, [(ids, ids)], 0.5, loss_fn=TokenCrossEntropy(), samples=32, progress=False)
    assert report.kept == 6 * WORDS // 2


WRONG: dict[str, tuple[TokenCrossEntropy, Any, str]] = {
    "no labels": (TokenCrossEntropy(), {"input_ids": torch.ones(4, 3).long()}, "under 'labels' .*, got {input_ids"),
    "three parts": (TokenCrossEntropy(), (torch.ones(4, 3).long(),) * 3, "TokenCrossEntropy needs batches"),
    "labels out of range": (
        TokenCrossEntropy(),
        batch(8) | {"labels": torch.full((8, LENGTH), WORDS)},
        r"labels must lie in 0\.\.12, got 13\.\.13",
    ),
    "labels of another shape": (
        TokenCrossEntropy(),
        batch(8) | {"labels": torch.ones(8, LENGTH - 1).long()},
        r"needs logits \(8, 5, 'classes'\)|needs logits \(2, 5, 'classes'\)",
    ),
    "an argument that is missing": (TokenCrossEntropy(), {"labels": torch.ones(4, 3).long()}, "the loss failed on"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_value_error_and_changes_nothing(case: str) -> None:
    loss, data, message = WRONG[case]
    model = transformer()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, [data], 0.5, swap_prune.LR(), loss_fn=loss, **UNTIED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_temperature_is_checked() -> None:
    with pytest.raises(ValueError, match="temperature must be a number above 0, got 0"):
        TokenCrossEntropy(temperature=0)


def test_a_sample_whose_only_label_does_not_count_counts_nowhere() -> None:
    loss = TokenCrossEntropy()
    batch = {"x": torch.zeros(3, 2), "labels": torch.tensor([1, -100, 0])}
    outputs, teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = [loss.losses(outputs, batch), loss.divergence(outputs, batch, teacher)]
    found.append(loss.curvature_root(outputs, batch, torch.ones(3, 4)).norm(dim=1))
    whole = batch | {"labels": torch.tensor([1, 2, 0])}
    expected = [loss.losses(outputs, whole), loss.divergence(outputs, whole, teacher)]
    expected.append(loss.curvature_root(outputs, whole, torch.ones(3, 4)).norm(dim=1))
    for one, other in zip(found, expected, strict=True):
        assert one[1] == 0 < other[1]
        assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_a_causal_loss_needs_labels_of_tokens() -> None:
    batch = {"x": torch.zeros(3, 2), "labels": torch.tensor([1, 0, 0])}
    with pytest.raises(ValueError, match=r"needs a label for each token, \(n, T\), got labels \(3,\)"):
        TokenCrossEntropy(causal=True)(Named(), batch)


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 4)


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize("kind", ["object", "tuple", "nested"])
def test_logits_are_found_or_said_where_they_are(kind: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            z = self.body(x)
            return {"object": Output(z), "tuple": (z,), "nested": {"out": {"z": z}}}[kind]

    model, batch = Wrapped(), {"x": torch.randn(6, 5, 4), "labels": torch.randint(3, (6, 5))}
    find = {"tuple": lambda m, inputs: m(**inputs)[0], "nested": lambda m, inputs: m(**inputs)["out"]["z"]}
    loss = TokenCrossEntropy(forward=find[kind]) if kind in find else TokenCrossEntropy()
    expected = nn.functional.cross_entropy(model.body(batch["x"]).mT, batch["labels"], reduction="none").mean(1)
    torch.testing.assert_close(loss(model, batch), expected)
    prune(model, [batch], 0.5, "lr", loss_fn=loss, progress=False)
    if kind == "tuple":
        with pytest.raises(ValueError, match="forward=, a function"):
            TokenCrossEntropy()(model, batch)


PAIR = ((torch.zeros(3, 4), torch.zeros(3, 4)), torch.zeros(3))


@pytest.mark.parametrize("batch", [{"x": torch.zeros(3, 4), "labels": torch.zeros(3)}, PAIR], ids=["dict", "pair"])
def test_the_default_loss_names_what_takes_other_batches(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"loss_fn=swap_prune.TokenCrossEntropy\(\), which takes them"):
        prune(nn.Linear(4, 3), [batch], 0.5, "lr", progress=False)


class Translator(nn.Module):
    """Adds a source to the tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return functional.pad(labels.clamp_min(0)[:, :-1], (1, 0), value=1)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        seen = self.mix(self.embed(input_ids)).mean(1, keepdim=True) + self.embed(decoder_input_ids)
        return {"logits": self.head(torch.tanh(seen))}


def test_a_decoder_gets_what_the_model_would_make_of_the_labels() -> None:
    torch.manual_seed(0)
    model, loss = Translator(), TokenCrossEntropy()
    sources = {"input_ids": torch.randint(1, WORDS, (40, 5)), "labels": torch.randint(1, WORDS, (40, 7))}
    inputs = model.prepare_decoder_input_ids_from_labels(sources["labels"])
    logits = model(sources["input_ids"], inputs)["logits"]
    wanted = functional.cross_entropy(logits.movedim(2, 1), sources["labels"], reduction="none").mean(1)
    torch.testing.assert_close(loss(model, sources), wanted)
    own = sources | {"decoder_input_ids": torch.ones_like(inputs)}
    assert not torch.allclose(loss(model, own), wanted), "those of a batch are left as they are"
    alone = TokenCrossEntropy(forward=lambda model, inputs: model.head(model.embed(inputs["input_ids"])))
    assert alone(model, sources | {"labels": sources["input_ids"]}).shape == (40,)
    keys = []
    TokenCrossEntropy(forward=lambda model, inputs: keys.append([*inputs]) or logits)(model, sources)
    assert keys == [["input_ids"]], "a function of one's own gets what the batch holds"
    report = prune(model, [sources], 0.5, loss_fn=loss, samples=32, progress=False)
    assert report.kept == report.total // 2 and not report.notes


def test_a_decoder_whose_model_shifts_labels_itself_gets_them_shifted() -> None:
    """As of Whisper and M2M100: there is no method, and the configuration says how."""

    class Speaker(Translator):
        prepare_decoder_input_ids_from_labels = None  # type: ignore[assignment]
        config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=2, pad_token_id=0)

    torch.manual_seed(0)
    model, loss = Speaker(), TokenCrossEntropy()
    labels = torch.randint(1, WORDS, (40, 7))
    labels[::2, 4:] = -100
    sources = {"input_ids": torch.randint(1, WORDS, (40, 5)), "labels": labels}
    shifted = torch.cat([torch.full((40, 1), 2), labels[:, :-1].clamp_min(0)], 1)
    torch.testing.assert_close(loss(model, sources), loss(model, sources | {"decoder_input_ids": shifted}))
    assert prune(model, [sources], 0.5, "lr", loss_fn=loss, samples=32, progress=False).kept > 0

    class Tagger(Speaker):  # of the encoder alone; its configuration is that of the whole
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(self.embed(input_ids))  # type: ignore[no-any-return]

    tagged = {"input_ids": sources["input_ids"], "labels": sources["input_ids"]}
    assert loss(Tagger(), tagged).shape == (40,)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_input_ids"):
        prune(model, [sources], 0.5, "lr", loss_fn=loss, samples=32, progress=False)


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs classes, whole numbers, got labels tensor \(30, 6\) float32: "):
        TokenCrossEntropy()(transformer(), {name: part.float() for name, part in batch(30).items() if name == "labels"})


def test_a_model_without_logits_says_what_it_gave() -> None:
    class Spans(TinyTransformer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"start": self.hidden(input_ids, attention_mask)[..., 0]}

    with pytest.raises(ValueError, match=r"TokenCrossEntropy needs logits .*, got \{start: tensor \(4, 6\) float32\}"):
        TokenCrossEntropy()(Spans(), batch(4))


def test_more_tokens_than_float16_can_count() -> None:
    """A text of 70,000 tokens: their number is infinity in float16."""
    logits = torch.randn(1, 70_000, 2, generator=generator()).half()
    labels = torch.randint(2, (1, 70_000), generator=generator())
    loss, batch = TokenCrossEntropy(causal=False), {"logits": logits, "labels": labels}

    class Given(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits

    found = loss(Given(), batch)
    expected = functional.cross_entropy(logits[0].double(), labels[0])
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(expected), rel=1e-4)
