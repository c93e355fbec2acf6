"""Small calls of every kernel kind, for compute-sanitizer: it watches, this only calls, twice each.

    python benchmarks/sanitize.py                                    (once, so that Triton has compiled everything)
    compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Exits with 1 where two equal calls differ. ``--device cpu`` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

import vecattention

RULES = (
    {"q_pooling_size": 32, "q_block_size": 128},
    {"q_pooling_size": 64, "q_block_size": 128, "max_scope": "row"},
    {"q_pooling_size": 64, "q_block_size": 64},
)
LENGTHS = ((300, 556), (300, 557))  # keys of their own begin with a whole stretch of 16 keys, or within one
DIMS = (128, 64)


def call(query: Tensor, key: Tensor, value: Tensor, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What is selected, and the attention over it."""
    selection = vecattention.select(query, key, threshold=0.5, **rule)
    return selection.words, vecattention.attend(query, key, value, selection)


def main() -> int:
    """Call everything; the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="\n".join((__doc__ or "").split("\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device is 'cuda', wanted a device that torch sees; ask for --device cpu to try the script")
    generator = torch.Generator(device).manual_seed(0)
    wrong = 0
    for dim, (q_len, k_len), rule, causal in itertools.product(DIMS, LENGTHS, RULES, (True, False)):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        query, key, value = (
            torch.randn(1, heads, length, dim, device=device, generator=generator).to(dtype)
            for heads, length in ((4, q_len), (2, k_len), (2, k_len))
        )
        first, second = (call(query, key, value, {**rule, "causal": causal}) for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        wrong += not same
        sys.stdout.write(f"head_dim {dim}, {q_len} queries, {k_len} keys, causal {causal}, {rule}: "
                         f"{'equal' if same else 'TWO CALLS DIFFER'}\n")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
