r"""A seeded generator of attention inputs whose maps look like those of video transformers.

Every token has features, a query head weighs them, and the logit (scale q k, in nats) of query i and key j is

    logit = a_sink [j in sink] + a_topic <t_i, c_j> + a_time b(frame_i - frame_j)
            + a_space (b(y_i - y_j) + b(x_i - x_j)) / 2 + noise

* sink: the first 4 tokens;
* vertical vectors: 2 % of the keys, alone or in runs of up to 8, carry one of 12 topic codes c_j with a loudness of
  their own; t_i, how much query i asks for each topic, changes slowly with the token's place, so that neighbouring
  queries share the same single keys;
* bands in time and in space: b(d) is the mean of cos(2 pi m d / L) over m = 1, 2, 4, 8, largest at distance 0;
* noise: normal, of standard deviation a_noise, because queries and keys also have random parts.

All features of a token live in one key of D numbers, turned by a random rotation for each key head; query heads of one
key head differ only in their weights (`KINDS`), as in grouped-query attention. Values are topics and smooth fields with
noise. Causal samples are a text prefix of 16 tokens with the sink, the video, and 32 text tokens that ask; non-causal
ones are the video alone, whose first tokens are the sink.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention.evals.fidelity.samples import Sample

TOPICS = 12
WAVES = (1, 2, 4, 8)
SINK = 4
PREFIX, QUESTION = 16, 32


@dataclass(frozen=True)
class Kind:
    """How much a query head weighs each feature, in nats."""

    sink: float
    topic: float
    time: float
    space: float
    noise: float


KINDS = {
    "vertical": Kind(3.0, 8.0, 1.5, 1.5, 0.8),
    "mixed": Kind(3.0, 5.0, 5.0, 3.0, 0.8),
    "spatial": Kind(2.0, 2.0, 9.0, 3.0, 0.8),
    "temporal": Kind(2.0, 2.0, 1.0, 11.0, 0.8),
    "diffuse": Kind(1.0, 1.5, 1.5, 1.5, 0.5),
}
"""Kinds of heads."""

HEADS = ("vertical", "vertical", "mixed", "mixed", "spatial", "temporal", "diffuse", "vertical")
"""Kinds of the query heads of a sample; two of them read each key head."""


def synthetic(
    seed: int = 0, frames: int = 32, height: int = 16, width: int = 16, dim: int = 64, causal: bool = True
) -> Sample:
    """One sample of 8 query heads on 4 key heads, float32.

    Args:
        seed: all else equal, the same seed gives the same sample; bit for bit with the same number of torch's threads.
        frames, height, width: of the video, in tokens: frames * height * width of them.
        dim: head size, at least 64.
        causal: a causal sample with text around the video, or the video alone.

    Raises:
        ValueError: a size that is too small.
    """
    for what, size, least in (("frames", frames, 2), ("height", height, 2), ("width", width, 2), ("dim", dim, 64)):
        if size < least:
            raise ValueError(f"{what} is {size}, wanted at least {least}; raise it")
    dice = torch.Generator().manual_seed(seed)
    place = _places(frames, height, width, causal)
    time = _waves(place[:, 0], frames)
    space = [_waves(place[:, 1], height), _waves(place[:, 2], width)]
    rows: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for pair in range(len(HEADS) // 2):
        wanted, codes = _topics(place.shape[0], dice)
        sink = torch.zeros(place.shape[0], 1)
        sink[:SINK] = 1
        features = [sink, codes, time, *space]
        turn = torch.linalg.qr(torch.randn(dim, dim, generator=dice)).Q
        room = dim - sum(part.shape[1] for part in features)
        noise = torch.randn(place.shape[0], room, generator=dice)
        rows[1].append(torch.cat([*features, noise], 1) @ turn)
        for name in HEADS[2 * pair : 2 * pair + 2]:
            rows[0].append(_query(KINDS[name], wanted, time, space, room, dice) @ turn)
        rows[2].append(_values(codes, place, dim, dice))
    name = f"synthetic{seed}-{'causal' if causal else 'full'}"
    query, key, value = (torch.stack(parts)[None] for parts in rows)
    return Sample(name, query, key, value, causal, frames=None if causal else frames)


def _places(frames: int, height: int, width: int, causal: bool) -> Tensor:
    """float32 [S, 3]: frame, y and x of every token; text stands in the middle of its nearest frame."""
    axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    video = torch.stack(axes, -1).flatten(0, 2).float()
    if not causal:
        return video
    before = torch.tensor([0.0, height / 2, width / 2]).expand(PREFIX, 3)
    after = torch.tensor([frames - 1.0, height / 2, width / 2]).expand(QUESTION, 3)
    return torch.cat((before, video, after))


def _waves(coordinate: Tensor, length: int) -> Tensor:
    """[S, 8]: features whose product over two tokens is b(their distance)."""
    angle = 2 * torch.pi / length * coordinate[:, None] * torch.tensor(WAVES)
    return torch.cat((angle.cos(), angle.sin()), 1) / float(len(WAVES) ** 0.5)


def _topics(tokens: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """What each query asks for [S, TOPICS], unit and slowly changing; what each key offers [S, TOPICS], mostly 0."""
    knots = torch.randn(1, TOPICS, max(2, tokens // 192), generator=dice).abs() ** 3
    wanted = torch.nn.functional.interpolate(knots, size=tokens, mode="linear", align_corners=True)[0].T
    codes = torch.zeros(tokens, TOPICS)
    count = max(1, tokens // 50)
    first = torch.randint(tokens, (count,), generator=dice)
    run = (torch.rand(count, generator=dice) ** 3 * 8).long() + 1
    topic = torch.randint(TOPICS, (count,), generator=dice)
    loud = 0.6 + 0.6 * torch.rand(count, generator=dice)
    for i in torch.arange(count)[run.cumsum(0) <= count].tolist():  # runs until 2 % of the keys are taken
        codes[first[i] : first[i] + run[i], topic[i]] = loud[i]
    return torch.nn.functional.normalize(wanted, dim=1), codes


def _query(kind: Kind, wanted: Tensor, time: Tensor, space: list[Tensor], room: int, dice: torch.Generator) -> Tensor:
    """[S, D]: the features weighed so that scale q k is the logit of the module's equation."""
    tokens = wanted.shape[0]
    noise = torch.randn(tokens, room, generator=dice) * kind.noise / room**0.5
    sink = torch.full((tokens, 1), kind.sink)
    near = [kind.time * time, *(kind.space / 2 * part for part in space)]
    weighed = torch.cat([sink, kind.topic * wanted, *near, noise], 1)
    return weighed * float(weighed.shape[1] ** 0.5)


def _values(codes: Tensor, place: Tensor, dim: int, dice: torch.Generator) -> Tensor:
    """[S, dim]: the key's topic, a field that is smooth in time and space, and noise."""
    topics = codes @ torch.randn(TOPICS, dim, generator=dice)
    unit = place / place.amax(0).clamp(min=1)
    waves = torch.randn(3, dim, generator=dice) * 4
    field = (unit @ waves + torch.rand(dim, generator=dice) * 2 * torch.pi).cos()
    values: Tensor = topics + field + 0.5 * torch.randn(place.shape[0], dim, generator=dice)
    return values
