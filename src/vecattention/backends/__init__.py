"""Implementations of one operation. Each has ``why_not``, ``select`` and ``attend``; none imports another.

* ``why_not(problem) -> tuple[str, ...]``: reasons against running the problem; empty means that it runs.
* ``select(query, key, alpha, rule) -> words``: the kept keys of each block, int32 [B, H, ceil(Sq/R), ceil(Sk/32)].
* ``attend(query, key, value, selection, scale, out, lse)``: writes into ``out`` [B, H, Sq, D] and ``lse`` [B, H, Sq].
"""
