"""What it changes that the mean of a block of queries is rounded: python benchmarks/rounded_means.py OUT.jsonl [--show]

The Hopper selection rounds it once, to the dtype of the tensors. Synthetic maps of video and the layers of the trained
model, P = 64 and 32, lists of 128 rows; a threshold for each head that gives the density asked for without rounding.
For each set: how many of the kept pairs differ, as a share of them, and the mean recall without rounding and with it.
Sets that OUT holds already are skipped. --show prints the table of what it holds instead.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from vecattention import bits
from vecattention.evals.fidelity.captured import capture_movies
from vecattention.evals.fidelity.records import Records, provenance
from vecattention.evals.fidelity.synthetic import synthetic
from vecattention.ops import rule_of, select_at
from vecattention.recall import recall
from vecattention.targets import alpha_for

TOKENS = 4096


def maps() -> Iterator[tuple[str, bool, Tensor, Tensor]]:
    """(name, causal, query, key) of each set."""
    for causal in (True, False):
        sample = synthetic(frames=16, causal=causal)
        yield f"synthetic {'causal' if causal else 'full'}", causal, sample.query, sample.key
    for one in capture_movies(None, TOKENS, (0,), None, "cpu"):
        yield f"trained {one.name}", one.causal, one.query, one.key


def rounded(query: Tensor, pool: int) -> Tensor:
    """Queries in float32, each the mean of its block as the kernel rounds it."""
    blocks = [part.float().mean(2, keepdim=True).to(query.dtype).expand_as(part) for part in query.split(pool, dim=2)]
    return torch.cat(blocks, dim=2).float()


def table(path: str) -> str:
    """The records as a table: a row for each set, rule and density, P = 64 and 32 in a cell."""
    held = {tuple(r["key"].values())[1:]: r for r in Records(path)}
    lines = [
        "| set | rule | density | differ, bfloat16 | float16 | recall | rounded, bfloat16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    sets = dict.fromkeys(key[0] for key in held)
    for name, scope, density in itertools.product(sets, ("window", "row"), (0.1, 0.4)):
        pair = [[held[name, dtype, pool, scope, density] for pool in (64, 32)] for dtype in ("bfloat16", "float16")]
        cells = [", ".join(f"{100 * r['differ']:.2f}" for r in rows) + " %" for rows in pair]
        cells += [", ".join(f"{r[what]:.4f}" for r in pair[0]) for what in ("recall", "recall_rounded")]
        lines.append(f"| {name} | {scope} | {100 * density:.0f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(path: str) -> None:
    """Measure what is not there yet."""
    records = Records(path)
    for name, causal, query, key in maps():
        wanted = itertools.product((torch.bfloat16, torch.float16), (64, 32), ("window", "row"), (0.1, 0.4))
        for dtype, pool, scope, density in wanted:
            what = {"study": "rounded means", "set": name, "dtype": str(dtype).removeprefix("torch."), "pool": pool,
                    "scope": scope, "density": density}  # fmt: skip
            if records.has(what):
                continue
            q, k = query.to(dtype), key.to(dtype)
            rule = rule_of(q.shape[3], q_pooling_size=pool, q_block_size=128, max_scope=scope, causal=causal)
            limit = torch.full(q.shape[:2], density, dtype=torch.float64)
            alpha = alpha_for(q.float(), k.float(), limit, "density", rule)
            exact = select_at(q.float(), k.float(), alpha, rule)
            other = select_at(rounded(q, pool), k.float(), alpha, rule)
            differ = int(bits.popcount(exact.words ^ other.words).sum()) / int(bits.popcount(exact.words).sum())
            recalls = [float(recall(q.float(), k.float(), x).mean()) for x in (exact, other)]
            reached = [float(x.density().mean()) for x in (exact, other)]
            row = {"differ": differ, "recall": recalls[0], "recall_rounded": recalls[1],
                   "reached": reached[0], "reached_rounded": reached[1]}  # fmt: skip
            records.add(what, row | provenance())
            print(*what.values(), {name: round(value, 5) for name, value in row.items()}, flush=True)


if __name__ == "__main__":
    if "--show" in sys.argv[2:]:
        print(table(sys.argv[1]))
    else:
        main(sys.argv[1])
