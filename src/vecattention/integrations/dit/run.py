"""A run: one use of `vecattention.apply` on a video generator."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vecattention.integrations.context_parallel import head_order
from vecattention.integrations.dit.announce import Clock
from vecattention.integrations.dit.processors import Orders, Way
from vecattention.integrations.dit.settings import DitSettings
from vecattention.integrations.dit.tally import Tally, ordered, summed
from vecattention.integrations.stats import Stats
from vecattention.integrations.steps import Place

STEPS = "the first steps stay dense, by dense_steps={0}"
UNNAMED = "(not announced)"
LAYERS = "the first layers stay dense, by dense_layers={0}"

logger = logging.getLogger(__name__)


class Run:
    """One use of `vecattention.apply` on a video generator; made by it.

    Attributes:
        settings: what was asked for, checked and completed, by name of the transformer in the pipeline.
    """

    def __init__(self, settings: Mapping[str, DitSettings], clock: Clock, balance: bool = True) -> None:
        self.settings = dict(settings)
        self._clock = clock
        self._balance = balance
        self._tallies: dict[tuple[str, str | None], Tally] = {}
        self._limits: dict[tuple[str, str | None], list[Tensor]] = {}
        self._noted: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def stats(self) -> Stats:
        """What was computed until now, per layer and head; reading it waits for the device."""
        with self._lock:
            return self._read(self._tallies, self._noted)

    @property
    def branches(self) -> dict[str, Stats]:
        """The same for each guidance branch by its announced name; UNNAMED holds forwards that nobody announced."""
        return self._split(lambda name, branch: UNNAMED if branch is None else branch)

    @property
    def transformers(self) -> dict[str, Stats]:
        """The same for each transformer by its name in the pipeline."""
        return self._split(lambda name, branch: name)

    def __str__(self) -> str:
        parts = self.branches
        if len(parts) < 2:
            return str(self.stats)
        return "\n".join(f"branch {name}\n{part}" for name, part in parts.items())

    def way(self, name: str) -> Way:
        """How the layers of a transformer attend in this run."""
        return Way(self.settings[name].base, self.settings[name].kind, self.note)

    def complete(self, place: Place) -> Place:
        """The place, with what the pipeline's scheduler knows of it."""
        return self._clock.complete(place)

    def orders(
        self, name: str, place: Place, layers: int, heads: int, device: torch.device, ranks: int = 1
    ) -> list[Orders]:
        """What each layer of a transformer does at a place of the generation; ``ranks`` share its heads.

        Raises:
            ValueError: the place does not tell what the settings need, or they do not fit the generation.
        """
        settings = self.settings[name]
        settings.check_branch(place, self._clock.guided())
        warming = settings.schedule.warming(place)
        tally, limits = self._kept(name, place.branch, layers, heads, device)
        dealt = head_order(torch.stack(tally.kept), ranks) if self._balance and ranks > 1 else [None] * layers
        return [
            Orders(
                not warming and layer >= settings.schedule.dense_layers, limits[layer], tally.kept[layer],
                tally.numbers[layer], dealt[layer], tally.times[layer],
            )
            for layer in range(layers)
        ]  # fmt: skip

    def note(self, reason: str) -> None:
        """Count a call that stays dense against orders, and say so the first time."""
        with self._lock:
            self._noted[reason] += 1
            first = self._noted[reason] == 1
        if first:
            logger.warning("vecattention: attention stays dense: %s", reason)

    def _kept(
        self, name: str, branch: str | None, layers: int, heads: int, device: torch.device
    ) -> tuple[Tally, list[Tensor]]:
        """The tally and the thresholds of a branch; made once, so that every forward adds to the same tensors."""
        key = (name, branch)
        with self._lock:
            if key not in self._tallies:
                self._tallies[key] = Tally(layers, heads, device)
                with torch.inference_mode(False):
                    self._limits[key] = [row.to(device) for row in self.settings[name].rows(branch, layers)]
            return self._tallies[key], self._limits[key]

    def _split(self, name_of: Callable[[str, str | None], str]) -> dict[str, Stats]:
        """The tallies that share a name, read together, where anything was counted."""
        with self._lock:
            parts: dict[str, dict[tuple[str, str | None], Tally]] = {}
            for key, tally in self._tallies.items():
                parts.setdefault(name_of(*key), {})[key] = tally
            read = {name: self._read(tallies, {}) for name, tallies in parts.items()}
        return {name: stats for name, stats in read.items() if stats.calls}

    def _read(self, tallies: Mapping[tuple[str, str | None], Tally], noted: Mapping[str, int]) -> Stats:
        """`Stats` with why calls stayed dense: by order of the settings, and what was noted beside."""
        reasons: Counter[str] = Counter(noted)
        for (name, _), tally in tallies.items():
            schedule = self.settings[name].schedule
            for layer, calls in enumerate(ordered(tally)):
                first = layer < schedule.dense_layers
                text = LAYERS.format(schedule.dense_layers) if first else STEPS.format(schedule.dense_steps)
                reasons[text] += calls
        return Stats(summed(tallies.values()), {text: count for text, count in reasons.items() if count})
