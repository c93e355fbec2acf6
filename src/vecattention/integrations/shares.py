"""A coverage or a density of a sequence that is split over ranks: one cut-off, whatever the split."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from vecattention import checks, ops, spec
from vecattention.integrations import exchange
from vecattention.integrations.exchange import Group

RULE = ("q_pooling_size", "q_block_size", "k_local_size", "group_k_block", "max_scope", "causal", "scale")


def rule_of(query: Tensor, arguments: dict[str, Any]) -> spec.Rule:
    """The rule among the arguments of `vecattention.vec_attention`."""
    return ops.rule_of(query.shape[3], **{name: x for name, x in arguments.items() if name in RULE})


def at_cut_off(query: Tensor, key: Tensor, arguments: dict[str, Any], *, q_len: int, sample: int = 0,
               first_block: int = 0, heads: Group = None, rows: Group = None, split_heads: bool = False,
               split_rows: bool = False) -> dict[str, Any]:  # fmt: skip
    """The arguments with ``alpha`` in place of a coverage or a density; as they are where they ask for neither.

    Histograms of integers are added up over the ranks, so that all agree on one cut-off: that of one process, but for
    how scores round.

    Args:
        query: [B, own H, own blocks' rows, D], each block on one rank alone.
        key: [B, own Hkv, Sk, D], all of them.
        q_len: rows of all ranks together.
        sample: about so many blocks of all, evenly spread, stand for the others; 0: all of them. Not causal only.
        first_block: number of the first of the own blocks, counted from the first row of all.
        heads, rows: the groups over which heads and rows are split, where ``split_heads`` and ``split_rows`` say so.
    """
    given = dict(arguments)
    coverage, density = given.pop("coverage", None), given.pop("density", None)
    if coverage is None and density is None:
        return arguments
    threshold = given.pop("threshold", checks.THRESHOLD)
    kind, limit = checks.target(threshold, coverage, density, query.shape[0], query.shape[1])
    rule = rule_of(query, given)
    if query.shape[2]:  # a rank of a ring may hold no block of its own
        checks.tensors(rule.causal, query=query, key=key)
    block = rule.q_block_size
    every = max(1, -(-q_len // block) // sample) if sample and not rule.causal else 1
    chosen = -(-q_len // (every * block))
    counted = q_len if every == 1 else (chosen - 1) * block + min(block, q_len - (chosen - 1) * every * block)
    taken = ops.histogram(query, key, kind, rule, every, first_block)
    if split_rows:
        dist.all_reduce(taken, group=rows)
    pairs = spec.allowed_pairs(counted, key.shape[2], rule.causal)
    if limit.ndim == 0:
        taken, pairs = taken.sum(1, keepdim=True), pairs * query.shape[1]
        if split_heads:
            dist.all_reduce(taken, group=heads)
            pairs *= exchange.size_of(heads)
    alpha = ops.cut_off(taken, limit, kind, pairs).expand(query.shape[:2])
    return {**given, "alpha": alpha.contiguous()}
