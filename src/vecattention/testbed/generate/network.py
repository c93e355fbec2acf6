"""The generator: the real Wan classes with small numbers; building, saving and loading.

`load()` gives the trained pipeline that ships with the package, `load(path)` any Wan pipeline directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vecattention.testbed.errors import ModelError
from vecattention.testbed.generate.scenes import WORDS
from vecattention.testbed.model import DATA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Pipeline = Any
"""A diffusers.WanPipeline; diffusers has no types that a checker could read."""

SHIPPED = DATA / "generator"
"""Where the trained pipeline ships."""

PROMPT = 16
"""Prompt tokens that a film is trained and made with."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of the generator.

    Attributes:
        size: height and width of a film, pixels, a multiple of 16.
        frames: frames of a film, one more than a multiple of 4.
        channels: latent channels.
        patch: pixels, in height and width, that the autoencoder takes as one.
        base, multiples: channels of the autoencoder at its two or three resolutions: base * multiple.
        width, heads, layers, wide: of the transformer; ``wide`` is the width of its feed-forward layers.
        text: width of the text encoder.
    """

    size: int = 64
    frames: int = 13
    channels: int = 16
    patch: int = 4
    base: int = 32
    multiples: tuple[int, ...] = (1, 1)
    width: int = 128
    heads: int = 4
    layers: int = 4
    wide: int = 384
    text: int = 64

    @property
    def shrink(self) -> tuple[int, int]:
        """Frames, and pixels in height and width, of one latent."""
        halvings: int = 2 ** (len(self.multiples) - 1)
        return halvings, self.patch * halvings

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, height and width: the tokens of the transformer."""
        time, space = self.shrink
        return (self.frames - 1) // time + 1, self.size // space, self.size // space


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline: an AutoencoderKLWan, a WanTransformer3DModel, a UMT5EncoderModel, ..."""

    vae: Any
    transformer: Any
    text_encoder: Any
    tokenizer: PreTrainedTokenizerFast
    scheduler: Any

    def pipeline(self) -> Pipeline:
        """The pipeline of these parts."""
        from diffusers import WanPipeline

        pipe: Pipeline = WanPipeline(
            tokenizer=self.tokenizer, text_encoder=self.text_encoder, vae=self.vae, transformer=self.transformer,
            scheduler=self.scheduler,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe


def build(sizes: Sizes, seed: int = 0) -> Parts:
    """Parts with fresh float32 weights drawn from a seed; the caller's random state is left as it was."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=sizes.base, z_dim=sizes.channels, dim_mult=list(sizes.multiples), num_res_blocks=1,
            temperal_downsample=[True] * (len(sizes.multiples) - 1),
            latents_mean=[0.0] * sizes.channels, latents_std=[1.0] * sizes.channels,
            in_channels=3 * sizes.patch**2, out_channels=3 * sizes.patch**2, patch_size=sizes.patch, is_residual=True,
            scale_factor_spatial=sizes.shrink[1], scale_factor_temporal=sizes.shrink[0],
        )  # fmt: skip
        _start(vae)
        transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1), num_attention_heads=sizes.heads, attention_head_dim=sizes.width // sizes.heads,
            in_channels=sizes.channels, out_channels=sizes.channels, text_dim=sizes.text, freq_dim=128,
            ffn_dim=sizes.wide, num_layers=sizes.layers, rope_max_seq_len=64,
        )  # fmt: skip
        text_encoder = _text_encoder(sizes.text)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT
    )
    return Parts(vae, transformer, text_encoder, tokenizer(), scheduler)


def _start(vae: Any) -> None:
    """Weights from which the autoencoder learns fast: convolutions that keep the size of what they are given, residual
    branches that begin as nothing, and latents with little noise. First layers get biases as large as their values:
    the norms take the size of a vector away, so that without them all greys are one."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock

    for part in vae.modules():
        if isinstance(part, (torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)
    for part in vae.modules():
        if isinstance(part, WanResidualBlock):
            torch.nn.init.zeros_(part.conv2.weight)
        if isinstance(part, WanAttentionBlock):
            torch.nn.init.zeros_(part.proj.weight)
    for part in (vae.encoder.conv_in, vae.decoder.conv_in):
        torch.nn.init.normal_(part.bias)
    channels = vae.config.z_dim
    torch.nn.init.zeros_(vae.quant_conv.weight[channels:])
    torch.nn.init.constant_(vae.quant_conv.bias[channels:], LOG_VARIANCE)


LOG_VARIANCE = -4.5
"""Of the latents' noise before training."""

SHIFT = 3.0
"""How far noise levels are shifted towards noise, in training and generation."""


def _text_encoder(width: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=-(-(len(WORDS) + 3) // 8) * 8, d_model=width, d_kv=16, d_ff=2 * width, num_layers=2,
        num_heads=max(width // 16, 1), dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of a caption, the end after it, padding on the right."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    core: Any = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def save(pipe: Pipeline, path: str | os.PathLike[str]) -> None:
    """Write a pipeline's directory with float16 weights, whole or not at all; one that is there is replaced."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        with _quiet():
            pipe.save_pretrained(new, safe_serialization=True)
        _halve(new)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(old, ignore_errors=True)


def _halve(folder: Path) -> None:
    """Rewrite the weights below a folder as float16."""
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("*.safetensors"):
        weights = load_file(path)
        half = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
        save_file(half, path, {"format": "pt"})
        path.chmod(0o644)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers and diffusers, which are as the caller had them afterwards."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    kinds = (of_diffusers, of_transformers)
    shown = [logging for logging in kinds if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def load(
    path: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Pipeline:
    """A Wan text-to-video pipeline, by default the small trained one that ships with the package.

    Args:
        path: a pipeline directory; None: the trained one.
        dtype: precision of the transformer and the text encoder; the autoencoder stays in float32.
        device: where it runs.

    Raises:
        ModelError: no such directory, or what is in it is no Wan pipeline.
    """
    from diffusers import AutoencoderKLWan, WanPipeline

    folder = SHIPPED if path is None else Path(path)
    if path is None and not folder.is_dir():
        raise ModelError(
            "path is None, wanted the trained generator of the package, which this copy lacks; pass the directory of a "
            "Wan pipeline, or train one with python -m vecattention.testbed.generate.train"
        )
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"path is {str(folder)!r}, wanted the directory of a Wan pipeline, with model_index.json")
    try:
        with _quiet():
            vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
            pipe: Pipeline = WanPipeline.from_pretrained(folder, vae=vae, dtype=dtype)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"path is {str(folder)!r}, wanted a Wan pipeline that loads; diffusers says: {error}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    moved: Pipeline = pipe.to(device)
    return moved
