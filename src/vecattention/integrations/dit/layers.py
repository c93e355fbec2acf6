"""What an attention layer of Wan or HunyuanVideo makes of its hidden states: queries, keys, values, and the output."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn


def projections(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, S, H, D] of a self-attention layer, normalised, before position embedding."""
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    return _heads(attn, attn.norm_q(query)), _heads(attn, attn.norm_k(key)), _heads(attn, value)


def joint_projections(
    attn: Any, video: Tensor, text: Tensor | None, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, S, H, D] of video and text tokens, video first; positions are given to video alone.

    Single-stream layers project text by the video's own projections, dual-stream layers by added ones.
    """
    added = attn.add_q_proj is not None
    hidden = video if text is None or added else torch.cat((video, text), 1)
    query, key, value = (_heads(attn, layer(hidden)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
    if rotary is not None:
        query, key = (_rotated_front(x, video.shape[1], rotary) for x in (query, key))
    if text is not None and added:
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        more_query, more_key, more_value = (_heads(attn, layer(text)) for layer in layers)
        more_query, more_key = _normed(attn.norm_added_q, more_query), _normed(attn.norm_added_k, more_key)
        query, key = torch.cat((query, more_query), 1), torch.cat((key, more_key), 1)
        value = torch.cat((value, more_value), 1)
    return query, key, value


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], int(attn.heads), -1)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = norm(x)
    return normed


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring features by its angle; cos and sin [1, S, 1, D] hold each angle twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2).type_as(x)


def _rotated_front(x: Tensor, rows: int, rotary: Any) -> Tensor:
    turned: Any = apply_rotary_emb(x[:, :rows], rotary, sequence_dim=1)
    return turned if rows == x.shape[1] else torch.cat((turned, x[:, rows:]), 1)


def projected(layers: Any, x: Tensor) -> Tensor:
    """A projection and its dropout."""
    for layer in layers:
        x = layer(x)
    return x
