"""The sentence encoder: against torch's own transformer layers, and what is read from a directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swap_prune import SelfDistillation, prune
from swap_prune.experiments.encoder import EncoderConfig, SentenceEncoder, load_encoder
from tests.cases import but_long, generator

SMALL = EncoderConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=7,
)


def encoder(seed: int = 0) -> SentenceEncoder:
    torch.manual_seed(seed)
    model = SentenceEncoder(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def sentences(n: int = 5, length: int = 6, seed: int = 1) -> dict[str, Tensor]:
    state = generator(seed)
    sizes = torch.randint(2, length + 1, (n, 1), generator=state)
    sizes[0] = length
    mask = (torch.arange(length) < sizes).long()
    return {"input_ids": torch.randint(1, 20, (n, length), generator=state) * mask, "attention_mask": mask}


def torch_layer(model: SentenceEncoder, number: int) -> nn.TransformerEncoderLayer:
    """The same block made of torch's own parts."""
    theirs = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", SMALL.layer_norm_eps, batch_first=True)
    own = dict(model.encoder["layer"][number].named_parameters())
    state = {
        f"self_attn.in_proj_{kind}": torch.cat(
            [own[f"attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
        )
        for kind in ("weight", "bias")
    }
    names = {
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1",
        "output.dense": "linear2",
        "output.LayerNorm": "norm2",
    }
    state |= {f"{b}.{kind}": own[f"{a}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    theirs.load_state_dict(state)
    return theirs


def test_it_equals_torchs_own_layers() -> None:
    model, batch = encoder(), sentences()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    parts = dict(model.embeddings.named_parameters())
    hidden = parts["word_embeddings.weight"][ids] + parts["position_embeddings.weight"][:6]
    hidden = model.embeddings.LayerNorm(hidden + parts["token_type_embeddings.weight"][0])
    for number in range(2):
        layer = torch_layer(model, number).train()  # in eval mode a fused kernel would drop what is padded
        hidden = layer(hidden, src_key_padding_mask=mask == 0)
    for vector, tokens, size in zip(model(ids, mask), hidden, mask.sum(1), strict=True):
        mean = tokens[:size].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())


def test_padding_changes_nothing() -> None:
    model, batch = encoder(), sentences()
    padded = {key: nn.functional.pad(part, (0, 1)) for key, part in batch.items()}
    torch.testing.assert_close(model(**padded), model(**batch))


def written(directory: Path, **changes: object) -> Path:
    model = encoder()
    extra = {"pooler.dense.weight": torch.ones(8, 8), "embeddings.position_ids": torch.arange(7)[None]}
    save_file({**model.state_dict(), **extra}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**asdict(SMALL), "model_type": "bert", **changes}))
    return directory


def test_an_encoder_is_read_from_a_directory(tmp_path: Path) -> None:
    model = load_encoder(written(tmp_path))
    assert not model.training
    torch.testing.assert_close(model(**sentences()), encoder()(**sentences()))


@pytest.mark.long
def test_the_defaults_are_those_of_minilm() -> None:
    with torch.device("meta"):
        model = SentenceEncoder()
    assert sum(p.numel() for p in model.parameters()) == 22_565_376  # 22.7 million with the pooler, which has no use
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) == 10_616_832


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16}, r"does not hold the weights of its config: size mismatch"),
        ({"num_attention_heads": 3}, r"hidden_size must be a multiple of num_attention_heads, got 8 and 3"),
        ({"hidden_size": None}, r"must be the config.json of a BERT encoder, got TypeError"),
    ],
)
def test_a_directory_that_does_not_fit_is_one_value_error(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoder(written(tmp_path, **change))


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be the config.json of a BERT encoder, got FileNotFoundError"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("method", but_long(["magnitude", "wanda", "sparsegpt", "lr", "ewr"], short=3))
def test_it_is_pruned_by_what_it_said_itself(method: str) -> None:
    model, loss = encoder(), SelfDistillation()
    pairs = loss.label(model, [sentences(20, seed=2), sentences(20, 5, seed=3)])
    report = prune(model, pairs, 0.5, method, loss_fn=loss, samples=30, progress=False)
    assert report.total == 2 * (4 * 64 + 2 * 96) and report.kept == report.total // 2
    assert all(name.endswith(("query.weight", "key.weight", "value.weight", "dense.weight")) for name in report.layers)
    assert 0 < float(loss(model, pairs[0]).detach().mean()) < 1
