"""Makes the same video with dense and with sparse attention, and measures how much it differs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vecattention
from vecattention.demo.settings import DTYPES, check_device, check_out
from vecattention.evals.video import psnr, ssim
from vecattention.testbed.generate import Scene, Sizes, load, look
from vecattention.testbed.generate.network import PROMPT

CAPTION = "a red circle moves left over stripes"
LONGEST = 512
"""Prompt tokens of the published Wan models."""

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """What to generate.

    Attributes:
        out: folder for the film, the picture and the record.
        prompt: what the video shows.
        densities: a video is made with each of these shares of the pairs, beside the dense one.
        dense_steps: the first steps that stay dense, a number (int) or a share.
        rule: the arguments of `vecattention.select` that decide the set of keys, the density apart.
        seed, steps, guidance: of the generation.
        size: (height, width) in pixels, and frames; None: those of the model.
        model: a Wan pipeline directory; None: the small one that ships.
        device, dtype: where the model runs, and in which precision.
    """

    out: Path
    prompt: str = CAPTION
    densities: tuple[float, ...] = (0.5, 0.3, 0.15)
    dense_steps: int | float = 0.06
    rule: dict[str, Any] | None = None
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    size: tuple[int, int] | None = None
    frames: int | None = None
    model: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def record(self) -> dict[str, Any]:
        """The settings as JSON-ready values; of paths only the last part."""
        values = asdict(self)
        del values["out"]
        return values | {"model": self.model and self.model.name}


@dataclass(frozen=True)
class Made:
    """One video.

    Attributes:
        name: "dense", or "density 0.3".
        frames: uint8 [T, H, W, 3].
        density: pairs attended over all pairs, dense steps included.
        seconds, attention: of the whole generation, and of self-attention in it.
        psnr, ssim: against the dense video.
        seen: what the judge of the testbed reads from the pixels, where the prompt is one of its captions.
    """

    name: str
    frames: Tensor
    density: float
    seconds: float
    attention: float
    psnr: float
    ssim: float
    seen: str


def check(settings: Settings) -> None:
    """Check what can be checked before the model is loaded.

    Raises:
        ValueError: a value that cannot serve, with what was wanted and what to do.
    """
    check_out(settings.out)
    if not settings.prompt.strip():
        raise ValueError("--prompt is empty, wanted words; for instance " + repr(CAPTION))
    if not settings.densities or not all(0 < density <= 1 for density in settings.densities):
        raise ValueError(f"--densities is {settings.densities}, wanted shares over 0 up to 1; for instance 0.5,0.3")
    if settings.steps < 1:
        raise ValueError(f"--steps is {settings.steps}, wanted at least 1; 20 is enough for the small model")
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype is {settings.dtype!r}, wanted one of {', '.join(DTYPES)}; float32 is right on a CPU")
    check_device(settings.device)


def work(settings: Settings) -> float:
    """How many videos are made."""
    return 1.0 + len(settings.densities)


@torch.no_grad()
def run(settings: Settings, report: Report) -> list[Made]:
    """The dense video and one for each density, from the same noise.

    Raises:
        ValueError: settings that cannot serve; a model that cannot be read.
    """
    check(settings)
    report("loading the model", 0)
    pipe = load(settings.model, getattr(torch, settings.dtype), settings.device)
    made: list[Made] = []
    for name, arguments in _ways(settings):
        report(name, 0)
        made.append(_make(pipe, settings, name, arguments, made[0].frames if made else None))
        report(name, 1)
    return made


def _ways(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of `apply`. Dense goes through it too, for its times: the stock pipeline bit for bit."""
    rule = settings.rule or {}
    sparse = [
        (f"density {density:g}", {"density": density, "dense_steps": settings.dense_steps, **rule})
        for density in settings.densities
    ]
    return [("dense", {"dense_steps": 1.0, **rule}), *sparse]


def _make(pipe: Any, settings: Settings, name: str, arguments: dict[str, Any], dense: Tensor | None) -> Made:
    begun = time.perf_counter()
    with vecattention.apply(pipe, **arguments) as told:
        frames = _generate(pipe, settings)
    seconds = time.perf_counter() - begun
    stats = told.stats
    same = frames if dense is None else dense
    return Made(
        name, frames, stats.mean_density, seconds, stats.seconds, psnr(same, frames), ssim(same, frames),
        _seen(settings.prompt, frames),
    )  # fmt: skip


def _generate(pipe: Any, settings: Settings) -> Tensor:
    small = settings.model is None
    shape = settings.size or ((Sizes().size, Sizes().size) if small else None)
    frames = settings.frames or (Sizes().frames if small else None)
    given: dict[str, Any] = {} if shape is None else {"height": shape[0], "width": shape[1]}
    given |= {} if frames is None else {"num_frames": frames}
    dice = torch.Generator(settings.device).manual_seed(settings.seed)
    video: Tensor = pipe(
        settings.prompt, num_inference_steps=settings.steps, guidance_scale=settings.guidance, generator=dice,
        max_sequence_length=PROMPT if small else LONGEST, output_type="pt", **given,
    ).frames[0]  # fmt: skip
    return (video.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def _seen(prompt: str, frames: Tensor) -> str:
    """What the judge sees, in words, where it knows the prompt's words."""
    try:
        Scene.parse(prompt)
    except ValueError:
        return ""
    seen = look(frames)
    if seen.colour is None:
        return "nothing"
    return f"{seen.colour} {seen.shape} {seen.direction or 'still'}"
