"""Draws balance.png: python docs/figures/balance.py

40 heads whose densities are drawn log-normally (median 0.22, sigma 0.8, at most 1): the load of each rank in one draw,
and the load of the busiest rank over the mean in 50 draws, with heads as they come and as `head_order` deals them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

from vecattention.atomic import replacing
from vecattention.integrations.balance import head_order, imbalance

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HEADS, DRAWS, MEDIAN, SIGMA = 40, 50, 0.22, 0.8
RANKS = (2, 4, 8)
GIVEN, DEALT = "#e8590c", "#0b7285"


def densities(seed: int) -> torch.Tensor:
    """One draw, float32 [40]."""
    normal = torch.randn(HEADS, generator=torch.Generator().manual_seed(seed))
    return (MEDIAN * (SIGMA * normal).exp()).clamp(max=1.0)


def worst(ranks: int) -> tuple[float, float]:
    """Mean over the draws of the busiest rank's load over the mean load: as heads come, and dealt."""
    draws = [densities(seed) for seed in range(DRAWS)]
    given = sum(imbalance(cost, ranks) for cost in draws) / DRAWS
    dealt = sum(imbalance(cost, ranks, head_order(cost, ranks)) for cost in draws) / DRAWS
    return given, dealt


def main(path: Path) -> None:
    """Draw the figure, and print its numbers as the table of docs/many-gpus.md."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    cost = densities(0)
    orders = {"as they come": (GIVEN, torch.arange(HEADS)), "head_order": (DEALT, head_order(cost, 8))}
    for shift, (name, (colour, order)) in enumerate(orders.items()):
        loads = cost[order].view(8, -1).sum(1)
        left.bar(torch.arange(8) + 0.4 * shift - 0.2, loads / loads.mean(), 0.38, color=colour, label=name)
    left.axhline(1, color="#8a94a0", lw=0.8)
    left.set(title="load of 8 ranks with 5 heads each, one draw", xlabel="rank", ylabel="load over the mean")
    left.legend(frameon=False, fontsize=8)
    for shift, (name, colour) in enumerate((("as they come", GIVEN), ("head_order", DEALT))):
        values = [worst(ranks)[shift] for ranks in RANKS]
        right.plot(RANKS, values, color=colour, marker="o", label=name)
    for ranks in RANKS:
        given, dealt = worst(ranks)
        sys.stdout.write(f"| {ranks} | {given:.2f} | {dealt:.2f} |\n")
    right.set(title=f"busiest rank over the mean, {DRAWS} draws", xlabel="ranks", xticks=RANKS, ylim=(0.95, None))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(10)
    with replacing(path) as name:
        figure.savefig(name, dpi=130)


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".png"))
