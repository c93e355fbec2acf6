"""One stage of training: parameters, optimiser, average of the weights, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vecattention.testbed.generate.muon import Muon

WARM = 0.03
"""Share of a stage in which the rate rises."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum")
LOOKED_UP = ("shared.", "embed_tokens.", "relative_attention_bias.", "scale_shift_table")
"""Parameters that are tables, not matrices, by a part of their names."""


@dataclass(frozen=True)
class Budget:
    """How long a stage takes: seconds on the clock, or a number of steps.

    Raises:
        ValueError: neither or both are given.
    """

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"seconds is {self.seconds} and steps {self.steps}, wanted one of the two; pass one")

    def share(self, seconds: float, steps: int) -> float:
        """How much of it is used, 0 to 1."""
        share = steps / self.steps if self.steps is not None else seconds / (self.seconds or 1.0)
        return min(max(share, 0.0), 1.0)


def rate_at(share: float, peak: float) -> float:
    """The learning rate: up in a straight line, down along a cosine to a fiftieth.

    >>> [round(rate_at(x, 1.0), 3) for x in (0.0, 0.015, 0.03, 1.0)]
    [0.001, 0.5, 1.0, 0.02]
    """
    if share < WARM:
        return peak * max(share / WARM, 1e-3)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - WARM) / (1 - WARM))))


def _is_matrix(name: str, p: Tensor) -> bool:
    return p.ndim > 1 and p[0].numel() > 1 and not any(part in name for part in LOOKED_UP)


class Stage:
    """Parameters in training: matrices and kernels by Muon, the others by Adam.

    Args:
        named: the parameters.
        rate: peak learning rate.
        budget: how long.
        seed: with the number of a step it decides everything random in that step.
        average: decay of the running average of the weights; 0: none.
        half: multiply in bfloat16.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], rate: float, budget: Budget, seed: int, average: float = 0.0,
        half: bool = False,
    ) -> None:  # fmt: skip
        self.named, self.rate, self.budget, self.seed = dict(named), rate, budget, seed
        self.steps, self.seconds = 0, 0.0
        self.half, self._decay = half, average
        self.averages = {name: p.detach().clone() for name, p in named.items()} if average else {}
        first = next(iter(named.values()))
        matrices = [p for name, p in named.items() if _is_matrix(name, p)]
        others = [p for name, p in named.items() if not _is_matrix(name, p)]
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, rate),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.97), weight_decay=0.0, fused=first.is_cuda),
        )

    @property
    def share(self) -> float:
        """How much of the stage is done, 0 to 1."""
        return self.budget.share(self.seconds, self.steps)

    def step(self, loss_of: Callable[[torch.Generator], Tensor]) -> Tensor:
        """One step; the loss, still on the device."""
        device = next(iter(self.named.values())).device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + self.steps)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate_at(self.share, self.rate)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            loss = loss_of(generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.steps += 1
        self._average()
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs, on the CPU."""
        kept = {f"weight.{name}": p.detach() for name, p in self.named.items()}
        kept |= {f"average.{name}": x for name, x in self.averages.items()}
        for name, p in self.named.items():
            state = self._optimiser(name).state.get(p, {})
            kept |= {f"{key}.{name}": value.detach() for key, value in state.items()}
        return {name: x.cpu().contiguous() for name, x in kept.items()}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        for name, p in self.named.items():
            p.data.copy_(kept[f"weight.{name}"])
            if name in self.averages:
                self.averages[name].copy_(kept[f"average.{name}"])
            found = {key: kept[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in kept}
            if found:
                place = {key: p.device if key != "step" or p.is_cuda else torch.device("cpu") for key in found}
                self._optimiser(name).state[p] = {key: value.clone().to(place[key]) for key, value in found.items()}

    def _optimiser(self, name: str) -> torch.optim.Optimizer:
        return self.optimisers[0 if _is_matrix(name, self.named[name]) else 1]

    def swap(self) -> None:
        """Exchange the weights and their averages; a second call changes them back."""
        for name, p in self.named.items():
            if name in self.averages:
                now = p.detach().clone()
                p.data.copy_(self.averages[name])
                self.averages[name].copy_(now)

    @torch.no_grad()
    def _average(self) -> None:
        if self.averages:
            decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
            names = list(self.averages)
            torch._foreach_lerp_([self.averages[n] for n in names], [self.named[n] for n in names], 1 - decay)
