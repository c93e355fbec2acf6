"""What the generator makes: films for prompts, their scores, the autoencoder's fidelity, and a picture of frames."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vecattention.atomic import replacing
from vecattention.testbed.generate import judge, scenes
from vecattention.testbed.generate.network import PROMPT, Pipeline, Sizes

STEPS, GUIDANCE, BATCH = 20, 3.0, 8


def captions_of(count: int, seed: int) -> list[str]:
    """So many captions, drawn from a seed."""
    films = scenes.draw(count, torch.Generator().manual_seed(seed))
    return [scene.caption for scene in films.scenes()]


@torch.no_grad()
def make(
    pipe: Pipeline,
    prompts: Sequence[str],
    sizes: Sizes | None = None,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Films for prompts, uint8 [B, T, H, W, 3] on the CPU; each film depends on its prompt and on ``seed`` alone."""
    sizes = sizes or Sizes()
    where = pipe.transformer.device.type
    dice = [torch.Generator(where).manual_seed(seed) for _ in prompts]
    made: Any = pipe(
        list(prompts), negative_prompt="", height=sizes.size, width=sizes.size, num_frames=sizes.frames,
        num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=PROMPT, output_type="pt",
        generator=dice,
    )  # fmt: skip
    frames: Tensor = made.frames
    return (frames.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().contiguous()


def generate(pipe: Pipeline, sizes: Sizes, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Films for so many captions drawn from a seed, and the captions."""
    captions = captions_of(count, seed)
    films = [
        make(pipe, captions[i : i + BATCH], sizes, seed=seed + i) for i in range(0, count, BATCH)
    ]  # fmt: skip
    return torch.cat(films), captions


def judged(films: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of films that show what their captions say: colour, shape, direction, and all three."""
    return judge.score(films, [scenes.Scene.parse(caption) for caption in captions])


@torch.no_grad()
def fidelity(pipe: Pipeline, sizes: Sizes, seed: int, count: int = 16) -> float:
    """Mean PSNR in dB of films that went through the autoencoder."""
    vae: Any = pipe.vae
    films = scenes.draw(count, torch.Generator().manual_seed(seed))
    shown = scenes.paint(films, sizes.frames, sizes.size).to(vae.device)
    back = torch.cat([vae.decode(vae.encode(x[None]).latent_dist.mode()).sample for x in shown])
    error = ((back - shown) / 2).pow(2).mean((1, 2, 3, 4))
    return round(float((-10 * error.log10()).mean()), 2)


def picture(films: Tensor, captions: Sequence[str], path: str | os.PathLike[str], shown: int = 7) -> None:
    """Write a PNG with a row of frames for each film, its caption above; the file appears whole or not at all."""
    from PIL import Image, ImageDraw

    count, frames, height, width, _ = films.shape
    bar = 14
    sheet = Image.new("RGB", (shown * (width + 2), count * (height + bar + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (film, caption) in enumerate(zip(films, captions, strict=True)):
        top = row * (height + bar + 4)
        pen.text((2, top + 1), caption, fill="black")
        for column in range(shown):
            frame = film[column * (frames - 1) // max(shown - 1, 1)]
            sheet.paste(Image.fromarray(frame.numpy()), (column * (width + 2), top + bar))
    with replacing(path) as name:
        sheet.save(name, format="PNG")
