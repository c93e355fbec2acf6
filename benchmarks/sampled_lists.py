"""How far a target is missed when it is looked for on some lists: python benchmarks/sampled_lists.py [--size F H W]

On synthetic maps of video generation, row rule, R=128, P=32, a target for each head. The histogram of every list is
made once; then n evenly spread ones stand for all, from the first list on or from each list that a spread can begin
with. Printed: the miss on all lists, relative to the target, mean and worst of heads.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from vecattention import ops, targets
from vecattention.evals.fidelity.synthetic import synthetic

TARGETS = {"coverage": 0.9, "density": 0.4}
SAMPLES = (64, 32, 16, 8)
LIST = 128


def histograms(query: Tensor, key: Tensor, kind: str, factor: float) -> Tensor:
    """int64 [lists, H, 1 + BINS]: what each list adds."""
    rule = ops.rule_of(
        query.shape[3], q_pooling_size=32, q_block_size=LIST, max_scope="row", causal=False, scale=factor
    )
    return torch.stack([ops.histogram(rows, key, kind, rule)[0] for rows in query.split(LIST, dim=2)])


def misses(lists: Tensor, rows: Tensor, keys: int, kind: str, sample: int) -> tuple[Tensor, Tensor]:
    """Relative misses, [H] from the first list on and [starts * H] from any; ``rows``: queries of each list."""
    found = []
    every = max(1, len(lists) // sample)
    whole = lists.sum(0)
    pairs = int(rows.sum()) * keys
    total = whole.sum(-1) if kind == "coverage" else torch.full_like(whole[:, 0], pairs)
    for start in range(every):
        taken = lists[start::every].sum(0)
        seen = int(rows[start::every].sum()) * keys
        limit = torch.tensor(TARGETS[kind], dtype=torch.float64)
        alpha = targets.cut_off(taken[None], limit.expand(1, len(taken)), kind, seen)[0]
        last = targets.bin_of(alpha.clamp(min=0)).long() + (alpha >= 0)
        reached = whole.cumsum(-1).gather(-1, last[:, None])[:, 0]
        found.append((reached / total / TARGETS[kind] - 1).abs())
    return found[0], torch.cat(found)


def main() -> None:
    """Print a line for each target and number of lists."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, nargs=3, default=(32, 32, 32), help="frames, height, width (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the maps (%(default)s)")
    args = parser.parse_args()
    made = [synthetic(seed, *args.size, causal=False) for seed in args.seeds]
    for kind in TARGETS:
        held = [histograms(one.query, one.key, kind, one.factor) for one in made]
        tokens = made[0].query.shape[2]
        rows = torch.tensor([min(LIST, tokens - first) for first in range(0, tokens, LIST)])
        for sample in SAMPLES:
            both = [misses(lists, rows, made[0].key.shape[2], kind, sample) for lists in held]
            first, any_start = (torch.cat(x) for x in zip(*both, strict=True))
            sys.stdout.write(
                f"{kind} {TARGETS[kind]} {sample:>2} of {len(rows)} lists: from the first {first.mean():.3f}, "
                f"{first.max():.3f}; any start {any_start.mean():.3f}, {any_start.max():.3f}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
