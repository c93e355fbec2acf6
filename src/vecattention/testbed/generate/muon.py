"""Muon: momentum that is made orthogonal before it is applied (Jordan and others, 2024), for kernels of any rank.

torch.optim.Muon takes matrices alone, and most of an autoencoder's weights are kernels of convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
SCALE = 0.2
"""Size of a step's entries against those of Adam at the same rate (Liu and others, 2025)."""


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """A matrix [m, n] with its singular values drawn to about 1, by the quintic of Muon.

    Example:
        >>> torch.manual_seed(0) and None
        >>> values = torch.linalg.svdvals(orthogonal(torch.randn(8, 20)))
        >>> bool(((values > 0.5) & (values < 1.5)).all())
        True
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square: Tensor = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.transpose(0, 1) if tall else x


class Muon(torch.optim.Optimizer):
    """The optimiser: a kernel [m, ...] counts as the matrix [m, n].

    Args:
        parameters: of two dimensions or more.
        rate: learning rate, comparable to that of Adam.
    """

    def __init__(self, parameters: Iterable[Tensor], rate: float) -> None:
        super().__init__(list(parameters), {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step along the gradients; ``closure`` is as in torch.optim."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                way = orthogonal(p.grad.lerp(momentum, MOMENTUM).reshape(len(p), -1))
                p.add_(way.reshape(p.shape), alpha=-group["lr"] * SCALE * max(way.shape) ** 0.5)
        return loss
