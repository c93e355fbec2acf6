r"""From a coverage or a density to the cut-off alpha: one pass over the pooled scores, a histogram, no sort.

For block g of R rows and a key j that some pooled row r of g can choose, with s and m of `vecattention.spec`,

    gap(g, j) = min over the pooled rows r of  m[r, j] - s[r, j]  >= 0

says how large alpha must be for the block to keep the key; keys that are kept anyway (causal: the sink and the block's
own) need none. Gaps fall into fixed bins: 512 to each factor of two from 2^-10 to 2^7 nats, one for smaller gaps and
one for larger. Bins are taken from the smallest gap on until what is kept reaches the target:

    density d:   pairs kept anyway + pairs (g, j) in the bins taken  >=  d * allowed pairs
    coverage c:  the same with pairs weighed by their softmax mass, mean over pooled rows  >=  c

and alpha is the upper edge of the last bin taken, so the target is met within one bin. The mass of key j for pooled row
r is softmax_j s[r, j] over the keys that the block's rows may see; that of (g, j), their sum over r, is rounded to
units of 2^-30. When what is kept anyway reaches the target, no other key is taken. A number is a target for all heads
of a batch element together, under one alpha; a tensor of shape [H] or [B, H] is a target for each head.

Integer sums make the result independent of the order of summation; nothing is read back to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vecattention import spec
from vecattention.backends import reference

KINDS = ("coverage", "density")
SHIFT = 14  # bits of a float32 that a bin forgets: 9 of 23 mantissa bits are left
LOWEST, HIGHEST = (127 - 10) << 9, (127 + 7) << 9  # bin numbers of 2^-10 and 2^7 before counting from one
BINS = HIGHEST - LOWEST + 2
UNIT = 2.0**30
SLABS = {"cpu": 2**22, "cuda": 2**24}  # scores held at once
HEADS = {"cpu": 1, "cuda": 8}  # key heads in a slab at most: few launches on a GPU, the cache on a CPU
COPIES = {"cpu": 1, "cuda": 16}  # of each head's histogram: atomic additions to a bin that many keys share wait
KEYS = 2**14  # keys of a head made wide at once, where all of them are more numbers than a slab


def alpha_for(query: Tensor, key: Tensor, target: Tensor, kind: str, rule: spec.Rule) -> Tensor:
    """The cut-off that reaches a target.

    Args:
        query: [B, H, Sq, D].
        key: [B, Hkv, Sk, D].
        target: values in (0, 1], shape [] (heads together), [H] or [B, H] (each head).
        kind: "coverage" or "density".
        rule: everything else that decides the set of keys.

    Returns:
        float32 [B, H], to be used as the alpha of a selection.
    """
    taken = histogram(query, key, kind, rule)
    if target.ndim == 0:
        taken = taken.sum(1, keepdim=True)
    heads = query.shape[1] if target.ndim == 0 else 1
    pairs = heads * spec.allowed_pairs(query.shape[2], key.shape[2], rule.causal)
    return cut_off(taken, target, kind, pairs).expand(query.shape[:2])


def cut_off(taken: Tensor, target: Tensor, kind: str, pairs: int) -> Tensor:
    """float32 [B, H], or [B, 1] for heads together: the cut-off at which the entries of a histogram reach the target.

    Args:
        taken: int64 [B, H or 1, 1 + BINS], as `histogram` gives them; those of parts of the rows add up.
        target, kind: as in `alpha_for`.
        pairs: allowed ones of all that an entry counts, for a density.
    """
    total = taken.sum(-1)
    if kind == "density":
        total = total.new_full(total.shape, pairs)
    if target.ndim == 0 and target.device.type == "cpu":  # nothing to copy to the device: a graph can capture it
        needed = total.double() * float(target)
    else:
        needed = total * target.double().to(taken.device, non_blocking=True).expand(total.shape)
    last = (taken.cumsum(-1) < needed[..., None]).sum(-1)
    return upper_edge(last - 1)


def bin_of(gap: Tensor) -> Tensor:
    """int32: the bin of float32 gaps >= 0.

    >>> bin_of(torch.tensor([0.0, 2.0**-10, 1.0, 1.0 + 2**-9, 500.0])).tolist()
    [0, 1, 5121, 5122, 8705]
    """
    number = gap.contiguous().view(torch.int32) >> SHIFT
    return number.sub_(LOWEST - 1).clamp_(0, BINS - 1)


def upper_edge(number: Tensor) -> Tensor:
    """float32: the largest gap of a bin; the largest float for the last bin, the smallest for bin -1.

    >>> upper_edge(bin_of(torch.tensor([1.0]))).item() == 1 + 2**-9 - 2**-23
    True
    """
    number = number.clamp(max=BINS - 1)
    edge = (((number + LOWEST) << SHIFT) - 1).to(torch.int32).view(torch.float32)
    most = torch.finfo(torch.float32).max
    return edge.where(number >= 0, -most).where(number < BINS - 1, most)


def histogram(query: Tensor, key: Tensor, kind: str, rule: spec.Rule) -> Tensor:
    """int64 [B, H, 1 + BINS]: what is kept anyway, then what each bin adds, in pairs or in units of 2^-30."""
    (batch, heads, q_len, _), (kv_heads, k_len) = query.shape, key.shape[1:3]
    share = heads // kv_heads
    scores, together, copies = (_on(query.device, most) for most in (SLABS, HEADS, COPIES))
    blocks = max(1, scores // (share * rule.rows_per_block * k_len))
    together = max(1, min(together, blocks // max(1, -(-q_len // rule.q_block_size))))
    found = torch.zeros(batch, heads, 1 + BINS, dtype=torch.int64, device=query.device)
    for b in range(batch):
        for kv_head in range(0, kv_heads, together):
            span = slice(kv_head * share, (kv_head + together) * share)
            keys = key[b, kv_head : kv_head + together]
            part = found.new_zeros(len(keys) * share, copies, 1 + BINS)
            if keys.numel() <= scores:
                keys = keys.to(torch.promote_types(key.dtype, torch.float32))
            for first in range(0, q_len, blocks * rule.q_block_size):
                rows = query[b : b + 1, span, first : first + blocks * rule.q_block_size]
                number, weight = _slab(rows, keys, first, q_len, kind, rule)
                _add(part, number, weight)
            found[b, span] = part.sum(1)
    return found


def _on(device: torch.device, most: dict[str, int]) -> int:
    """What a table says for a device: any but a CPU as CUDA."""
    return most.get(device.type, most["cuda"])


def _slab(rows: Tensor, key: Tensor, first: int, q_len: int, kind: str, rule: spec.Rule) -> tuple[Tensor, Tensor]:
    """Bin, int32, or -1 if kept anyway, and weight, int64, of each block and key, [H, blocks, Sk].

    Of rows [1, H, n, D] and key [Hkv, Sk, D]. The scores are the one full-size tensor that lasts: masks and gaps are
    written over them.
    """
    k_len, pool = key.shape[1], rule.q_pooling_size
    score = _scores(reference.pooled_queries(rows, pool)[0].mul_(rule.scale), key)
    score.nan_to_num_(-torch.inf, torch.inf, -torch.inf)  # like -inf, no candidate's score
    if rule.causal:
        position = torch.arange(k_len, device=key.device)
        start = torch.arange(score.shape[1], device=key.device)[:, None] * pool + first + k_len - q_len
        seen, candidate = position < start + pool, (position >= pool) & (position < start)
        score.masked_fill_(~seen, -torch.inf)
    if kind == "density":
        weight = _pairs(first, rows.shape[2], q_len, k_len, rule, key.device).expand(len(score), -1, -1)
    else:  # a row without any score has a softmax of NaN, and no mass
        weight = _blocks(torch.softmax(score, -1), rule, 0).nansum(2).mul_(UNIT).round_().long()
    if rule.causal:
        score.masked_fill_(~candidate, -torch.inf)
    top = reference.cut_off(score, rule).clamp_(min=torch.finfo(score.dtype).min)
    gap = torch.sub(top, score, out=score).float()
    if rule.causal:
        gap.masked_fill_(seen & ~candidate, -1.0)
    gap = _blocks(gap, rule, torch.inf).amin(2)
    number = bin_of(gap)
    return number.masked_fill_(gap < 0, -1) if rule.causal else number, weight


def _scores(pooled: Tensor, key: Tensor) -> Tensor:
    """[H, rows, Sk] of pooled rows [H, rows, D] and key [Hkv, Sk, D], which is made wide in pieces."""
    score = pooled.new_empty(*pooled.shape[:2], key.shape[1])
    pooled, product = (x.unflatten(0, (len(key), -1)).flatten(1, 2) for x in (pooled, score))
    for first in range(0, key.shape[1], KEYS):
        keys = slice(first, first + KEYS)
        wide = key[:, keys].to(pooled.dtype).mT
        if len(key) == 1:  # as a batch of one, small products can round differently
            torch.mm(pooled[0], wide[0], out=product[0, :, keys])
        else:
            torch.bmm(pooled, wide, out=product[..., keys])
    return score


def _blocks(x: Tensor, rule: spec.Rule, fill: float) -> Tensor:
    """[H, pooled rows, Sk] -> [H, blocks, R / P, Sk], a view where the rows fill their blocks."""
    missing = -x.shape[1] % rule.rows_per_block
    whole = F.pad(x, (0, 0, 0, missing), value=fill) if missing else x
    return torch.unflatten(whole, 1, (-1, rule.rows_per_block))


def _pairs(first: int, count: int, q_len: int, k_len: int, rule: spec.Rule, device: torch.device) -> Tensor:
    """int64 [blocks, Sk]: rows of each block that may see each key, for the blocks of rows [first, first + count)."""
    start = torch.arange(first, first + count, rule.q_block_size, device=device)[:, None]
    rows = (q_len - start).clamp(max=rule.q_block_size)
    if not rule.causal:
        return rows.expand(-1, k_len)
    late = torch.arange(k_len, device=device) - (start + k_len - q_len)
    return (rows - late.clamp(min=0)).clamp(min=0)


def _add(found: Tensor, number: Tensor, weight: Tensor) -> None:
    """Add the weights [H, blocks, Sk] of bins -1 and up to found [H, copies, 1 + BINS], neighbours to other copies.

    The bins are overwritten.
    """
    copies = found.shape[1]
    if copies > 1:
        entry = torch.arange(number.shape[-1], device=number.device) % copies * (1 + BINS) + 1
        found.flatten(1).scatter_add_(1, (number + entry).flatten(1), weight.flatten(1))
        return
    # On a CPU several times faster than a scatter; sums stay below 2^53, so they are exact.
    for line, at, amount in zip(found[:, 0], number.add_(1).flatten(1), weight.flatten(1), strict=True):
        line += torch.bincount(at, amount.double(), 1 + BINS).long()
