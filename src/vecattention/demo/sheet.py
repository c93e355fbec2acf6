"""Writes what a generation made: the videos side by side, a picture of their frames, and the record."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecattention import machine
from vecattention.atomic import replacing
from vecattention.demo.generation import Made, Settings
from vecattention.testbed.files import write_frames

SCHEMA = 1
FPS = 8.0
SHOWN = 7
LINE = 16
"""Height of a line of text, pixels."""


def write(settings: Settings, made: Sequence[Made]) -> list[tuple[Path, str]]:
    """Write into the settings' folder, which is made if need be: each file whole or not at all.

    Returns:
        The paths, and what each is.
    """
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    film, image, log = out / "generate.mp4", out / "generate.png", out / "generate.jsonl"
    write_frames([beside([entry.frames for entry in made])], film, FPS)
    picture(settings.prompt, made, image)
    with replacing(log) as name:
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines(settings, made)))
    return [
        (film, "the videos side by side: " + ", ".join(entry.name for entry in made)),
        (image, "frames of each, with what was measured"),
        (log, "the record: machine, versions, settings, every video's figures"),
    ]


def beside(videos: Sequence[Tensor], gap: int = 4) -> Tensor:
    """Videos uint8 [T, H, W, 3] next to each other on white, height and width even."""
    parts: list[Tensor] = []
    for video in videos:
        parts += [video, torch.full((*video.shape[:2], gap, 3), 255, dtype=torch.uint8)]
    whole = torch.cat(parts[:-1], 2)
    pad = (0, 0, 0, whole.shape[2] % 2, 0, whole.shape[1] % 2)
    return torch.nn.functional.pad(whole, pad, value=255)


def picture(prompt: str, made: Sequence[Made], path: str | os.PathLike[str]) -> None:
    """Write a PNG with a row of frames for each video; the file appears whole or not at all."""
    from PIL import Image, ImageDraw

    count, height, width, _ = made[0].frames.shape
    scale = max(1, 128 // width)
    wide, tall = width * scale, height * scale
    shown = min(SHOWN, count)
    sheet = Image.new("RGB", (shown * (wide + 4) - 4, LINE + len(made) * (tall + LINE + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((2, 2), prompt, fill="black")
    for row, entry in enumerate(made):
        top = LINE + row * (tall + LINE + 6)
        pen.text((2, top + 2), words(entry), fill="black")
        for column in range(shown):
            frame = Image.fromarray(entry.frames[column * (count - 1) // max(shown - 1, 1)].numpy())
            sheet.paste(frame.resize((wide, tall), Image.Resampling.NEAREST), (column * (wide + 4), top + LINE))
    with replacing(path) as name:
        sheet.save(name, format="PNG")


def words(entry: Made) -> str:
    """A video's figures in one line."""
    text = f"{entry.name}: {entry.seconds:.1f} s"
    if entry.name != "dense":
        text += f", attends {100 * entry.density:.1f} %, PSNR {entry.psnr:.1f} dB, SSIM {entry.ssim:.3f}"
    return text + (f", shows {entry.seen}" if entry.seen else "")


def lines(settings: Settings, made: Sequence[Made]) -> list[dict[str, Any]]:
    """The record's lines, JSON-ready: "generation", then one "video" for each."""
    head = {
        "kind": "generation", "schema": SCHEMA, "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings.record(), "machine": machine.facts(), "commit": machine.commit(),
    }  # fmt: skip
    names = ("name", "density", "seconds", "attention", "psnr", "ssim", "seen")
    videos = [
        {"kind": "video", "shape": list(entry.frames.shape), **{name: getattr(entry, name) for name in names}}
        for entry in made
    ]
    return [head, *videos]
