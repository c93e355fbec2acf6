"""Sparse VideoGen against its maths written with loops, and its published densities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vecattention import methods
from vecattention.methods import svg

WAN = {"frames": 6, "context": 0, "variant": "wan"}
TEXT = {"frames": 5, "context": 37, "variant": "hunyuan"}


def number(j: int, frames: int, patches: int, temporal: bool) -> int:
    """u(j) of a video token in its head's order; text keeps its own."""
    frame, patch = divmod(j, patches)
    return patch * frames + frame if temporal and j < frames * patches else j


def width(keys: int, context: int, density: float) -> float:
    return keys * (1 - math.sqrt(1 - (density - 2 * context / keys)))


def brute(q_len: int, k_len: int, density: float, temporal: bool, frames: int, context: int, variant: str) -> Tensor:
    """bool [Sq, Sk]: the exact band of each row, then the union over 128 rows that follow each other in u."""
    patches = (k_len - context) // frames
    w = width(k_len, context, density) / 128
    u = torch.tensor([number(j, frames, patches, temporal) for j in range(k_len)])
    exact = torch.zeros(q_len, k_len, dtype=torch.bool)
    for i in range(q_len):
        distance = (u - u[i]).abs()
        if variant == "wan":
            exact[i] = (distance <= math.ceil(w) * 128) | (u < patches)
        else:
            text = torch.arange(k_len) >= frames * patches
            exact[i] = (distance < max(1, math.floor(w)) * 128) | text | text[i]
    block = [number(i, frames, patches, temporal) // 128 for i in range(q_len)]
    mask = torch.zeros_like(exact)
    for g in set(block):
        rows = [i for i in range(q_len) if block[i] == g]
        mask[rows] = exact[rows].any(0)
    return mask


@pytest.mark.parametrize("q_len, k_len, density, arguments", [
    (600, 600, 0.4, WAN), (606, 606, 0.1, WAN), (552, 552, 0.5, TEXT), (515, 552, 0.6, TEXT), (552, 552, 0.2, TEXT),
], ids=str)  # fmt: skip
def test_sets_equal_brute_force(case: Any, q_len: int, k_len: int, density: float, arguments: dict[str, Any]) -> None:
    query, key, _ = case(1, 4, 2, q_len, k_len).tensors()
    temporal = torch.tensor([False, True, True, False])
    got = methods.get("svg").select(query, key, causal=False, density=density, temporal=temporal, **arguments).mask()[0]
    for head in range(4):
        assert torch.equal(got[head], brute(q_len, k_len, density, bool(temporal[head]), **arguments))


def errors(q: Tensor, k: Tensor, v: Tensor, rows: list[int], arguments: dict[str, Any]) -> tuple[float, float]:
    """Mean squared output error of the sampled rows under the spatial and under the temporal probe."""
    frames, video = arguments["frames"], k.shape[0] - arguments["context"]
    patches = video // frames
    near = max(1, math.floor({"wan": 2.0, "hunyuan": 1.5}[arguments["variant"]] * patches / 128))
    found = []
    for temporal in (False, True):
        total = 0.0
        for i in rows:
            kept = []
            for j in range(k.shape[0]):
                u_i, u_j = number(i, frames, patches, temporal), number(j, frames, patches, temporal)
                always = u_j < patches if arguments["variant"] == "wan" else j >= video
                kept.append(abs(u_i // 128 - u_j // 128) < near or always)
            logits = (k @ q[i]) / math.sqrt(q.shape[1])
            index = torch.tensor(kept).nonzero().squeeze(1)
            exact = torch.softmax(logits, 0) @ v
            total += float(((torch.softmax(logits[index], 0) @ v[index] - exact) ** 2).mean())
        found.append(total / len(rows))
    return found[0], found[1]


@pytest.mark.parametrize("length, arguments", [(2400, {"frames": 8, "context": 0, "variant": "wan"}),
                                               (2140, {"frames": 7, "context": 40, "variant": "hunyuan"})])  # fmt: skip
def test_heads_are_told_apart_by_the_output_error(case: Any, length: int, arguments: dict[str, Any]) -> None:
    query, key, value = case(2, 4, 2, length, length).tensors(seed=7)
    patches = (length - arguments["context"]) // arguments["frames"]
    layout = svg.Layout(arguments["frames"], patches, arguments["context"], arguments["variant"])
    rows = svg.sampled_rows(16, 1000, layout, seed=3)
    assert int(rows.max()) < 1000
    wanted = []
    for b in range(2):
        for h in range(4):
            spatial, temporal = errors(query[b, h], key[b, h // 2], value[b, h // 2], rows.tolist(), arguments)
            wanted.append(temporal < spatial)
    assert any(wanted) and not all(wanted)
    got = svg.is_temporal(query, key, value, layout, rows, 16**-0.5)
    assert got.flatten().tolist() == wanted
    chosen = {"num_sampled_rows": 16, "sample_max_row": 1000, "seed": 3, "density": 0.3, **arguments}
    by_value = methods.get("svg").select(query, key, causal=False, value=value, **chosen)
    by_flags = methods.get("svg").select(query, key, causal=False, temporal=got, **chosen)
    assert torch.equal(by_value.words, by_flags.words)
    assert by_value.order is not None and by_flags.order is not None and torch.equal(by_value.order, by_flags.order)


def test_attention_over_permuted_rows_equals_masked_attention(case: Any) -> None:
    query, key, value = case(2, 4, 2, 600, 600).tensors(seed=1)
    temporal = torch.tensor([True, False, True, False])
    selection = methods.get("svg").select(query, key, causal=False, density=0.2, frames=6, temporal=temporal)
    wide_k, wide_v = (x.repeat_interleave(2, dim=1) for x in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, wide_k, wide_v, attn_mask=selection.mask())
    for backend in ("reference", "cpu"):
        got = methods.attention("svg", query, key, value, causal=False, density=0.2, frames=6, temporal=temporal,
                                backend=backend)  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_width_has_the_published_sparsity() -> None:
    """Wan2.1 at 720p: 21 frames of 3600; the published masks leave out 56.2, 52.5 and 46.7 % (spec of the source)."""
    query = torch.zeros(1, 1, 75600, 16, dtype=torch.float16)
    for density, sparsity in [(0.4, 0.562), (0.44, 0.525), (0.5, 0.467)]:
        arguments = {"frames": 21, "density": density, "temporal": torch.tensor([False])}
        selection = methods.get("svg").select(query, query, causal=False, **arguments)
        exact = exact_density(75600, 3600, svg.Layout(21, 3600, 0, "wan").reach(density))
        assert 1 - exact == pytest.approx(sparsity, abs=6e-4)
        added = float(selection.density()) - exact
        assert 0 < added < 127 / 75600


def exact_density(keys: int, sink: int, reach: int) -> float:
    """Share of pairs in the band |i - j| <= reach or the first ``sink`` columns."""
    pairs = sum(min(i + reach, keys - 1) - max(i - reach, 0) + 1 + min(sink, max(i - reach, 0)) for i in range(keys))
    return pairs / keys**2
