"""What a run of sparse attention in a video generator was asked to do, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vecattention import checks
from vecattention.integrations.settings import PUBLISHED_THRESHOLD, Settings, pays_from, settings_of
from vecattention.integrations.steps import Place, Schedule, schedule_of
from vecattention.thresholds import BRANCHES, SETTINGS, ThresholdTable

COVERAGE = 0.9
"""Share of the pooled softmax that each head keeps when nothing is asked for; see docs/decisions/video-defaults.md."""


@dataclass(frozen=True)
class DitSettings:
    """The arguments of `vecattention.apply` for one transformer, checked and completed.

    Attributes:
        base: rule, backend, chunk_size and min_length.
        schedule: which steps and layers stay dense.
        kind: what ``limit`` is: "threshold", "coverage" or "density".
        limit: [], [H] or [B, H], for every layer; None where there is a table.
        table: thresholds by layer and head, or None.
    """

    base: Settings
    schedule: Schedule
    kind: str = "threshold"
    limit: Tensor | None = None
    table: ThresholdTable | None = None

    @property
    def always_dense(self) -> bool:
        """Whether every step stays dense."""
        return isinstance(self.schedule.dense_steps, float) and self.schedule.dense_steps == 1.0

    def rows(self, branch: str | None, layers: int) -> list[Tensor]:
        """The limits of each layer, [] or [H] or [B, H], for a guidance branch."""
        if self.table is None or self.limit is not None:
            return [self.limit if self.limit is not None else torch.tensor(PUBLISHED_THRESHOLD)] * layers
        if branch is None:
            branch = "cond"  # `check_branch` allows it only where the table and the pipeline have one branch
        return [self.table.row(layer, branch) for layer in range(layers)]

    def check_branch(self, place: Place, guided: bool) -> None:
        """Refuse a forward whose branch the table has no thresholds for; ``guided``: an "uncond" branch will follow.

        Raises:
            ValueError: a branch that is not in the table, or nobody named it.
        """
        if self.table is None:
            return
        if self.table.uncond is None and (guided or place.branch == "uncond"):
            raise ValueError(
                "table has thresholds of the branch 'cond' alone, wanted both 'cond' and 'uncond': this generation has "
                "a guidance branch; tune it too, or pass ThresholdTable(cond, uncond=cond, ...) to share them"
            )
        if place.branch is None and self.table.uncond is not None:
            raise ValueError(
                "table has thresholds of the branches 'cond' and 'uncond', wanted to be told which one this forward "
                "is, got none; call it inside transformer.cache_context('cond') or ('uncond')"
            )
        if place.branch is not None and place.branch not in BRANCHES:
            raise ValueError(
                f"branch is {place.branch!r}, wanted one of {BRANCHES} of the table; pass one threshold instead of it"
            )


def dit_settings_of(
    *,
    layers: int,
    heads: int,
    threshold: float | Tensor | None = None,
    coverage: float | Tensor | None = None,
    density: float | Tensor | None = None,
    table: ThresholdTable | None = None,
    dense_steps: int | float = 0.06,
    dense_layers: int | float = 0,
    min_length: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    device: torch.device | None = None,
    head_dim: int = 0,
    **rule: Any,
) -> DitSettings:
    """The `DitSettings` of these arguments for a transformer of so many layers and heads; ``rule``: as in `SETTINGS`.

    ``device``, ``head_dim``: as for `settings_of`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a table made for something else.
    """
    schedule = schedule_of(dense_steps, dense_layers, layers)
    asked = {name: value for name, value in rule.items() if value is not None}
    if table is not None:
        if not isinstance(table, ThresholdTable):
            raise TypeError(
                f"table is a {type(table).__name__}, wanted a ThresholdTable; pass ThresholdTable.load(path)"
            )
        for name, value in (("threshold", threshold), ("coverage", coverage), ("density", density)):
            if value is not None:
                raise ValueError(f"{name} is {value!r} beside a table, wanted one of the two; leave {name} out")
        table.check(layers, heads, causal=False, **asked)
        asked = {name: getattr(table, name) for name in SETTINGS if name != "causal"}
    else:
        asked = _with_defaults(asked)
    base = settings_of(
        layers=layers, heads=heads, chunk_size=chunk_size, backend=backend,
        min_length=0 if min_length is None else min_length, **asked,
    )  # fmt: skip
    if min_length is None:
        base = replace(base, min_length=pays_from(device, False, base.block, heads * head_dim))
    if table is not None:
        return DitSettings(base, schedule, table=table)
    if threshold is None and coverage is None and density is None:
        coverage = torch.full((heads,), COVERAGE, dtype=torch.float64)
    return DitSettings(base, schedule, *_target(threshold, coverage, density, heads))


def _with_defaults(asked: dict[str, Any]) -> dict[str, Any]:
    """The maximum of the row unless a window is asked for, and lists of 128 rows made from means of 32."""
    scope = {} if "group_k_block" in asked else {"max_scope": "row"}
    block = asked.get("q_block_size", 128)
    pool = min(32, block) if isinstance(block, int) else 32
    return {"q_block_size": 128, "q_pooling_size": pool, **scope, **asked}


def _target(
    threshold: float | Tensor | None, coverage: float | Tensor | None, density: float | Tensor | None, heads: int
) -> tuple[str, Tensor]:
    """The kind of limit and its value, checked as far as it can be before the batch is known."""
    given = PUBLISHED_THRESHOLD if threshold is None else threshold
    shaped = next((x for x in (coverage, density, given) if isinstance(x, Tensor) and x.ndim == 2), None)
    batch = 1 if shaped is None else int(shaped.shape[0])
    kind, limit = checks.target(given, coverage, density, batch, heads)
    if limit.device.type == "cpu":
        checks.values(limit, kind)
    return kind, limit
