"""A sentence encoder: BERT (Devlin et al., 2019), the mean of its tokens, unit length.

The network of ``all-MiniLM-L6-v2`` and its like, with the parameter names of their checkpoints. It is written out here
so that it can be read, and so that its weights come from a safetensors file alone: no code of a checkpoint is ever run.

Place in the pipeline: before it, like the models of the zoo. Its batches are dicts, and it has no labels:
:class:`swap_prune.SelfDistillation` is the loss that prunes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from swap_prune.weights_file import read_weights

__all__ = ["EncoderConfig", "SentenceEncoder", "load_encoder"]

_UNUSED = ("pooler.", "embeddings.position_ids")  # in checkpoints, but not used by the mean of the tokens


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder, named as in its ``config.json``.

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: Width d, a multiple of the number of heads.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads of each.
        intermediate_size: Width of the perceptron of each.
        max_position_embeddings: Tokens of the longest sentence.
        type_vocab_size: Kinds of segments.
        layer_norm_eps: Added to variances.
    """

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )


class Embeddings(nn.Module):
    """Words, positions and segments, added and normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (n, T, d) for tokens (n, T), all of the first segment."""
        summed = self.word_embeddings(tokens) + self.position_embeddings.weight[: tokens.shape[1]]
        normed: Tensor = self.LayerNorm(summed + self.token_type_embeddings.weight[0])
        return normed


class SelfAttention(nn.Module):
    """Attention of every token to those that are not padding."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads

    def forward(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """Return (n, T, d) for hidden (n, T, d) and what may be looked at, (n, 1, 1, T), boolean."""
        q, k, v = (
            layer(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return functional.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """A linear layer whose output is added to what there was, and normalised."""

    def __init__(self, inputs: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Return (n, T, d) for hidden (n, T, inputs) and before (n, T, d)."""
        normed: Tensor = self.LayerNorm(self.dense(hidden) + before)
        return normed


class Block(nn.Module):
    """Attention, then a perceptron of one hidden layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Residual(config.hidden_size, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Residual(config.intermediate_size, config)

    def forward(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """Return (n, T, d), as for :class:`SelfAttention`."""
        hidden = self.attention["output"](self.attention["self"](hidden, allowed), hidden)
        block: Tensor = self.output(functional.gelu(self.intermediate["dense"](hidden)), hidden)
        return block


class SentenceEncoder(nn.Module):
    """Tokens in, one vector of unit length a sentence out.

    Args:
        config: Its sizes.
    """

    def __init__(self, config: EncoderConfig | None = None) -> None:
        super().__init__()
        config = EncoderConfig() if config is None else config
        self.embeddings = Embeddings(config)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": blocks})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings (n, d) for tokens (n, T) and a mask (n, T), 0 at padding."""
        hidden = self.embeddings(input_ids)
        allowed = attention_mask.bool()[:, None, None]
        for block in self.encoder["layer"].children():
            hidden = block(hidden, allowed)
        counted = attention_mask.unsqueeze(2).to(hidden)
        return functional.normalize((hidden * counted).sum(1) / counted.sum(1), dim=1)


def load_encoder(directory: str | Path) -> SentenceEncoder:
    """Make the encoder of a directory with ``config.json`` and ``model.safetensors``; in eval mode.

    Raises:
        ValueError: If a file is missing or unreadable, or the weights are not those of such an encoder.
    """
    path = Path(directory) / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        config = EncoderConfig(**{f.name: written[f.name] for f in fields(EncoderConfig)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be the config.json of a BERT encoder, got {type(error).__name__}: {error}"
        ) from error
    model = SentenceEncoder(config)
    weights = read_weights(path.with_name("model.safetensors"))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_UNUSED)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"model.safetensors in {directory} does not hold the weights of its config: {reason}"
        ) from error
    return model.eval()
