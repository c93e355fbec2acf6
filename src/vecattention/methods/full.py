"""Dense attention as a method: every key that a row may see, ``kept(i) = {0..Sk-1}``, with j <= i + Sk - Sq if causal.

It runs on the same `attend` as the others, so that what differs between methods is their selection alone.
"""

from __future__ import annotations

from torch import Tensor

from vecattention.methods.blocks import every_key
from vecattention.methods.method import Method
from vecattention.spec import Selection


def select(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Selection:
    """Every key."""
    return every_key(query.shape[2], key.shape[2], causal, query.shape[0], query.shape[1], query.device)


METHOD = Method("full", "scaled dot-product attention", (True, False), {}, None, select)
