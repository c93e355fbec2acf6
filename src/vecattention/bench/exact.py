"""Errors against float64, on sampled rows: measured before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import bits
from vecattention.spec import Selection

ALLOWED = 2.0  # times the error of torch's own attention in the same dtype
FLOOR = 1e-3


@dataclass(frozen=True)
class Error:
    """Relative L2 errors against float64 over the same rows: ours, and of torch's attention in the same dtype."""

    ours: float
    torch: float

    @property
    def passes(self) -> bool:
        """Whether ours is at most twice torch's (and never judged by less than 1e-3)."""
        return self.ours <= max(ALLOWED * self.torch, FLOOR)

    def record(self) -> dict[str, float | bool]:
        """JSON-ready values."""
        return {"error": self.ours, "error_torch": self.torch, "error_ok": self.passes}


def error_of(out: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: Selection | None, causal: bool,
             rows: int = 48, seed: int = 0) -> Error:  # fmt: skip
    """The error of an attention's output on random rows of random heads; selection None: dense attention."""
    generator = torch.Generator().manual_seed(seed)
    heads, q_len, k_len = query.shape[1], query.shape[2], key.shape[2]
    group = heads // key.shape[1]
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    exact: list[Tensor] = []
    for _ in range(rows):
        head, row = (int(torch.randint(n, (), generator=generator)) for n in (heads, q_len))
        kept = torch.ones(k_len, dtype=torch.bool, device=query.device)
        if selection is not None:
            block = int(blocks_of(selection, head, torch.tensor([row], device=query.device)))
            kept = bits.unpack(selection.words[0, head, block], k_len).clone()
        if causal:
            kept[row + k_len - q_len + 1 :] = False
        q = query[0, head, row : row + 1]
        k, v = key[0, head // group][kept], value[0, head // group][kept]
        if not len(k):
            ours.append(out[0, head, row].double())
            exact.append(torch.zeros_like(ours[-1]))
            theirs.append(exact[-1])
            continue
        exact.append(torch.softmax(q.double() @ k.double().mT * q.shape[-1] ** -0.5, -1)[0] @ v.double())
        theirs.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0, 0].double())
        ours.append(out[0, head, row].double())
    truth = torch.stack(exact)
    scale = truth.norm().clamp(min=1e-30)
    return Error(*(float((torch.stack(x) - truth).norm() / scale) for x in (ours, theirs)))


def blocks_of(selection: Selection, head: int, rows: Tensor) -> Tensor:
    """int64 [n]: the blocks whose lists these query rows of a head of the first batch element share."""
    if selection.order is not None:
        order = selection.order[0, head]
        rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[rows]
    return rows // selection.block
