"""Train the testbed's model from nothing, with one command:

    python -m vecattention.testbed.train --out DIR --seconds 480 --device cuda --seed 0 [--resume]

DIR gets model/ (a checkpoint directory that `load` reads), log.jsonl, state.json and state.safetensors (what --resume
needs) and at the end training.json, the record. A step is a function of the seed and its number alone, so that a run
of `--steps` that was cut and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from vecattention.testbed import batches, curriculum, network, paint, score
from vecattention.testbed.curriculum import Standing
from vecattention.testbed.files import replacing
from vecattention.testbed.model import build, save

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a training run is told: where to write, when to stop (seconds or steps), device, seed, vision tokens a step,
    peak rate, index of the longest level of `curriculum.LENGTHS`, seconds between checkpoints, questions of the final
    test, seconds after which to leave off for `--resume` to go on."""

    out: Path
    seconds: float | None = None
    steps: int | None = None
    device: str = "cpu"
    seed: int = 0
    budget: int = 32768
    rate: float = 1e-3
    longest: int = len(curriculum.LENGTHS) - 1
    every: float = 60.0
    questions: int = 512
    pause: float | None = None


class Run:
    """The state of a training run: model, two heads that are thrown away, optimiser, standing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.model: Qwen2_5_VLForConditionalGeneration = build(settings.seed).to(self.device).train()
        width = self.model.config.text_config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 1)
            self.heads = torch.nn.ModuleList([torch.nn.Linear(width, batches.NONE + 1) for _ in range(2)])
        self.heads.to(self.device)
        self.named = dict([*self.model.named_parameters(), *self.heads.named_parameters(prefix="heads")])
        weights = [p for p in self.named.values() if p.ndim > 1]
        others = [p for p in self.named.values() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(
            groups, lr=settings.rate, betas=(0.9, 0.98), fused=self.device.type == "cuda"
        )
        self.standing = Standing()
        if self.device.type == "cuda":
            _reserve()
        self.painter = torch.compile(paint.compose, dynamic=False) if self.device.type == "cuda" else None

    def progress(self) -> float:
        """How far the run is, 0 to 1, by the clock or by steps."""
        if self.settings.steps is not None:
            return self.standing.step / self.settings.steps
        return self.standing.seconds / (self.settings.seconds or 1.0)

    def loss(self, batch: batches.Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch and its share of right answers: answers, the end after them, and what each token shows."""
        hidden, video = network.think(self.model, batch)
        logits = network.answer_logits(self.model, hidden, batch.answer_at).float()
        ends = network.answer_logits(self.model, hidden, batch.answer_at + 1).float()
        end = torch.full_like(batch.answers, self.model.config.text_config.eos_token_id)
        total = functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
        total = total + 0.1 * functional.cross_entropy(ends.flatten(0, 1), end.flatten())
        for head, seen in zip(self.heads, (batch.seen_shape, batch.seen_colour), strict=True):
            total = total + 0.25 * _seen_loss(head(video).float(), seen)
        return total, (logits.argmax(-1) == batch.answers).float().mean()

    def step(self) -> tuple[int, Tensor, Tensor]:
        """One step of training: its level, loss and share of right answers (tensors on the device)."""
        settings, number = self.settings, self.standing.step
        plan, level = curriculum.choose(number, settings.seed, self.standing.level, settings.budget)
        generator = torch.Generator(self.device).manual_seed(settings.seed * 1_000_003 + number)
        with torch.no_grad():
            batch = batches.draw(plan, generator, self.painter)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, right = self.loss(batch)
        rate = curriculum.learn_rate(self.progress(), number, settings.rate)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimiser.step()
        return level, loss.detach(), right

    def save(self) -> None:
        """Write the model and what resuming needs, each file whole or not at all."""
        from safetensors.torch import save_file

        save(self.model, self.settings.out / "model")
        tensors = {f"weight.{name}": p.detach().cpu().contiguous() for name, p in self.named.items()}
        for name, p in self.named.items():
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
        with replacing(self.settings.out / "state.safetensors") as file:
            save_file(tensors, file, metadata={"standing": json.dumps(asdict(self.standing))})

    def restore(self) -> None:
        """Take up the run that `save` left in the output directory."""
        from safetensors import safe_open

        path = self.settings.out / "state.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"--resume finds no {str(path)!r}, wanted a run that was saved; start without it")
        with safe_open(path, "pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}
            self.standing = Standing(**json.loads(file.metadata()["standing"]))
        for name, p in self.named.items():
            p.data.copy_(kept[f"weight.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in kept]
            place = {key: p.device if key != "step" or self.device.type == "cuda" else "cpu" for key in keys}
            if keys:
                self.optimiser.state[p] = {key: kept[f"{key}.{name}"].to(place[key]) for key in keys}


def _reserve() -> None:
    """Let PyTorch take half of the free GPU memory once: batches of ever new sizes are then cut from it at no cost."""
    free, _ = torch.cuda.mem_get_info()
    torch.empty(free // 2, dtype=torch.uint8, device="cuda")


def _seen_loss(logits: Tensor, seen: Tensor) -> Tensor:
    """Cross entropy over tokens that show a needle plus that over tokens that show none: logits [B, T, 9], seen [B, T]."""
    each = functional.cross_entropy(logits.flatten(0, 1), seen.flatten(), ignore_index=-1, reduction="none")
    needle = ((seen >= 0) & (seen != batches.NONE)).flatten()
    none = (seen == batches.NONE).flatten()
    return (each * needle).sum() / needle.sum().clamp(min=1) + (each * none).sum() / none.sum().clamp(min=1)


def train(settings: Settings, resume: bool = False, report: Callable[[dict[str, Any]], None] | None = None) -> Run:
    """Train until the settings' seconds or steps are over; saves at intervals and at the end."""
    if (settings.seconds is None) == (settings.steps is None):
        raise ValueError(f"seconds is {settings.seconds} and steps {settings.steps}, wanted one of the two; pass one")
    settings.out.mkdir(parents=True, exist_ok=True)
    run = Run(settings)
    if resume:
        run.restore()
    begun, saved = time.monotonic() - run.standing.seconds, time.monotonic()
    pending: list[tuple[int, Tensor, Tensor]] = []
    while run.progress() < 1 and run.standing.seconds < (settings.pause or float("inf")):
        pending.append(run.step())
        run.standing = replace(run.standing, step=run.standing.step + 1)
        if len(pending) == 8 or settings.steps is not None:
            for level, _, right in pending:
                run.standing = curriculum.advance(run.standing, level, float(right), run.progress(), settings.longest)
            run.standing = replace(run.standing, seconds=time.monotonic() - begun)
            _log(run, pending, report)
            pending.clear()
        if time.monotonic() - saved > settings.every:
            run.save()
            saved = time.monotonic()
    run.save()
    return run


def _log(run: Run, steps: list[tuple[int, Tensor, Tensor]], report: Callable[[dict[str, Any]], None] | None) -> None:
    level, loss, right = steps[-1]
    line = {
        "step": run.standing.step,
        "seconds": round(run.standing.seconds, 1),
        "open": curriculum.LENGTHS[run.standing.level],
        "tokens": curriculum.LENGTHS[level],
        "loss": round(float(loss), 4),
        "accuracy": round(float(right), 4),
        "running": round(run.standing.accuracy, 4),
        "rate": run.optimiser.param_groups[0]["lr"],
    }
    with (run.settings.out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    if report is not None:
        report(line)


def record(run: Run, scores: list[score.Score]) -> dict[str, Any]:
    """What was trained, where, for how long and with what result, as JSON-ready values."""
    import transformers

    cuda = run.device.type == "cuda"
    settings = {key: value for key, value in asdict(run.settings).items() if key not in ("out", "every")}
    return {
        "settings": settings,
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        "steps": run.standing.step,
        "seconds": round(run.standing.seconds, 1),
        "level": curriculum.LENGTHS[run.standing.level],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rendered": [each.record() for each in scores],
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the training command."""
    parser = argparse.ArgumentParser(prog="python -m vecattention.testbed.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the log and the record")
    parser.add_argument("--seconds", type=float, help="train for this long")
    parser.add_argument("--steps", type=int, help="train for this many steps (instead of --seconds)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=32768, help="vision tokens a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--longest", type=int, default=16384, choices=curriculum.LENGTHS, help="vision tokens")
    parser.add_argument("--questions", type=int, default=512, help="of the final test, at each length")
    parser.add_argument("--pause", type=float, help="leave off after this many seconds in all; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    resume, longest = given.pop("resume"), curriculum.LENGTHS.index(given.pop("longest"))
    run = train(Settings(longest=longest, **given), resume, report=_report)
    if run.progress() < 1:
        return
    run.model.eval()
    scores = []
    for tokens in curriculum.LENGTHS[2 : longest + 1]:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
            scores.append(score.rendered(run.model, tokens, run.settings.questions, run.settings.seed + 1, run.painter))
        logger.info("%s", scores[-1].record())
    with replacing(run.settings.out / "training.json") as name:
        Path(name).write_text(json.dumps(record(run, scores), indent=2) + "\n")


def _report(line: dict[str, Any]) -> None:
    if line["step"] % 80 == 0:
        logger.info("%s", line)


if __name__ == "__main__":
    main()
