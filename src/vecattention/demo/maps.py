"""One head's attention map, made small enough to be seen, and the keys that a rule keeps in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vecattention import bits
from vecattention.demo.mass import select
from vecattention.integrations.capture import Captured

COLUMNS = 1024
"""Most cells across a map."""

STRIDE = 16
"""Of the rows, one in so many is looked at to choose the head."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Map:
    """Cells of rows x columns over the film's tokens, and a part of it key by key.

    Attributes:
        layer, head: whose attention it is.
        weight: [rows, columns], the largest attention probability in each cell.
        kept: [rows, columns], the share of each cell's allowed pairs that the rule keeps.
        keys, queries: spans of the part, in tokens of the film.
        part_weight, part_kept: [queries, keys] of the part, probabilities and bool.
        block: rows that share one list of keys.
        tokens: of the film.
    """

    layer: int
    head: int
    weight: Tensor
    kept: Tensor
    keys: Span
    queries: Span
    part_weight: Tensor
    part_kept: Tensor
    block: int
    tokens: int


def probabilities(layer: Captured, head: int, rows: slice | Tensor) -> Tensor:
    """Attention probabilities float32 [n, S] of some query rows of one head, causal, batch element 0."""
    group = layer.query.shape[1] // layer.key.shape[1]
    scale = layer.query.shape[3] ** -0.5 if layer.scaling is None else layer.scaling
    scores = layer.query[0, head, rows].float() @ layer.key[0, head // group].float().mT * scale
    position = torch.arange(layer.query.shape[2], device=scores.device)
    scores.masked_fill_(position > position[rows][:, None], -torch.inf)
    return scores.softmax(-1).cpu()


def choose(layers: Mapping[int, Captured], film: Span, needles: Sequence[Span], focus: int) -> tuple[int, int]:
    """(layer, head) whose later rows look at the needles most, all of them; without needles, at the fewest single keys.

    Args:
        layers: what each layer's attention was given.
        film: the film's tokens in the sequence.
        needles: spans in tokens of the film; may be empty.
        focus: a token of the needle that counts most.
    """
    scored = [
        (_score(probabilities(layer, head, torch.arange(film[0], film[1], STRIDE)), film, needles, focus), index, head)
        for index, layer in layers.items()
        for head in range(layer.query.shape[1])
    ]
    _, layer_index, head = max(scored)
    return layer_index, head


def _score(weight: Tensor, film: Span, needles: Sequence[Span], focus: int) -> float:
    if not needles:
        inside = weight[:, film[0] + 64 : film[1]].mean(0).sort(descending=True).values
        return float(inside[: max(1, len(inside) // 100)].sum())
    total = 0.0
    for start, end in needles:
        later = weight[min(end // STRIDE + 1, len(weight) - 1) :, film[0] + start : film[0] + end]
        # The root prefers many needles to one.
        total += (2 if start <= focus < end else 1) * float(later.sum(1).mean().sqrt())
    return total


def draw(
    layers: Mapping[int, Captured], film: Span, needles: Sequence[Span], focus: int, rule: Mapping[str, Any]
) -> Map:
    """The map of the head that `choose` finds.

    Args:
        layers, film, needles: as in `choose`.
        focus: token of the film around which the part lies.
        rule: the arguments of `vecattention.select`.
    """
    index, head = choose(layers, film, needles, focus)
    layer = layers[index]
    selection = select(layer.query[:1], layer.key[:1], rule, layer.scaling)
    block, tokens = selection.block, film[1] - film[0]
    columns = min(COLUMNS, tokens)
    cell = torch.arange(tokens) * columns // tokens
    keys, queries = _part(focus, tokens, block)
    weights, shares, part_weight, part_kept = [], [], [], []
    for first in range(film[0], film[1], block):
        rows = slice(first, min(first + block, film[1]))
        weight = probabilities(layer, head, rows)[:, film[0] : film[1]]
        allowed = torch.arange(tokens) <= torch.arange(first - film[0], rows.stop - film[0])[:, None]
        lists = torch.arange(rows.start, rows.stop, device=selection.words.device) // block
        kept = bits.unpack(selection.words[0, head, lists], selection.k_len).cpu()[:, film[0] : film[1]] & allowed
        largest = weight.amax(0)
        weights.append(torch.zeros(columns).scatter_reduce(0, cell, largest, "amax"))
        share = torch.zeros(2, columns).index_add_(1, cell, torch.stack((kept.sum(0), allowed.sum(0))).float())
        shares.append(share[0] / share[1].clamp_min(1))
        inside = slice(max(queries[0] + film[0] - first, 0), max(queries[1] + film[0] - first, 0))
        part_weight.append(weight[inside, keys[0] : keys[1]])
        part_kept.append(kept[inside, keys[0] : keys[1]])
    return Map(
        index, head, torch.stack(weights), torch.stack(shares), keys, queries, torch.cat(part_weight),
        torch.cat(part_kept), block, tokens,
    )  # fmt: skip


def _part(focus: int, tokens: int, block: int) -> tuple[Span, Span]:
    """Keys around the focus and rows after it, key by key in the picture: at most 64 keys and 4 blocks of rows."""
    wide, tall = min(64, tokens), min(4 * block, tokens)
    left = min(max(focus - wide // 2, 0), tokens - wide)
    top = min(-(-(left + wide) // block) * block, tokens - tall)
    return (left, left + wide), (max(top, 0), max(top, 0) + tall)
