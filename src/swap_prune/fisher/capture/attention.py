"""``nn.MultiheadAttention`` told in Linear layers, so that what goes into each weight and comes back can be seen.

Its projections of queries, keys and values lie in one parameter, and its output layer does not run as a module of its
own. Here Linear layers make the projections, torch's own function attends with identities in their places, and the
output layer runs.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.seen_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["attention_forward", "slow_path"]


def attention_forward(module: nn.MultiheadAttention, linears: Mapping[str, nn.Module]) -> Callable[..., Any]:
    """Return what computes as the module's own ``forward`` in eval mode, by Linear layers for its projections."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        turned = module.batch_first and query.ndim == 3
        projected = _projections(module, linears, (query, key, value), int(turned))
        queries, keys, values = (part.transpose(0, 1) if turned else part for part in projected)
        own = torch.eye(module.embed_dim, dtype=query.dtype, device=query.device)
        out, shares = functional.multi_head_attention_forward(
            queries,
            keys,
            values,
            module.embed_dim,
            module.num_heads,
            None,
            None,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            own,
            None,
            training=False,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=own,
            k_proj_weight=own,
            v_proj_weight=own,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return module.out_proj(out.transpose(0, 1) if turned else out), shares

    return forward


def _projections(
    module: nn.MultiheadAttention, linears: Mapping[str, nn.Module], given: tuple[Tensor, Tensor, Tensor], tokens: int
) -> list[Tensor]:
    """Return queries, keys and values, each (..., width), from tensors whose dimension of tokens is ``tokens``."""
    query, key, value = given
    if module.in_proj_weight is None:
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        products = [linears[name](x) for name, x in zip(names, given, strict=True)]
        return [x if bias is None else x + bias for x, bias in zip(products, biases, strict=True)]
    project = linears["in_proj_weight"]
    if query is key and key is value:
        return list(project(query).chunk(3, -1))
    # one parameter, so one layer, for different inputs: all projections of all of them, and of each its own
    lengths = [x.shape[tokens] for x in given]
    pieces = project(torch.cat(given, tokens)).split(lengths, tokens)
    return [piece.chunk(3, -1)[place] for place, piece in enumerate(pieces)]


@contextmanager
def slow_path() -> Iterator[None]:
    """Run a block in which the modules of transformers call those that they are made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
