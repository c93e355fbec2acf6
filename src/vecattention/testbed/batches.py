"""Batches of fresh movies with questions, made on the device, in the layout of the real processor.

The frames never touch a file here: H.264's part is played by noise. `patches` gives the same numbers as the video
processor of `model.processor()` on the same frames (tests compare them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vecattention.testbed import movies, paint, words
from vecattention.testbed.model import PIXELS
from vecattention.testbed.shapes import COLOURS, SHAPES

NONE = len(SHAPES)
"""Label of a token that shows no needle."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_CHUNK = 8192


@dataclass(frozen=True)
class Plan:
    """What a batch is to hold.

    tokens: vision tokens a movie; batch: movies; needles: in each; asked: questions about each; repeat: whether colours
    may repeat; wording: index into `words.QUESTIONS`; interval: rotary positions between two temporal patches;
    late: whether the text goes on after the video's last position (transformers 5.17 goes on after its first);
    noise: largest standard deviation of the pixel noise, grey levels of 255.
    """

    tokens: int
    batch: int
    needles: int = 4
    asked: int = 1
    repeat: bool = False
    wording: int = 0
    interval: int = 2
    late: bool = False
    noise: float = 0.0


@dataclass(frozen=True)
class Batch:
    """B movies of T vision tokens, each followed by its questions and answers.

    patches [B * T * 4, 1176] float32; before [P] and after [B, A] int64 token ids around the video;
    positions [3, B, P + T + A] int64; answers [B, Q] int64 token ids; answer_at [Q] int64, where in the sequence each
    answer is predicted; depth [B, Q] float32, where in the movie its needle is; seen_shape, seen_colour [B, T] int64,
    `NONE` without a needle, -1 where one comes or goes.
    """

    patches: Tensor
    before: Tensor
    after: Tensor
    positions: Tensor
    answers: Tensor
    answer_at: Tensor
    depth: Tensor
    seen_shape: Tensor
    seen_colour: Tensor


Painter = Callable[..., Tensor]


def draw(plan: Plan, generator: torch.Generator, painter: Painter | None = None) -> Batch:
    """Fresh movies, on the generator's device; `painter` is `paint.compose`, compiled (None: `paint.paint`)."""
    frames = plan.tokens * movies.FRAMES_PER_TOKEN
    slots = movies.place(plan.batch, frames, plan.needles, generator, plan.repeat)
    script = paint.script(slots, frames, generator)
    pieces = [patches(planes, plan.noise, generator) for planes in _planes(script, painter)]
    dice = paint.Dice(generator)
    order = dice.uniform(0, 1, plan.batch, plan.needles).argsort(1)[:, : plan.asked]
    shape, colour = slots.shape.gather(1, order), slots.colour.gather(1, order)
    before, after, answer_at = _text(plan, shape, colour)
    centre = ((slots.start + slots.end) / 2 / frames).gather(1, order)
    seen_shape, seen_colour = _labels(slots, script.needle_at, plan)
    return Batch(
        patches=torch.cat(pieces),
        before=before,
        after=after,
        positions=_positions(plan, len(before), after.shape[1], after.device),
        answers=colour + words.IDS[COLOURS[0]],
        answer_at=answer_at + len(before) + plan.tokens,
        depth=centre,
        seen_shape=seen_shape,
        seen_colour=seen_colour,
    )


def _planes(script: paint.Script, painter: Painter | None) -> Iterator[Tensor]:
    total = script.scene_at.numel()
    for at in range(0, total, _CHUNK):
        if painter is None:
            yield paint.paint(script, at, min(at + _CHUNK, total))
        else:
            yield painter(*paint.gather(script, at, at + _CHUNK))[: total - at]


@functools.cache
def resize_matrix(device: torch.device) -> Tensor:
    """[28, 56] float32: the antialiased bicubic resizing of the video processor along one axis, as a matrix."""
    eye = torch.eye(paint.SIZE)[None, None]
    rows = functional.interpolate(eye, (PIXELS, paint.SIZE), mode="bicubic", antialias=True)
    return rows[0, 0].to(device)


def patches(planes: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Patches [n / 2 * 4, 1176] float32 of n frames, planes [n, 3, 56, 56] in 0..255, as the processor makes them."""
    device = planes.device
    resize = resize_matrix(device)
    small = ((planes @ resize.T).transpose(2, 3).contiguous() @ resize.T).transpose(2, 3)
    if noise:
        level = torch.rand(len(small), 1, 1, 1, generator=generator, device=device) * noise
        small = small + level * torch.randn(small.shape, generator=generator, device=device)
    small = small.round_().clamp_(0, 255).div_(255)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (_MEAN, _STD))
    split = ((small - mean) / std).view(-1, movies.FRAMES_PER_TOKEN, 3, 2, 14, 2, 14)
    return split.permute(0, 3, 5, 2, 1, 4, 6).reshape(-1, 3 * movies.FRAMES_PER_TOKEN * 14 * 14)


def _text(plan: Plan, shape: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids before the video [P] and after it [B, A], and where in the latter the answers are predicted [Q]."""
    ids, batch, device = words.IDS, shape.shape[0], shape.device
    wording = words.QUESTIONS[plan.wording].split()
    columns: list[Tensor] = []
    answer_at: list[int] = []

    def say(*spoken: str) -> None:
        columns.extend(torch.full((batch,), ids[word], device=device) for word in spoken)

    for turn in range(shape.shape[1]):
        say(*(("<|vision_end|>",) if turn == 0 else ("<|im_start|>", "user")))
        for word in wording:
            columns.append(shape[:, turn] + ids[SHAPES[0]]) if word == "{}" else say(word)
        say("<|im_end|>", "<|im_start|>", "assistant")
        answer_at.append(len(columns) - 1)
        columns.append(colour[:, turn] + ids[COLOURS[0]])
        say("<|im_end|>")
    before = torch.tensor([ids[word] for word in ("<|im_start|>", "user", "<|vision_start|>")], device=device)
    return before, torch.stack(columns, 1), torch.tensor(answer_at, device=device)


def _positions(plan: Plan, before: int, after: int, device: torch.device) -> Tensor:
    """Rotary positions [3, B, before + tokens + after] of `Qwen2_5_VLModel.get_rope_index` for one token a patch."""
    head = torch.arange(before, device=device).expand(3, -1)
    video = torch.full((3, plan.tokens), before, device=device)
    video[0] += torch.arange(plan.tokens, device=device) * plan.interval
    resume = int(video.max()) + 1 if plan.late else before + 1
    tail = torch.arange(resume, resume + after, device=device).expand(3, -1)
    return torch.cat([head, video, tail], 1)[:, None].expand(-1, plan.batch, -1)


def _labels(slots: paint.Slots, needle_at: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    row = needle_at.view(plan.batch, plan.tokens, movies.FRAMES_PER_TOKEN)
    first, last = row[..., 0], row[..., -1]
    found = []
    for values in (slots.shape, slots.colour):
        label = torch.where(first >= 0, values.flatten()[first.clamp(min=0)], torch.full_like(first, NONE))
        found.append(torch.where(first == last, label, torch.full_like(first, -1)))
    return found[0], found[1]
