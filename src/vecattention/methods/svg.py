r"""Sparse VideoGen: bands in space for some heads, in time for the others, at a given density; for video generation.

Keys are ``frames`` frames of S tokens, then ``context`` text tokens; queries are the same, or the video alone. A head
is spatial or temporal. Its tokens are numbered u(j) = j (frame after frame), or patch after patch for temporal heads,
u(frame S + patch) = patch frames + frame; text keeps its number. With N = Sk, c = context, and the width of the band
w = N (1 - sqrt(1 - (density - 2 c / N))) query i keeps key j when

    variant "wan":      | u(i) - u(j) | <= ceil(w / 128) 128   or   u(j) < S
    variant "hunyuan":  | u(i) - u(j) | < floor(w / 128) 128   or   i or j is text

of which 128 queries that follow each other in u share the union, so a block reaches up to 127 keys further than its
single rows do (docs/methods.md gives the density that this adds). A temporal head's `Selection.order` is that of u.

Which heads are temporal: for ``num_sampled_rows`` random rows below ``sample_max_row``, exact attention is compared
with attention under two fixed probes, blocks of 128 in u at a distance below max(1, floor(2 S / 128)) ("hunyuan": 1.5
S), with the same sink or text; the head is temporal when its probe has the smaller mean squared error of the output.
Without ``value`` the softmax mass that a probe misses stands for the error. ``temporal`` decides it without probes.

Parameters: frames (1: no time axis, both kinds are the same band), context (0; padding text must be cut off before),
density (0.25), variant ("wan"), num_sampled_rows (64), sample_max_row (10 000), seed (0) of the sampled rows, temporal
(None, or bool that broadcasts to [B, H]). Non-causal only. Bands are at least one block wide.

Source: Sparse VideoGen, ICML 2025, arXiv 2502.01776, in the variant that VecAttention's comparison ran.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vecattention import bits, checks
from vecattention.methods.blocks import BLOCK, groups, number, steps, whole, wide
from vecattention.methods.method import Knob, Method
from vecattention.spec import Selection

VARIANTS = {"wan": 2.0, "hunyuan": 1.5}
"""Variants, and the half width of their probes in frames."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens are: frames of ``patches`` tokens, then text; and the variant's rules."""

    frames: int
    patches: int
    context: int
    variant: str

    @property
    def video(self) -> int:
        """Video tokens."""
        return self.frames * self.patches

    @property
    def keys(self) -> int:
        """All tokens."""
        return self.video + self.context

    def numbers(self, temporal: bool, device: torch.device) -> Tensor:
        """int64 [keys]: u(j) of the module's equation."""
        j = torch.arange(self.keys, device=device)
        if not temporal:
            return j
        return torch.where(j < self.video, j % self.patches * self.frames + j // self.patches, j)

    def always(self, u: Tensor) -> Tensor:
        """bool like u: keys that every query keeps, the first S (wan) or the text (hunyuan)."""
        return u < self.patches if self.variant == "wan" else u >= self.video

    def reach(self, density: float) -> int:
        """Largest distance |u(i) - u(j)| inside the band."""
        share = density - 2 * self.context / self.keys
        if not 0 < share <= 1:
            raise ValueError(
                f"density is {density}, wanted more than 2 context / Sk = {2 * self.context / self.keys:.4f} up to 1; "
                "the text alone takes that much"
            )
        blocks = self.keys * (1 - math.sqrt(1 - share)) / BLOCK
        return math.ceil(blocks) * BLOCK if self.variant == "wan" else max(1, math.floor(blocks)) * BLOCK - 1


def select(query: Tensor, key: Tensor, *, causal: bool, scale: float, frames: int = 1, context: int = 0,
           density: float = 0.25, variant: str = "wan", num_sampled_rows: int = 64, sample_max_row: int = 10_000,
           seed: int = 0, temporal: Tensor | None = None, value: Tensor | None = None) -> Selection:  # fmt: skip
    """The bands of the module's equation."""
    if value is not None:
        checks.tensors(False, query=query, key=key, value=value)
    layout = _layout(query.shape[2], key.shape[2], frames, context, variant)
    reach = layout.reach(number("density", density, 0.0, 1.0, "a share of all pairs in (0, 1]"))
    shape = query.shape[:2]
    if temporal is None:
        rows = sampled_rows(num_sampled_rows, sample_max_row, layout, seed).to(query.device)
        temporal = is_temporal(query, key, value, layout, rows, scale)
    else:
        temporal = _flags(temporal, shape[0], shape[1]).to(query.device)
    words, orders = zip(
        *(_bands(layout, query.shape[2], reach, kind, query.device) for kind in (False, True)), strict=True
    )
    chosen = torch.where(temporal[..., None, None], words[1], words[0])
    order = torch.where(temporal[..., None], orders[1], orders[0])
    return Selection(chosen, query.shape[2], key.shape[2], BLOCK, causal, order)


def is_temporal(query: Tensor, key: Tensor, value: Tensor | None, layout: Layout, rows: Tensor, scale: float) -> Tensor:
    """bool [B, H]: whether the temporal probe answers the sampled rows [n] better than the spatial one."""
    probes = [_probe(layout, rows, kind) for kind in (False, True)]
    found = torch.empty(query.shape[:2], dtype=torch.bool, device=query.device)
    for b, span, q, k in groups(query, key):
        v = None if value is None else wide(value[b, span.start // (query.shape[1] // key.shape[1])])
        for heads in steps(q.shape[0], rows.shape[0] * k.shape[0]):
            scores = q[heads][:, rows] @ k.mT * scale
            spatial, temporal = (_error(scores, v, probe) for probe in probes)
            found[b, span][heads] = temporal < spatial
    return found


def sampled_rows(count: int, below: int, layout: Layout, seed: int) -> Tensor:
    """int64 [count]: the video rows that the probes look at, drawn with replacement."""
    count = whole("num_sampled_rows", count, 1, "rows, at least 1")
    below = min(whole("sample_max_row", below, 1, "a row number, at least 1"), layout.video)
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed))


def _error(scores: Tensor, value: Tensor | None, probe: Tensor) -> Tensor:
    """[G]: mean squared error of the probed output, or the mass that the probe misses; scores [G, n, Sk]."""
    exact = torch.softmax(scores, -1)
    if value is None:
        return (exact * ~probe).sum((-1, -2))
    probed = torch.softmax(scores.masked_fill(~probe, -torch.inf), -1)
    return ((probed - exact) @ value).square().mean((-1, -2))


def _probe(layout: Layout, rows: Tensor, temporal: bool) -> Tensor:
    """bool [n, keys]: what the fixed probe lets the rows see."""
    u = layout.numbers(temporal, rows.device)
    width = max(1, int(VARIANTS[layout.variant] * layout.patches) // BLOCK)
    near = (u[rows][:, None] // BLOCK - u // BLOCK).abs() < width
    return near | layout.always(u)


def _bands(layout: Layout, q_len: int, reach: int, temporal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Words [blocks, W] and order [Sq] of all heads of one kind."""
    u = layout.numbers(temporal, device)
    always = layout.always(u)
    first = torch.arange(0, q_len, BLOCK, device=device)
    last = (first + BLOCK).clamp(max=q_len) - 1
    packed = []
    for blocks in steps(first.shape[0], layout.keys):
        low, high = first[blocks, None] - reach, last[blocks, None] + reach
        text = (last[blocks, None] >= layout.video) if layout.variant == "hunyuan" else torch.zeros_like(low).bool()
        packed.append(bits.pack((u >= low) & (u <= high) | always | text))
    return torch.cat(packed), u[:q_len].argsort()


def _layout(q_len: int, k_len: int, frames: int, context: int, variant: str) -> Layout:
    frames = whole("frames", frames, 1, "frames of the video, at least 1")
    context = whole("context", context, 0, "text tokens behind the video, at least 0")
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, wanted one of {tuple(VARIANTS)}; they differ in sink and rounding")
    if variant == "wan" and context:
        raise ValueError(
            f"context is {context}, wanted 0 with variant='wan'; pass variant='hunyuan' for text behind video"
        )
    patches, rest = divmod(k_len - context, frames)
    if rest or patches < 1:
        raise ValueError(
            f"frames is {frames}, wanted a divisor of the {k_len - context} video keys; pass the latent frames"
        )
    if q_len not in (k_len, k_len - context):
        raise ValueError(
            f"query has Sq={q_len} rows, wanted {k_len} (all tokens) or {k_len - context} (the video); pass one of them"
        )
    return Layout(frames, patches, context, variant)


def _flags(temporal: Tensor, batch: int, heads: int) -> Tensor:
    if not isinstance(temporal, Tensor) or temporal.dtype != torch.bool:
        kind = temporal.dtype if isinstance(temporal, Tensor) else type(temporal).__name__
        raise TypeError(
            f"temporal is {kind}, wanted a bool tensor that broadcasts to (batch, heads), or None; convert it"
        )
    try:
        return temporal.expand(batch, heads)
    except RuntimeError:
        raise ValueError(
            f"temporal has shape {tuple(temporal.shape)}, wanted one that broadcasts to ({batch}, {heads}) = "
            "(batch, heads); pass one flag per head"
        ) from None


PARAMETERS: dict[str, object] = {
    "frames": 1, "context": 0, "density": 0.25, "variant": "wan", "num_sampled_rows": 64, "sample_max_row": 10_000,
    "seed": 0, "temporal": None,
}  # fmt: skip
METHOD = Method(
    "svg", "arXiv 2502.01776", (False,), PARAMETERS, Knob("density", (0.1, 0.25, 0.4, 0.5), 1e-3, 1.0), select,
    takes_value=True,
)  # fmt: skip
