"""Train the testbed's model from nothing, with one command:

    python -m vecattention.testbed.train --out DIR --seconds 480 --device cuda --seed 0 [--resume]

DIR gets model/ (a checkpoint directory that `load` reads), log.jsonl, state.safetensors (what --resume needs) and at
the end training.json, the record. A step is a function of the seed and its number alone, so that a run of `--steps`
that was cut and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecattention.atomic import replacing
from vecattention.testbed import curriculum, score
from vecattention.testbed.run import Run, Settings

logger = logging.getLogger(__name__)


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
    parser = argparse.ArgumentParser(
        prog="python -m vecattention.testbed.train", description=(__doc__ or "").split("\n")[0]
    )
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
