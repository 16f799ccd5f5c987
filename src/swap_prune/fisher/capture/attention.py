"""``nn.MultiheadAttention`` told in Linear layers, so that what goes into each weight and comes back can be seen.

Its projections of queries, keys and values lie in one parameter, and its output layer does not run as a module of its
own. Here Linear layers make the projections, torch's own function attends with identities in their places, and the
output layer runs.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.seen_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["attention_forward", "weights_of"]


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
        projected = _projections(module, linears, (query, key, value))
        queries, keys, values = (part.transpose(0, 1) if turned else part for part in projected)
        identity = torch.eye(module.embed_dim, dtype=query.dtype, device=query.device)
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
            identity,
            None,
            training=False,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return module.out_proj(out.transpose(0, 1) if turned else out), shares

    return forward


def _projections(
    module: nn.MultiheadAttention, linears: Mapping[str, nn.Module], given: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """Return queries, keys and values, each (..., width), of what attention was called with."""
    if module.in_proj_weight is None:
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        products = [linears[name](x) for name, x in zip(weights_of(module), given, strict=True)]
        return [x if bias is None else x + bias for x, bias in zip(products, biases, strict=True)]
    found: dict[int, tuple[Tensor, ...]] = {}  # all three of each tensor: one parameter is one layer
    for x in given:
        if id(x) not in found:
            found[id(x)] = linears["in_proj_weight"](x).chunk(3, -1)
    return [found[id(x)][place] for place, x in enumerate(given)]


def weights_of(module: nn.MultiheadAttention) -> list[str]:
    """Return the names of the weights of the projections."""
    one = module.in_proj_weight is not None
    return ["in_proj_weight"] if one else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
