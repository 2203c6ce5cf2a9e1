"""GroupQueryAttention of com.microsoft in torch, with the rotary embedding inside and a KV cache that is written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

Tensor = torch.Tensor


def group_query_attention(
    a: dict[str, Any],
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    _lengths: Tensor,
    total_length: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [batch, length, heads * head_dim] of all heads, and the caches.

    `query` alone holds q, k and v where `key` is None. The caches [batch, kv_heads, room, head_dim] have room for
    `total_length` keys, of which the last `length` are written here. All rows are `total_length` long.
    """
    heads, kv_heads, total = a["num_heads"], a["kv_num_heads"], int(total_length)
    if key is None or value is None:
        size = query.shape[-1] // (heads + 2 * kv_heads)
        query, key, value = torch.split(query, [heads * size, kv_heads * size, kv_heads * size], -1)
    q, k, v = _by_head(query, heads), _by_head(key, kv_heads), _by_head(value, kv_heads)
    length = q.shape[2]
    past = total - length
    if a.get("do_rotary", 0) and cos is not None and sin is not None:
        q, k = (_rotated(x, cos[past:total], sin[past:total]) for x in (q, k))
    past_key[:, :, past:total] = k
    past_value[:, :, past:total] = v
    mask = None
    if length > 1 and past > 0:
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(past)
    attended = scaled_dot_product_attention(
        q,
        past_key[:, :, :total],
        past_value[:, :, :total],
        mask,
        is_causal=length > 1 and past == 0,
        scale=a["scale"],
        enable_gqa=heads != kv_heads,
    )
    return attended.transpose(1, 2).flatten(2), past_key, past_value


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * head_dim] -> [batch, heads, length, head_dim]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of every head turned by the angles of its position; cos and sin are [length, head_dim / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
