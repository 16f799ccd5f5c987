"""torch's multi-head attention told in products, so that what goes into each weight and comes back can be seen.

Its projections of queries, keys and values lie in one parameter, and its output layer does not run as a module of its
own. Here the projections are made first, torch's own function attends with identities in their places, and the output
layer comes last.

Place in the pipeline: beneath :mod:`~swap_prune.fisher.capture.watch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swap_prune.fisher.capture.layers import Multiply

__all__ = ["attend"]

_SIGNATURE = signature(functional.multi_head_attention_forward)


def attend(linear: Multiply, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
    """Compute ``torch.nn.functional.multi_head_attention_forward``.

    Args:
        linear: Makes its products.
        arguments: Its arguments: queries, keys and values (tokens, n, width), or (tokens, width) of one sample.
        named: The same.
    """
    call = _SIGNATURE.bind(*arguments, **named)
    call.apply_defaults()
    given = call.arguments
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]
    given |= dict(zip(("query", "key", "value"), _projections(linear, given), strict=True))
    identity = torch.eye(given["embed_dim_to_check"], dtype=weight.dtype, device=weight.device)
    given |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"), identity)
    given |= {"use_separate_proj_weight": True, **dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias"))}
    out, shares = functional.multi_head_attention_forward(**given)
    return _of_samples(linear, out, weight, bias, own=False), shares


def _projections(linear: Multiply, given: Mapping[str, Any]) -> list[Tensor]:
    """Return queries, keys and values, each (tokens, n, width)."""
    three = [given[name] for name in ("query", "key", "value")]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [_of_samples(linear, *one) for one in zip(three, weights, biases, strict=True)]
    found: dict[int, tuple[Tensor, ...]] = {}  # all three of each tensor: one parameter is one product
    for x in three:
        if id(x) not in found:
            found[id(x)] = _of_samples(linear, x, weight, bias).chunk(3, -1)
    return [found[id(x)][place] for place, x in enumerate(three)]


def _of_samples(linear: Multiply, x: Tensor, weight: Tensor, bias: Tensor | None, *, own: bool = True) -> Tensor:
    """Multiply (tokens, n, width) with the samples in front, as the product is seen."""
    if x.ndim == 2:
        return linear(x, weight, bias, own=own)
    return linear(x.transpose(0, 1), weight, bias, own=own).transpose(0, 1)
