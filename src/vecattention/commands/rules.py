"""The options that every command spells the same way: those of the rule, and the choice of backend."""

from __future__ import annotations

import argparse
from typing import Any

NAMES = ("q_pooling_size", "q_block_size", "k_local_size", "group_k_block", "max_scope")


def add_rule(parser: argparse.ArgumentParser, threshold: float) -> None:
    """Options for the arguments of `vecattention.select` that decide the set of keys."""
    group = parser.add_argument_group("the rule")
    group.add_argument(
        "--threshold", type=float, default=threshold, help="theta in (0, 1]; higher is sparser (%(default)s)"
    )
    group.add_argument("--q-pooling-size", type=int, default=64, metavar="P", help="queries averaged (%(default)s)")
    group.add_argument("--q-block-size", type=int, metavar="R", help="rows that share one list of keys (P)")
    group.add_argument("--k-local-size", type=int, default=16, metavar="B", help="keys a tile (%(default)s)")
    group.add_argument("--group-k-block", type=int, default=16, metavar="G", help="tiles a window (%(default)s)")
    group.add_argument("--max-scope", default="window", metavar="SCOPE", help="window or row (%(default)s)")


def rule_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the rule, the threshold apart."""
    return {name: getattr(args, name) for name in NAMES}
