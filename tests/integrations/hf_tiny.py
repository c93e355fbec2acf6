"""Tiny random models of the real classes, in float64 so that rounding decides nothing, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 120
FIRST_WORD = 20  # ids below stand for images and the like
IMAGES = 60
Inputs = dict[str, Tensor]

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # scores spread enough for a threshold of 0.9 to leave keys out
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
MARKS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}


@dataclass(frozen=True)
class Kind:
    """A class of models.

    Attributes:
        build: a model with fresh weights.
        pixels: what one sequence with images needs beside its ids, or None for text models.
        mark: the id that stands for a token of an image.
        vision_tokens: how many of them a sequence has.
    """

    build: Callable[[], Any]
    pixels: Callable[[], Inputs] | None = None
    mark: int = 3
    vision_tokens: int = 240

    def make(self) -> Any:
        """The model, float64, evaluating; always the same weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().double().eval()

    def inputs(self, words: int = 60, seed: int = 0) -> Inputs:
        """One sequence: 9 words, the images (as many words in a text model), and the other words."""
        inputs = text(words + self.vision_tokens, seed)
        if self.pixels is None:
            return inputs
        inputs["input_ids"][:, 9 : 9 + self.vision_tokens] = self.mark
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inputs |= self.pixels()
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.mark).long()
        return inputs


def text(length: int, seed: int = 0) -> Inputs:
    """One sequence of words."""
    draw = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(FIRST_WORD, VOCABULARY, (1, length), generator=draw)}


def padded(sequences: Sequence[Inputs], side: str) -> Inputs:
    """The sequences as one batch, padded at the left or the right."""
    longest = max(s["input_ids"].shape[1] for s in sequences)
    batch: Inputs = {}
    for name in sequences[0]:
        rows = [s[name] for s in sequences]
        if name in ("input_ids", "mm_token_type_ids"):
            rows = [_pad(row, longest, side) for row in rows]
        batch[name] = torch.cat(rows)
    mask = torch.cat([_pad(torch.ones_like(s["input_ids"]), longest, side) for s in sequences])
    batch["attention_mask"] = mask
    if "image_grid_thw" not in batch:  # the Qwen models count without the padding by themselves
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return batch


def _pad(row: Tensor, longest: int, side: str) -> Tensor:
    missing = longest - row.shape[1]
    return torch.nn.functional.pad(row, (missing, 0) if side == "left" else (0, missing))


def qwen25_vl() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_without_head_dim(), **MROPE},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
        **MARKS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, **MROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        **MARKS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def internvl() -> Any:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen3Config(**TEXT),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        image_token_id=MARKS["image_token_id"],
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config)


def llava_onevision() -> Any:
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**_without_head_dim()),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            vision_use_head=False,
        ),
        image_token_id=MARKS["image_token_id"],
        video_token_id=MARKS["video_token_id"],
        vision_feature_layer=-1,
        image_grid_pinpoints=[[56, 56]],
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_without_head_dim()))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT))


def mistral(window: int | None = 128, head_dim: int = 16) -> Any:
    config = transformers.MistralConfig(**{**TEXT, "head_dim": head_dim}, sliding_window=window)
    return transformers.MistralForCausalLM(config)


def gemma2(implementation: str = "eager") -> Any:
    config = transformers.Gemma2Config(
        **{**TEXT, "sliding_window": 128, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
    )
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation=implementation)


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        **{**TEXT, "sliding_window": 128, "query_pre_attn_scalar": 16, "layer_types": kinds}
    )
    return transformers.Gemma3ForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **{**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128}
    )
    return transformers.GptOssForCausalLM(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=200,
        max_target_positions=400,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _patches(features: int) -> Inputs:
    """An image of 30 x 32 patches for the Qwen towers, which merge 2 x 2 of them."""
    return {
        "pixel_values": torch.randn(30 * 32, features, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 30, 32]]),
    }


def _without_head_dim() -> dict[str, Any]:
    return {name: value for name, value in TEXT.items() if name != "head_dim"}


KINDS = {
    "Qwen2.5-VL": Kind(qwen25_vl, lambda: _patches(1176)),
    "Qwen3-VL": Kind(qwen3_vl, lambda: _patches(1536)),
    "InternVL": Kind(internvl, lambda: {"pixel_values": torch.randn(IMAGES, 3, 56, 56, dtype=torch.float64)}),
    "LLaVA-OneVision": Kind(
        llava_onevision,
        lambda: {"pixel_values_videos": torch.randn(1, IMAGES, 3, 56, 56, dtype=torch.float64)},
        mark=4,
        vision_tokens=241,  # an image's end is a token of its own
    ),
    "Llama": Kind(llama),
    "Qwen2": Kind(qwen2),
    "Qwen3": Kind(qwen3),
}
"""Models whose text part is sparse throughout."""
