"""Tiny random video generators of the real classes, built in the test: nothing is downloaded."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("a red blue green circle square moves left right up down over stripes dots plain slowly " * 1).split()
TEMPLATE = {"template": "a {}", "crop_start": 1}


def tokenizer(length: int = 32) -> PreTrainedTokenizerFast:
    """A real fast tokenizer of whole words that pads on the right."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def wan_transformer(layers: int = 2, heads: int = 2, seed: int = 0, **more: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2), "num_attention_heads": heads, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": layers,
            "cross_attn_norm": True, "rope_max_seq_len": 32, **more,
        }
    ).eval()  # fmt: skip


def wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def umt5() -> UMT5EncoderModel:
    torch.manual_seed(2)
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return UMT5EncoderModel(config).eval()


def wan_pipeline(**more: object) -> WanPipeline:
    pipe = WanPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_vae(), transformer=wan_transformer(**more),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_pipeline() -> WanImageToVideoPipeline:
    """Wan 2.1 image to video: its cross-attention has an image branch of its own."""
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    image_size = {"height": 32, "width": 32}
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_vae(),
        transformer=wan_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=32),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=image_size, size=image_size),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hunyuan_transformer(seed: int = 4, **more: object) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(seed)
    return HunyuanVideoTransformer3DModel(
        **{
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
            **more,
        }
    ).eval()  # fmt: skip


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    transformer = hunyuan_transformer()
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    clip = CLIPTextConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=8, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(), tokenizer=tokenizer(), transformer=transformer, vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=tokenizer(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_wan(pipe: WanPipeline, steps: int = 4, **more: object) -> torch.Tensor:
    """Latents [B, 4, 3, 16, 16] of 192 tokens, seeded."""
    arguments = {
        "prompt": "a red circle moves left over stripes", "negative_prompt": "plain", "height": 128, "width": 128,
        "num_frames": 9, "num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent",
        "max_sequence_length": 16, "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe(**{**arguments, **more}).frames


def generate_hunyuan(pipe: HunyuanVideoPipeline, steps: int = 4, **more: object) -> torch.Tensor:
    """Latents [B, 4, 3, 16, 16] of 192 tokens beside 16 text slots, seeded."""
    arguments = {
        "prompt": "red circle moves left over stripes", "prompt_template": TEMPLATE, "height": 128, "width": 128,
        "num_frames": 9, "num_inference_steps": steps, "output_type": "latent", "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe(**{**arguments, **more}).frames


def generate_image(pipe: WanImageToVideoPipeline, steps: int = 3, **more: object) -> torch.Tensor:
    arguments = {
        "prompt": "a red circle moves left", "negative_prompt": "plain", "height": 64, "width": 64, "num_frames": 9,
        "image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)), "num_inference_steps": steps,
        "guidance_scale": 4.0, "output_type": "latent", "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe(**{**arguments, **more}).frames


MAKERS = {
    "wan": (wan_pipeline, generate_wan), "wan-i2v": (image_pipeline, generate_image),
    "hunyuan": (hunyuan_pipeline, generate_hunyuan),
}  # fmt: skip
