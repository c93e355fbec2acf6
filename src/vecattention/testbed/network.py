"""The model's forward pass over a batch of equal movies: the weights and layers of the real classes, called in bulk.

The real vision tower attends frame by frame in a Python loop; here all frames go through at once (tests compare).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from vecattention.testbed.batches import Batch

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionBlock,
    )


def see(visual: Qwen2_5_VisionTransformerPretrainedModel, patches: Tensor) -> Tensor:
    """Vision embeddings [N, 256] of N temporal patches of 28 x 28 pixels: patches [N * 4, 1176]."""
    kernel = visual.patch_embed.proj.weight
    x = functional.linear(patches, kernel.flatten(1))
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=patches.device)
    cos, sin = visual.rotary_pos_emb(x, places)
    x = x.view(-1, 4, x.shape[-1])
    for block in visual.blocks:
        x = _block(cast("Qwen2_5_VLVisionBlock", block), x, cos, sin)
    return cast(Tensor, visual.merger(x.reshape(-1, x.shape[-1])))


def _block(block: Qwen2_5_VLVisionBlock, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).view(len(x), 4, 3, attention.num_heads, -1)
    query, key, value = qkv.unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * attention.scaling
    mixed = scores.float().softmax(-1).to(value.dtype) @ value.transpose(1, 2)
    x = x + attention.proj(mixed.transpose(1, 2).reshape(len(x), 4, -1))
    return x + cast(Tensor, block.mlp(block.norm2(x)))


def think(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, S, 256] of a batch, and its vision embeddings [B, T, 256]."""
    embed = model.get_input_embeddings()
    rows = len(batch.after)
    video = see(model.model.visual, batch.patches).unflatten(0, (rows, -1))
    before = embed(batch.before).expand(rows, -1, -1)
    sequence = torch.cat([before, video.to(before.dtype), embed(batch.after)], 1)
    out = model.model.language_model(inputs_embeds=sequence, position_ids=batch.positions, use_cache=False)
    return out.last_hidden_state, video


def answer_logits(model: Qwen2_5_VLForConditionalGeneration, hidden: Tensor, at: Tensor) -> Tensor:
    """Logits [B, Q, vocabulary] of what follows position at[q] of the sequence."""
    return cast(Tensor, model.lm_head(hidden[:, at]))
