"""What the two stages minimise, and the encoded films between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vecattention.testbed.generate import scenes
from vecattention.testbed.generate.network import PROMPT, SHIFT, Parts, Sizes

CUT, WINDOW = 5, 32
"""Frames, and pixels in height and width, of the cuttings that the autoencoder is trained on in most steps. It is
causal and made of convolutions, so that films are more of the same; many small steps learn more than few large ones."""

CLIP, WHOLE = 9, 0.25
"""Frames of the whole films in the other steps, and the share of these steps."""

KL = 2e-5
COLOURED = 4.0
"""How much more an error counts at a pixel whose channels differ by 1, on the scale from -1 to 1."""

SILENT = 0.1
"""Share of captions that are left out, for guidance."""


def autoencoder_loss(parts: Parts, sizes: Sizes, batch: int, generator: torch.Generator) -> Tensor:
    """Squared error of decoded clips, coloured pixels counting more, and a little of the latents' divergence from a
    normal. The shape covers a tenth of a frame: with equal weights the grounds alone are learned for long."""
    clip = _cutting(sizes, batch, generator)
    vae: Any = parts.vae
    posterior = vae.encode(clip).latent_dist
    mean, spread = posterior.mean.float(), posterior.std.float()
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    made = vae.decode((mean + spread * noise).to(posterior.mean.dtype)).sample.float()
    divergence = 0.5 * (mean**2 + spread**2 - 1 - 2 * spread.log()).sum(1).mean()
    weight = 1 + COLOURED * (clip.amax(1, keepdim=True) - clip.amin(1, keepdim=True))
    loss: Tensor = (weight * (made - clip) ** 2).mean() + KL * divergence
    return loss


@torch.no_grad()
def _cutting(sizes: Sizes, batch: int, generator: torch.Generator) -> Tensor:
    """Pieces of films, [B, 3, CUT, WINDOW, WINDOW], or fewer of whole frames, [B / 8, 3, CLIP, size, size]."""

    def place(count: int) -> int:
        return int(torch.randint(count, (), generator=generator, device=generator.device))

    whole = place(1000) < 1000 * WHOLE
    frames, window = (CLIP, sizes.size) if whole else (CUT, min(WINDOW, sizes.size))
    films = scenes.draw(max(1, batch // 8) if whole else batch, generator)
    first = 4 * place((sizes.frames - frames) // 4 + 1)
    clip = scenes.paint(films, sizes.frames, sizes.size, first, first + frames)
    top, left = place(sizes.size - window + 1), place(sizes.size - window + 1)
    return clip[..., top : top + window, left : left + window].contiguous()


@dataclass(frozen=True)
class Encoded:
    """Films in the autoencoder's latents, normalised, with their captions' tokens; all on one device.

    Attributes:
        latents: float16 [N, C, T, H, W].
        ids: int64 [N, PROMPT], padded with 0.
        silence: int64 [PROMPT], the empty caption.
    """

    latents: Tensor
    ids: Tensor
    silence: Tensor


@torch.no_grad()
def encode(parts: Parts, sizes: Sizes, count: int, batch: int, seed: int, device: torch.device) -> Encoded:
    """So many films, encoded; sets the autoencoder's latents_mean and latents_std to those of the first batches."""
    vae: Any = parts.vae
    latents, ids = [], []
    for number in range(-(-count // batch)):
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
        films = scenes.draw(batch, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latent = vae.encode(scenes.paint(films, sizes.frames, sizes.size)).latent_dist.mode()
        latents.append(latent.float())
        ids.append(tokens(parts, [scene.caption for scene in films.scenes()]))
    sample = torch.cat(latents[: max(1, 512 // batch)])
    mean, spread = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=spread.tolist())
    shape = (1, -1, 1, 1, 1)
    normal = [((x - mean.view(shape)) / spread.view(shape)).half() for x in latents]
    silence = tokens(parts, [""])[0]
    return Encoded(torch.cat(normal)[:count], torch.cat(ids)[:count].to(device), silence.to(device))


def tokens(parts: Parts, captions: list[str]) -> Tensor:
    """int64 [B, PROMPT], as the pipeline makes them."""
    made = parts.tokenizer(captions, padding="max_length", max_length=PROMPT, truncation=True, return_tensors="pt")
    ids: Tensor = made["input_ids"]
    return ids


def denoiser_loss(parts: Parts, films: Encoded, batch: int, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity noise - film at noise levels shifted as in generation (flow matching)."""
    device = generator.device
    rows = torch.randint(len(films.latents), (batch,), generator=generator, device=device)
    clean, ids = films.latents[rows].float(), films.ids[rows]
    silent = torch.rand(batch, 1, generator=generator, device=device) < SILENT
    ids = torch.where(silent, films.silence, ids)
    spread = torch.rand(batch, generator=generator, device=device)
    uniform = (torch.arange(batch, device=device) + spread) / batch  # one in each of as many equal parts
    level = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    mixed = torch.lerp(clean, noise, level[:, None, None, None, None])
    transformer: Any = parts.transformer
    said = prompt_embeds(parts, ids)
    moved = transformer(mixed, timestep=level * 1000, encoder_hidden_states=said, return_dict=False)[0]
    return functional.mse_loss(moved.float(), noise - clean)


def prompt_embeds(parts: Parts, ids: Tensor) -> Tensor:
    """[B, PROMPT, width], padding zero, as the pipeline makes them."""
    real = ids != 0
    encoder: Any = parts.text_encoder
    embeds: Tensor = encoder(ids, real.long()).last_hidden_state
    return embeds * real[..., None]
