"""VecAttention: single keys, chosen by min-p on the mean query of a block.

    kept(g) = { j : s[g, j] - ln(threshold) >= max s[g, .] },   s[g, j] = scale < mean of the block's queries, k_j >

in causal mode with the first P keys and the block's own. This is `vecattention.select`; `vecattention.spec` states the
set exactly. Parameters are those of `select`, with its defaults.

Source: VecAttention, CVPR 2026, arXiv 2603.29494.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vecattention import ops
from vecattention.methods.method import Knob, Method
from vecattention.spec import Selection

PARAMETERS: dict[str, object] = {
    "threshold": 0.9,
    "coverage": None,
    "density": None,
    "q_pooling_size": 64,
    "q_block_size": None,
    "k_local_size": 16,
    "group_k_block": 16,
    "max_scope": "window",
    "backend": "auto",
}


def select(query: Tensor, key: Tensor, *, causal: bool, scale: float, **parameters: Any) -> Selection:
    """`vecattention.select` with these parameters."""
    return ops.select(query, key, causal=causal, scale=scale, **parameters)


METHOD = Method(
    "vecattention", "arXiv 2603.29494", (True, False), PARAMETERS,
    Knob("threshold", (0.9, 0.8, 0.6, 0.4, 0.1, 0.01, 0.001, 1e-4, 1e-5), 1.0, 1e-12, log=True), select,
)  # fmt: skip
