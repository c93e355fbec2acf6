r"""AnchorAttention: single keys ("stripes") that come near the largest score among the first keys and the neighbours.

Rows are cut into super-blocks of L = 128 step queries; super-block R starts at position start(R). With
anchor(i) = max of scale <q_i, k_j> over j <= p_i in {0..L-1} U {start(R)..start(R)+L-1}, p_i the position of row i,

    kept(R) = {0..L-1} U {start(R)..} U { j < start(R) : for some block of 128 rows in R,
                                          scale <mean q, k_j> + theta >= mean of anchor(i) over the block },   j <= p_i

and the rows after the last whole super-block keep everything, as do all rows when there is no whole one.

Parameters: theta (12, nats; higher is denser), step (16 blocks of 128 rows). Causal only; Sq < Sk is served, with
super-blocks counted from the first query. Two slips of the published code are left out: keys that are both initial and
stripe count once, and the 128 keys before a super-block can be selected like any other.

Source: AnchorAttention, 2025, arXiv 2505.23520, in the snapshot that VecAttention's comparison ran.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vecattention import bits
from vecattention.methods.blocks import BLOCK, Grid, every_key, groups, number, steps, whole
from vecattention.methods.method import Knob, Method
from vecattention.spec import Selection


def select(query: Tensor, key: Tensor, *, causal: bool, scale: float, theta: float = 12.0, step: int = 16,
           ) -> Selection:  # fmt: skip
    """The keys of the module's equation."""
    batch, heads, q_len, _ = query.shape
    theta = number("theta", theta, -math.inf, math.inf, "a number of nats")
    step = whole("step", step, 1, "blocks of 128 rows, at least 1")
    dense = every_key(q_len, key.shape[2], causal, batch, heads, query.device)
    supers = q_len // (BLOCK * step)
    if not supers:
        return dense
    words = dense.words.clone(memory_format=torch.contiguous_format)
    for b, span, q, k in groups(query, key):
        for r in range(supers):
            words[b, span, r * step : (r + 1) * step] = _super_block(q, k, r, theta, step, scale)[:, None]
    return Grid(q_len, key.shape[2], causal).selection(words)


def _super_block(q: Tensor, k: Tensor, r: int, theta: float, step: int, scale: float) -> Tensor:
    """int32 [G, W]: the keys of super-block r of the query heads [G, Sq, D] of one key head [Sk, D]."""
    span, k_len = BLOCK * step, k.shape[0]
    start = r * span + k_len - q.shape[1]
    rows = (q[:, r * span : (r + 1) * span] * scale).unflatten(1, (step, BLOCK))
    limit = anchors(rows, k, start).mean(-1) - theta
    position = torch.arange(k_len, device=q.device)
    kept = ((position < span) | ((position >= start) & (position < start + span))).repeat(q.shape[0], 1)
    mean = rows.mean(2)
    for keys in steps(start, q.shape[0] * step):
        kept[:, keys] |= (mean @ k[keys].mT >= limit[..., None]).any(1)
    return bits.pack(kept)


def anchors(rows: Tensor, k: Tensor, start: int) -> Tensor:
    """[G, step, 128]: each row's largest score over the first and the own L keys that it may see.

    rows [G, step, 128, D] are scaled queries from position ``start`` on.
    """
    _, step, block, _ = rows.shape
    before = min(step * block, start)  # of the first keys, those that every row of the super-block may see
    late = torch.ones(block, block, dtype=torch.bool, device=k.device).triu(1)
    top = rows.new_empty(rows.shape[:3])
    for tile in range(step):
        own = start + tile * block
        top[:, tile] = (rows[:, tile] @ k[own : own + block].mT).masked_fill_(late, -torch.inf).amax(-1)
        for seen in (k[:before], k[start:own]):
            if seen.shape[0]:
                top[:, tile] = top[:, tile].maximum((rows[:, tile] @ seen.mT).amax(-1))
    return top


METHOD = Method(
    "anchorattention", "arXiv 2505.23520", (True,), {"theta": 12.0, "step": 16},
    Knob("theta", (0.0, 4.0, 8.0, 12.0, 16.0), -30.0, 60.0), select,
)  # fmt: skip
