"""A training run of the generator: autoencoder, then denoiser; saved and taken up again at any step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vecattention.atomic import replacing
from vecattention.testbed.generate import losses, network
from vecattention.testbed.generate.network import Sizes
from vecattention.testbed.generate.stage import Budget, Stage

STAGES = ("autoencoder", "denoiser")
AVERAGE = 0.998
"""Decay of the running average of the denoiser's weights."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """What a training run is told.

    Attributes:
        out: folder for the pipeline, the log, the state and the record.
        autoencoder, denoiser: how long each stage takes.
        sizes: of the generator.
        device, seed: where it runs, and what decides everything random.
        clips, batch: cuttings of films in a step of the autoencoder, and films in one of the denoiser.
        films: films that are encoded for the denoiser.
        rates: peak learning rates of the two stages.
        half: multiply in bfloat16.
        every: seconds between checkpoints.
        pause: leave off after so many steps of both stages together, for --resume to go on; None: never.
    """

    out: Path
    autoencoder: Budget
    denoiser: Budget
    sizes: Sizes = Sizes()
    device: str = "cpu"
    seed: int = 0
    clips: int = 4
    batch: int = 8
    films: int = 3072
    rates: tuple[float, float] = (3e-3, 2e-3)
    half: bool = False
    every: float = 60.0
    pause: int | None = None


class Run:
    """The state of a training run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.parts = network.build(settings.sizes, settings.seed)
        for part in (self.parts.vae, self.parts.transformer, self.parts.text_encoder):
            nn.Module.to(part, self.device)
            part.train()
        denoiser = dict(self.parts.transformer.named_parameters())
        denoiser |= {f"text.{name}": p for name, p in self.parts.text_encoder.named_parameters()}
        self.stages = (
            Stage(
                dict(self.parts.vae.named_parameters()), settings.rates[0], settings.autoencoder, settings.seed + 1,
                half=settings.half,
            ),
            Stage(
                denoiser, settings.rates[1], settings.denoiser, settings.seed + 2, average=AVERAGE, half=settings.half
            ),
        )  # fmt: skip
        self._films: losses.Encoded | None = None
        if self.device.type == "cuda":
            self.parts.transformer.compile_repeated_blocks(fullgraph=True)

    @property
    def current(self) -> int:
        """Index of the stage that is not over; the number of stages when all are."""
        return next((i for i, stage in enumerate(self.stages) if stage.share < 1), len(self.stages))

    def train(self, report: Report | None = None) -> bool:
        """Train until the budgets are used, or until the pause; whether all is done. Saves at intervals and then."""
        saved = time.monotonic()
        if self.current > 0:
            self.films()  # a resumed run: the latents' scale is not kept in the weights
        while (number := self.current) < len(self.stages):
            if self.settings.pause is not None and sum(s.steps for s in self.stages) >= self.settings.pause:
                break
            self._steps(number, report)
            if time.monotonic() - saved > self.settings.every:
                self.save()
                saved = time.monotonic()
        self.save()
        return self.current == len(self.stages)

    def _steps(self, number: int, report: Report | None) -> None:
        """A few steps, so that the clock and the loss are read now and then only."""
        stage = self.stages[number]
        loss_of = self._loss(number)
        begun = time.monotonic()
        count = 1 if stage.budget.steps is not None else 10
        loss = [stage.step(loss_of) for _ in range(count)][-1]
        value = float(loss)  # waits, so that the clock tells the truth
        stage.seconds += time.monotonic() - begun
        self._log(number, value, report)

    def _loss(self, number: int) -> Callable[[torch.Generator], Tensor]:
        settings, parts = self.settings, self.parts
        if number == 0:
            return lambda generator: losses.autoencoder_loss(parts, settings.sizes, settings.clips, generator)
        films = self.films()
        return lambda generator: losses.denoiser_loss(parts, films, settings.batch, generator)

    def films(self) -> losses.Encoded:
        """The encoded films; made when first asked for, from the autoencoder as it is then."""
        if self._films is None:
            settings = self.settings
            batch = min(settings.batch, settings.films)
            self.parts.vae.eval()
            self._films = losses.encode(
                self.parts, settings.sizes, settings.films, batch, settings.seed + 3, self.device
            )
        return self._films

    def _log(self, number: int, loss: float, report: Report | None) -> None:
        stage = self.stages[number]
        line = {
            "stage": STAGES[number], "step": stage.steps, "seconds": round(stage.seconds, 1), "loss": round(loss, 5),
            "rate": stage.optimisers[0].param_groups[0]["lr"],
        }  # fmt: skip
        with (self.settings.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if report is not None:
            report(line)

    def save(self) -> None:
        """Write the pipeline and what resuming needs, each whole or not at all."""
        from safetensors.torch import save_file

        done = self.stages[1].steps > 0
        if done:
            self.stages[1].swap()
        network.save(self.parts.pipeline(), self.settings.out / "generator")
        if done:
            self.stages[1].swap()
        tensors = {
            f"{name}.{key}": x for name, stage in zip(STAGES, self.stages, strict=True)
            for key, x in stage.tensors().items()
        }  # fmt: skip
        standing = [[stage.steps, stage.seconds] for stage in self.stages]
        told = json.dumps({"standing": standing, "sizes": asdict(self.settings.sizes)})
        with replacing(self.settings.out / "state.safetensors") as file:
            save_file(tensors, file, metadata={"run": told})

    def restore(self) -> None:
        """Take up the run that `save` left in the output directory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of other sizes.
        """
        from safetensors import safe_open

        path = self.settings.out / "state.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"--resume finds no {str(path)!r}, wanted a run that was saved; start without it")
        with safe_open(path, "pt") as file:
            kept = {name: file.get_tensor(name) for name in cast("list[str]", file.keys())}
            standing = json.loads(file.metadata()["run"])
        sizes = json.loads(json.dumps(asdict(self.settings.sizes)))
        if standing["sizes"] != sizes:
            raise ValueError(f"--resume finds a run of {standing['sizes']}, wanted {sizes}; pass the sizes of that run")
        for name, stage, (steps, seconds) in zip(STAGES, self.stages, standing["standing"], strict=True):
            prefix = f"{name}."
            stage.restore({key.removeprefix(prefix): x for key, x in kept.items() if key.startswith(prefix)})
            stage.steps, stage.seconds = steps, seconds
