r"""Train the small video generator from nothing, with one command.

    OMP_NUM_THREADS=1 python -m vecattention.testbed.generate.train --out DIR --device cpu --bfloat16 \
        --autoencoder-seconds 900 --seconds 3200 --test 96

is how the shipped one was made, in 70 minutes on one core of a CPU with AVX-512 instructions for bfloat16 (begun with
--seconds 2700, and taken up after 2,000 of them with --resume and the longer time). Untried, but what the options are
there for, is a larger one on a GPU:

    python -m vecattention.testbed.generate.train --out DIR --device cuda --size 128 --frames 25 --width 256 --heads 8 \
        --layers 8 --wide 768 --clips 32 --batch 64 --films 16384 --autoencoder-seconds 600 --seconds 3000

DIR gets generator/ (a pipeline directory that `load` reads), log.jsonl, state.safetensors (what --resume needs) and at
the end training.json, the record, and samples.png. A step is a function of the seed and its number alone, and of the
rate, so that a run of a number of steps that was cut and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vecattention.atomic import replacing
from vecattention.testbed.generate import report
from vecattention.testbed.generate.network import Sizes, load
from vecattention.testbed.generate.run import Run, Settings
from vecattention.testbed.generate.stage import Budget

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Run the training command."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if given.device == "cuda":
        torch.set_float32_matmul_precision("high")
    settings = settings_of(given)
    settings.out.mkdir(parents=True, exist_ok=True)
    run = Run(settings)
    if given.resume:
        run.restore()
    if not run.train(_report):
        logger.info("paused; --resume goes on")
        return
    with replacing(settings.out / "training.json") as name:
        Path(name).write_text(json.dumps(record(run, given.test), indent=2) + "\n")
    logger.info("wrote %s", settings.out / "training.json")


def settings_of(given: argparse.Namespace) -> Settings:
    """The settings that the options ask for."""
    sizes = replace(Sizes(), **{k: v for k, v in vars(given).items() if k in SMALLER and v is not None})
    return Settings(
        out=given.out, autoencoder=Budget(given.autoencoder_seconds, given.autoencoder_steps),
        denoiser=Budget(given.seconds, given.steps), sizes=sizes, device=given.device, seed=given.seed,
        clips=given.clips, batch=given.batch, films=given.films, rates=tuple(given.rates), every=given.every,
        pause=given.pause, half=given.bfloat16 or given.device == "cuda",
    )  # fmt: skip


SMALLER = ("size", "frames", "base", "width", "heads", "layers", "wide")


def record(run: Run, count: int) -> dict[str, Any]:
    """What was trained, where, for how long and with what result, as JSON-ready values; paints samples.png too."""
    import diffusers

    settings, cuda = run.settings, run.device.type == "cuda"
    pipe = load(settings.out / "generator", device=settings.device)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=cuda):
        films, captions = report.generate(pipe, settings.sizes, count, settings.seed + 4)
    report.picture(films[:12], captions[:12], settings.out / "samples.png")
    told = {key: value for key, value in asdict(settings).items() if key not in ("out", "every", "pause")}
    return {
        "settings": told,
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        "steps": [stage.steps for stage in run.stages],
        "seconds": [round(stage.seconds, 1) for stage in run.stages],
        "parameters": sum(p.numel() for stage in run.stages for p in stage.named.values()),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        },
        "autoencoder_psnr": report.fidelity(pipe, settings.sizes, settings.seed + 5),
        "generated": {"films": count, **report.judged(films, captions)},
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vecattention.testbed.generate.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline, the log and the record")
    parser.add_argument("--autoencoder-seconds", type=float, help="train the autoencoder for this long")
    parser.add_argument("--autoencoder-steps", type=int, help="or for this many steps")
    parser.add_argument("--seconds", type=float, help="train the denoiser for this long")
    parser.add_argument("--steps", type=int, help="or for this many steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clips", type=int, default=4, help="cuttings of films in a step of the autoencoder (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="films in a step of the denoiser (%(default)s)")
    parser.add_argument("--films", type=int, default=3072, help="films to encode for the denoiser (%(default)s)")
    parser.add_argument("--rates", type=float, nargs=2, default=(3e-3, 2e-3), help="peak learning rates")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16 on a CPU too; on a GPU always")
    parser.add_argument("--test", type=int, default=48, help="films of the final test (%(default)s)")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checkpoints (%(default)s)")
    parser.add_argument("--pause", type=int, help="leave off after so many steps; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for name in SMALLER:
        parser.add_argument(f"--{name}", type=int, help=f"another {name} than {getattr(Sizes(), name)}")
    return parser


def _report(line: dict[str, Any]) -> None:
    if line["step"] % 50 == 0:
        logger.info("%s", line)


if __name__ == "__main__":
    main()
