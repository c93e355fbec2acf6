"""The options that every command spells the same way: those of the rule, and the choice of backend."""

from __future__ import annotations

import argparse
from typing import Any

from vecattention.checks import THRESHOLD

DEFAULTS: dict[str, Any] = {
    "q_pooling_size": 64, "q_block_size": None, "k_local_size": 16, "group_k_block": 16, "max_scope": "window",
}  # fmt: skip
"""Those of `vecattention.select`."""


def add_rule(parser: argparse.ArgumentParser, more: str | None = None) -> None:
    """Options for the arguments of `vecattention.select` that decide the set of keys; ``more``: said below."""
    group = parser.add_argument_group("the rule", more)
    group.add_argument("--threshold", type=float, help=f"theta in (0, 1]; higher is sparser ({THRESHOLD})")
    group.add_argument("--q-pooling-size", type=int, metavar="P", help="queries averaged (64)")
    group.add_argument("--q-block-size", type=int, metavar="R", help="rows that share one list of keys (P)")
    group.add_argument("--k-local-size", type=int, metavar="B", help="keys a tile (16)")
    group.add_argument("--group-k-block", type=int, metavar="G", help="tiles a window (16)")
    group.add_argument("--max-scope", metavar="SCOPE", help="window or row (window)")


def rule_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the rule, the threshold apart."""
    return DEFAULTS | given_rule(args)


def threshold_of(args: argparse.Namespace) -> float:
    """The threshold."""
    return THRESHOLD if args.threshold is None else float(args.threshold)


def given_rule(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that were given."""
    return {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
