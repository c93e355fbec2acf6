"""How far from float64 a result may be: the same rule everywhere.

    error(result, float64)  <=  2 x error(PyTorch in the same dtype, float64)  +  rounding

Rounding is what no computation can avoid: one rounding of the output in its dtype, and one rounding of the largest
logit in the accumulator, which moves a weight by as much relatively. The log-sum-exp is float32 for every input dtype,
so its peer is PyTorch in float32. Nothing else is added, and nothing depends on the backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import brute
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Exact:
    """The float64 answer of one problem, and the errors that are allowed to a result in its dtype."""

    out: Tensor
    lse: Tensor
    out_error: float
    lse_error: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float) -> Exact:
        """From the inputs and the keys of each row, ``rows`` bool [B, H, Sq, Sk]."""
        out, lse = brute.attend(query, key, value, rows, scale)
        peer_out, peer_lse = _peer(query, key, value, rows, scale)
        seen = rows.any(-1)
        if not bool(seen.any()):
            return cls(out, lse, 0.0, 0.0)
        largest_logit = float(_logits(query.double(), key.double(), scale)[rows].abs().max())
        in_weight = torch.finfo(_accumulator(query.dtype)).eps * (1.0 + largest_logit)
        in_out = torch.finfo(query.dtype).eps * float(out.abs().max())
        in_lse = torch.finfo(torch.float32).eps * float(lse[seen].abs().max())
        return cls(
            out,
            lse,
            2 * _distance(peer_out, out, seen) + in_out + in_weight * float(value.double().abs().max()),
            2 * _distance(peer_lse, lse, seen) + in_weight + in_lse,
        )

    def check(self, out: Tensor, lse: Tensor, name: str = "result") -> None:
        """Raise AssertionError unless (out, lse) is within the allowed errors; rows without keys must be 0 and -inf."""
        empty = self.lse == -math.inf
        assert torch.equal(lse == -math.inf, empty), f"{name}: lse is -inf elsewhere than in the rows without keys"
        assert not bool(out[empty].any()), f"{name}: a row without keys is not 0"
        got_out, got_lse = _distance(out, self.out, ~empty), _distance(lse, self.lse, ~empty)
        assert got_out <= self.out_error, f"{name}: output is off by {got_out:.3e}, allowed {self.out_error:.3e}"
        assert got_lse <= self.lse_error, f"{name}: lse is off by {got_lse:.3e}, allowed {self.lse_error:.3e}"


def _peer(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention and log-sum-exp over the same keys in the same dtype."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=rows, scale=scale)
    wide = _accumulator(query.dtype)
    logits = _logits(query.to(wide), key.to(wide), scale).masked_fill(~rows, -math.inf)
    return out, logits.logsumexp(-1)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return scale * (query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT)


def _distance(got: Tensor, wanted: Tensor, rows: Tensor) -> float:
    """Largest absolute difference over the given rows; NaN counts as infinite."""
    if not bool(rows.any()):
        return 0.0
    gap = (got.double() - wanted)[rows].abs()
    return math.inf if bool(gap.isnan().any()) else float(gap.max())
