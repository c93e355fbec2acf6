"""The state of a training run, its step, and how it is saved and taken up again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from vecattention.atomic import replacing
from vecattention.testbed import batches, curriculum, network, paint
from vecattention.testbed.curriculum import Standing
from vecattention.testbed.model import build, save
from vecattention.testbed.words import IDS

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


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
        self.model: Qwen2_5_VLForConditionalGeneration = build(settings.seed)
        self.model.train()
        torch.nn.Module.to(self.model, self.device)
        width = self.model.lm_head.in_features
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
        """The loss of a batch and its share of right answers: answers, their end, and what each token shows."""
        hidden, video = network.think(self.model, batch)
        logits = network.answer_logits(self.model, hidden, batch.answer_at).float()
        ends = network.answer_logits(self.model, hidden, batch.answer_at + 1).float()
        end = torch.full_like(batch.answers, IDS["<|im_end|>"])
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
            kept = {name: file.get_tensor(name) for name in cast("list[str]", file.keys())}
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
    """Cross entropy over tokens that show a needle and over those that show none: logits [B, T, 9], seen [B, T]."""
    each = functional.cross_entropy(logits.flatten(0, 1), seen.flatten(), ignore_index=-1, reduction="none")
    needle = ((seen >= 0) & (seen != batches.NONE)).flatten()
    none = (seen == batches.NONE).flatten()
    return (each * needle).sum() / needle.sum().clamp(min=1) + (each * none).sum() / none.sum().clamp(min=1)
